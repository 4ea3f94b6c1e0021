"""Pinned host memory in exact sizes, handed out as leases.

torch's own pinned allocator rounds each block up to a power of two and keeps what was freed; here a slab is ordinary
memory of the size asked for, registered with the driver once. A lease is a range of a slab and frees itself when its
owner, a node of the autograd graph, is gone.
Left out: moving leases. A range is where it is until it is released, so several slabs may exist.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from grpo.errors import RunError

ALIGNMENT = 512  # bytes
SPARE = 0.03  # pinning takes a third of a second a GiB
GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")
_KNOB = "update.activation_checkpointing is offload"


class _Slab:
    """One piece of host memory; registered with CUDA until nobody refers to it, a view's lease included."""

    def __init__(self, size: int, *, pinned: bool) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8)
        self.free = [(0, size)]  # (start, end), sorted, never touching
        if pinned:
            address = self.memory.data_ptr()
            _check(torch.cuda.cudart().cudaHostRegister(address, size, 0), size)
            # Memory that is freed while registered could never be registered by its next owner.
            weakref.finalize(self, _unregister, self.memory, size).atexit = False

    def take(self, size: int) -> int | None:
        """Start of a free range of `size` bytes, first fit."""
        for place, (start, end) in enumerate(self.free):
            if end - start >= size:
                self.free[place : place + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """Back to the free ranges, joined with its neighbours."""
        ranges = sorted([*self.free, (start, start + size)])
        joined = [ranges[0]]
        for low, high in ranges[1:]:
            if low == joined[-1][1]:
                joined[-1] = (joined[-1][0], high)
            else:
                joined.append((low, high))
        self.free = joined


class Lease:
    """A range of host memory until `release`, or until nobody holds it."""

    def __init__(self, arena: HostArena, slab: _Slab, start: int, size: int) -> None:
        self._arena, self._slab, self._start, self._size = arena, slab, start, size
        self.held = True

    def view(self, like: Tensor) -> Tensor:
        """The range as a tensor of the shape and dtype of `like`."""
        raw = self._slab.memory[self._start : self._start + like.nbytes]
        return raw.view(like.dtype).view(like.shape)

    def release(self) -> None:
        """Give the range back; the second time does nothing."""
        if self.held:
            self.held = False
            self._slab.give(self._start, self._size)
            self._arena.leased -= self._size

    def __del__(self) -> None:
        self.release()


class HostArena:
    """`capacity` bytes of host memory, of which `leased` are out; `peak` is the most that ever were.

    Args:
        pinned: register the memory with CUDA, so that copies run beside the computation.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._slabs: list[_Slab] = []
        self.leased = self.peak = 0

    @property
    def capacity(self) -> int:
        """Bytes of host memory held."""
        return sum(slab.memory.numel() for slab in self._slabs)

    def reserve(self, count: int, size: int) -> None:
        """Room for `count` more leases of `size` bytes. With nothing leased, one slab of just that size replaces all;
        where it replaces a smaller one it is 3 % larger than that, if the host has so much.

        Raises:
            RunError: the host has not that much memory to give.
        """
        size = _aligned(size)
        if sum((end - start) // size for slab in self._slabs for start, end in slab.free) >= count:
            return
        wanted, replaces = count * size, bool(self._slabs) and self.leased == 0
        if self.leased == 0:
            self._slabs = []
        if replaces:  # sizes vary: the next bin a few tokens longer must not pin everything anew
            room, spare = available_host_bytes(), _aligned(int(SPARE * wanted))
            wanted += spare if room is None or wanted + spare <= room else 0
        self._add(wanted)

    def lease(self, size: int) -> Lease:
        """A range of at least `size` bytes; a new slab of just that size where none has room."""
        size = _aligned(size)
        for slab in self._slabs:
            start = slab.take(size)
            if start is not None:
                return self._leased(slab, start, size)
        slab = self._add(size)
        return self._leased(slab, slab.take(size) or 0, size)

    def _leased(self, slab: _Slab, start: int, size: int) -> Lease:
        self.leased += size
        self.peak = max(self.peak, self.leased)
        return Lease(self, slab, start, size)

    def _add(self, size: int) -> _Slab:
        room = available_host_bytes()
        if room is not None and size > room:
            raise RunError(
                f"{_KNOB}: layer inputs need {size / GIB:.1f} GiB of host memory and {room / GIB:.1f} GiB are free "
                "(want recompute, or a smaller update.max_tokens_per_batch)"
            )
        slab = _Slab(size, pinned=self._pinned)
        self._slabs.append(slab)
        return slab


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _unregister(memory: Tensor, size: int) -> None:
    torch.cuda.synchronize()  # no copy may be under way
    _check(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()), size)


def _check(code: object, size: int) -> None:
    if int(code) != 0:  # type: ignore[call-overload]
        _forget_error()
        raise RunError(f"{_KNOB}: {size / GIB:.2f} GiB of host memory cannot be pinned (CUDA error {code})")


def _forget_error() -> None:
    """The driver reports its last error to whoever asks next, which would be an innocent kernel."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)


def available_host_bytes() -> int | None:
    """What this process may still take: free memory of the host, or of its container where that is less.

    None where neither is known.
    """
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass  # not Linux
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            found.append(int(limit) - int((_CGROUP / "memory.current").read_text(encoding="ascii")))
    except OSError:
        pass  # no container, or an older kernel
    return min(found) if found else None
