"""Tensors on disk: one safetensors file, written and read in one pass that also hashes it.

Layout (safetensors format): 8 bytes little-endian N, N bytes of JSON header {name: {dtype, shape, data_offsets}}, then
the tensors' bytes. Written here rather than by the safetensors package, whose `save` wants the whole file in memory
once more and whose files would have to be read again for their hash; here the extra memory is one chunk, also for a
tensor on a GPU (a non-contiguous one is copied, one at a time). Tensors that share memory are each written in full.
Left out: metadata, big-endian machines, dtypes without a safetensors name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.errors import InputError, RunError

_CHUNK = 16 * 2**20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SHA256 = re.compile(r"[0-9a-f]{64}")


class CheckpointError(InputError):
    """A checkpoint that cannot be trusted; the line names the file."""


@dataclass(frozen=True)
class FileFacts:
    """What the manifest knows of a file: `size` in bytes and the hexadecimal `sha256` of all of them."""

    size: int
    sha256: str

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 0 or not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"size {self.size!r}, sha256 {self.sha256!r}")


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileFacts:
    """Create `path` (mode 0600, never an existing file) from `chunks` and sync it. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileFacts(size, digest.hexdigest())


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of the tensors of one file, in bytes, without its header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def file_chunks(tensors: Mapping[str, Tensor], *, finite: bool = False) -> Iterator[bytes | memoryview]:
    """The bytes of the safetensors file of `tensors`, in chunks; each tensor in its own dtype, on any device.

    Raises:
        TypeError: a dtype that safetensors has no name for.
        RunError: with `finite`, a floating tensor with a NaN or an infinity.
    """
    # Widest elements first: every tensor then starts at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    yield _header(ordered)
    for name, tensor in ordered:
        flat = tensor.detach().reshape(-1)
        length = _CHUNK // flat.element_size()
        for start in range(0, flat.numel(), length):
            part = flat[start : start + length].cpu().contiguous()
            if finite and not _all_finite(part):
                raise RunError(f"{name} has values that are not finite (NaN or infinity)")
            yield _memory(part)


def read_file(path: Path, facts: FileFacts) -> bytes:
    """The verified contents of a small file.

    Raises:
        CheckpointError: it is not a regular file, or its size or hash differ from `facts`.
        OSError: it cannot be read.
    """
    with _HashedFile(path, facts) as file:
        return file.read(facts.size)


def read_tensors(path: Path, facts: FileFacts) -> dict[str, Tensor]:
    """The verified tensors of a file, on the CPU, each with memory of its own; hashed while they are read.

    Raises:
        CheckpointError: as `read_file`, or it is not a safetensors file.
        OSError: it cannot be read.
    """
    with _HashedFile(path, facts) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > file.left:
            raise CheckpointError(f"{path}: header is longer than the file")
        try:
            layout = _layout(json.loads(file.read(length)), file.left)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: header is damaged") from error
        tensors = {}
        for name, dtype, shape in layout:
            tensors[name] = torch.empty(shape, dtype=dtype)
            file.read_into(_memory(tensors[name].reshape(-1)))
    return tensors


def open_regular(path: Path) -> tuple[int, int]:
    """A descriptor for reading a regular file, and its size in bytes. No link is followed, no pipe waited for.

    Raises:
        CheckpointError: it is a link, a folder, a pipe, …
        OSError: it cannot be opened.
    """
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a symbolic link (want the file itself)")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, facts.st_size


class _HashedFile:
    """A file that is read once from start to end and hashed on the way; leaving it compares with the manifest."""

    def __init__(self, path: Path, facts: FileFacts) -> None:
        self._path, self._facts = path, facts
        self._digest = hashlib.sha256()
        self.left = facts.size

    def __enter__(self) -> _HashedFile:
        self._descriptor, size = open_regular(self._path)
        if size != self._facts.size:
            os.close(self._descriptor)
            raise CheckpointError(f"{self._path}: has {size} bytes (want {self._facts.size}, as in the manifest)")
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        os.close(self._descriptor)
        if kind is None and (self.left or self._digest.hexdigest() != self._facts.sha256):
            raise CheckpointError(f"{self._path}: sha256 differs from the manifest's")

    def read(self, length: int) -> bytes:
        buffer = bytearray(min(length, self.left))
        self.read_into(memoryview(buffer))
        return bytes(buffer)

    def read_into(self, view: memoryview) -> None:
        while view:
            count = os.readv(self._descriptor, [view[:_CHUNK]])
            if count == 0:
                raise CheckpointError(f"{self._path}: ended while it was read")
            self._digest.update(view[:count])
            self.left -= count
            view = view[count:]


def _header(ordered: list[tuple[str, Tensor]]) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
            raise TypeError(f"{name}: {tensor.dtype}, {tensor.layout} cannot be written as safetensors")
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _layout(header: dict[str, Any], size: int) -> list[tuple[str, torch.dtype, list[int]]]:
    """Name, dtype and shape of each tensor in file order. Raises if they do not cover `size` bytes exactly."""
    end, layout = 0, []
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        if any(type(length) is not int or length < 0 for length in shape):
            raise ValueError(f"shape of {name}")
        begin, end_before = entry["data_offsets"][0], end
        end = entry["data_offsets"][1]
        if begin != end_before or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"offsets of {name}")
        layout.append((name, dtype, shape))
    if end != size:
        raise ValueError("bytes that belong to no tensor")
    return layout


def _memory(flat: Tensor) -> memoryview:
    """The bytes of a contiguous [N] CPU tensor, not copied."""
    dense = flat.as_strided(flat.shape, (1,))  # one element may have any stride and still be contiguous
    return dense.view(torch.uint8).numpy().data


def _all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of at least one element is. The extremes carry any NaN or infinity: 20 times faster than all."""
    if not tensor.is_floating_point():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no aminmax
    return bool(torch.isfinite(torch.stack(torch.aminmax(wide))).all())
