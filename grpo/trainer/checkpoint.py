"""Checkpoints on disk: what is written is whole or not there, and what is read was verified.

    checkpoints/step_000100/  policy.safetensors  optimizer.safetensors  …  state.json  MANIFEST.json

Written beside (`.tmp-…`), hashed on the way, each file and then the folder synced, renamed, the parent synced; only
then older ones are pruned. There is no pointer to the latest: the loader takes the newest folder that verifies.
safetensors and JSON only, so loading runs no code. A folder of the same step that is replaced stands as `….old` until
the new one is in its place. Every function that writes wants the run lock (lock.py) held. Left out: what a checkpoint
holds (state.py), and defence against someone who can write the run folder: hashes find accidents, not forgeries.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from grpo.errors import InputError, RunError
from grpo.trainer.lock import RUN_NAME, RunLock
from grpo.trainer.manifest import FILE_STEM, MANIFEST, STATE, json_problem, manifest_bytes, parse_json, read_manifest
from grpo.trainer.tensor_file import (
    CheckpointError,
    FileFacts,
    file_chunks,
    read_file,
    read_tensors,
    tensor_bytes,
    write_file,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "RunLock",
    "SaveError",
    "clean_leftovers",
    "load_checkpoint",
    "newest_checkpoint",
    "save_checkpoint",
]

WEIGHT_FILES = ("policy", "adapter")  # never committed with a NaN or an infinity

_STEP = re.compile(r"step_(\d{6,15})(\.old)?")
_LEFTOVER = re.compile(r"\.(tmp|del)-step_\d{6,15}(\.old)?-\d+")
_SPARE_BYTES = 2**20  # headers, manifest, and what the file system needs for itself


class SaveError(OSError):
    """A checkpoint could not be written; the last good one is untouched.

    `committed`: the new checkpoint is whole and in place all the same, only removing an older one failed.
    """

    def __init__(self, message: str, cause: OSError, *, committed: bool = False) -> None:
        super().__init__(f"{message}: {cause.strerror or cause}")
        self.errno = cause.errno
        self.committed = committed


@dataclass(frozen=True)
class Checkpoint:
    """One step's state: `tensors` by file stem ("policy", "optimizer", …) and name, `state` as JSON values."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


# --- saving --------------------------------------------------------------------------------------------------


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint, *, run_id: str, config_hash: str, keep: int = 2) -> Path:
    """Commit `checkpoint` to `run_dir/checkpoints/step_……` and keep the newest `keep`, this one included.

    Tensors keep dtype and bits, not views or sharing. In `state`, tuples come back as lists. Checkpoints of later
    steps are removed with the old ones: they belong to a future that a resume from an earlier step has given up.

    Raises:
        SaveError: the disk is full or fails (see `SaveError.committed`).
        RunError: weights or a number in `state` are not finite, or `state` is not JSON; nothing is written.
        InputError: `checkpoints` is a symbolic link, or `run_id` is not `[A-Za-z0-9._-]{1,100}`.
    """
    _check_request(checkpoint, run_id, keep)
    name = f"step_{checkpoint.step:06d}"
    state = _state_bytes(checkpoint)
    try:
        folder = _checkpoints(run_dir, create=True)
        clean_leftovers(run_dir)
        _require_space(folder, sum(map(tensor_bytes, checkpoint.tensors.values())) + len(state) + _SPARE_BYTES)
        _commit(folder, name, checkpoint, state, {"run_id": run_id, "config_hash": config_hash})
    except OSError as error:
        raise SaveError(f"{run_dir}: {name} was not saved", error) from error
    try:
        _prune(folder, checkpoint.step, keep)
    except OSError as error:
        raise SaveError(f"{run_dir}: {name} was saved, but an older one stays", error, committed=True) from error
    return folder / name


def _check_request(checkpoint: Checkpoint, run_id: str, keep: int) -> None:
    if not RUN_NAME.fullmatch(run_id):
        raise InputError(f"run id {run_id!r}: has other characters than A-Z a-z 0-9 . _ - (want 1 to 100 of those)")
    if keep < 1:
        raise ValueError(f"keep is {keep} (want at least 1)")
    if not 0 <= checkpoint.step < 10**15:
        raise ValueError(f"step is {checkpoint.step} (want 0 or more)")
    for stem, tensors in checkpoint.tensors.items():
        if not FILE_STEM.fullmatch(stem) or "__metadata__" in tensors:
            raise ValueError(f"file {stem!r}: its name, or that of a tensor in it, cannot be used")


def _state_bytes(checkpoint: Checkpoint) -> bytes:
    if (problem := json_problem(checkpoint.state, "state")) is not None:
        raise RunError(f"step_{checkpoint.step:06d} was not saved: {problem}")
    return json.dumps(checkpoint.state, allow_nan=False).encode()


def _commit(folder: Path, name: str, checkpoint: Checkpoint, state: bytes, facts: Mapping[str, str]) -> None:
    temporary = folder / f".tmp-{name}-{os.getpid()}"
    temporary.mkdir(mode=0o700)
    try:
        files: dict[str, FileFacts] = {}
        for stem, tensors in checkpoint.tensors.items():
            chunks = file_chunks(tensors, finite=stem in WEIGHT_FILES)
            files[f"{stem}.safetensors"] = write_file(temporary / f"{stem}.safetensors", chunks)
        files[STATE] = write_file(temporary / STATE, [state])
        write_file(temporary / MANIFEST, [manifest_bytes(files, step=checkpoint.step, **facts)])
        _sync(temporary)
        _move_in(temporary, folder / name)
    except BaseException as error:
        with suppress(OSError):  # what cannot be removed now is a leftover, removed before the next save
            _empty(temporary)
        if isinstance(error, RunError):
            raise RunError(f"{name} was not saved: {error}") from error
        raise


def _move_in(temporary: Path, final: Path) -> None:
    """Rename to the final name. A folder that has it already steps aside first, and stays loadable as `.old`."""
    aside = final.with_name(f"{final.name}.old")
    if _stands(final):
        if _stands(aside):
            if not _is_ours(aside):
                raise FileExistsError(errno.EEXIST, f"{aside} is in the way and not a checkpoint of ours")
            _remove(aside)
        final.rename(aside)
    temporary.rename(final)
    _sync(final.parent)


def _stands(path: Path) -> bool:
    """Whether there is anything of that name. Unlike `os.path.lexists`, a failure to look is an OSError."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _prune(folder: Path, step: int, keep: int) -> None:
    steps: set[int] = set()
    for path, its_step in _candidates(folder):
        if not _is_ours(path):
            continue
        if its_step > step or its_step in steps or len(steps) == keep:
            _remove(path)
        else:
            steps.add(its_step)


def _is_ours(path: Path) -> bool:
    """Whether it is a folder that carries our manifest and nothing but what that lists."""
    if path.is_symlink():
        return False
    try:
        known = {MANIFEST, *read_manifest(path).files}
    except CheckpointError:
        return False
    return all(member.name in known and stat.S_ISREG(member.lstat().st_mode) for member in path.iterdir())


def _remove(path: Path) -> None:
    """Out of the loader's sight first, for good, then file by file."""
    doomed = path.with_name(f".del-{path.name}-{os.getpid()}")
    path.rename(doomed)
    _sync(path.parent)
    _empty(doomed)


def _empty(folder: Path) -> None:
    """Remove a folder of files. No subfolder and no link is followed."""
    for member in list(folder.iterdir()):
        member.unlink()
    folder.rmdir()


def clean_leftovers(run_dir: Path) -> list[Path]:
    """Remove what saves and prunes that were killed have left, and return it. Only under the run lock. Raises OSError.

    Only real folders of our names (`.tmp-step_…`, `.del-step_…`) that hold no folder are touched.
    """
    removed = []
    for path in sorted(_members(_checkpoints(run_dir))):
        if not _LEFTOVER.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        if not any(member.is_dir() and not member.is_symlink() for member in path.iterdir()):
            _empty(path)
            removed.append(path)
    return removed


def _checkpoints(run_dir: Path, *, create: bool = False) -> Path:
    """The folder of checkpoints, really below the run folder (which may itself be reached through a link)."""
    folder = Path(run_dir).resolve() / "checkpoints"
    if folder.is_symlink():
        raise InputError(f"{folder}: is a symbolic link (want a folder; the run folder itself may be a link)")
    if create and not folder.is_dir():
        folder.mkdir(parents=True)
        _sync(folder.parent)
    return folder


def _members(folder: Path) -> list[Path]:
    """What is in the folder; nothing if there is none yet. Any other failure to look is an OSError."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _require_space(folder: Path, needed: int) -> None:
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free / 2**20:.0f} MiB are free, {needed / 2**20:.0f} MiB are needed")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- loading -------------------------------------------------------------------------------------------------


def newest_checkpoint(run_dir: Path, *, strict: bool = False, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None if the run has none yet.

    Args:
        strict: refuse when the newest one does not verify, instead of taking the one before.
        report: gets a line for each one that was skipped, and why.

    Raises:
        CheckpointError: no checkpoint verifies although there are some, or with `strict` the newest does not.
    """
    try:
        folder = _checkpoints(run_dir)
        candidates = _candidates(folder)
    except OSError as error:
        raise CheckpointError(f"{error.filename or run_dir}: {error.strerror}") from error
    skipped = []
    for path, step in candidates:
        try:
            checkpoint = load_checkpoint(path)
            if checkpoint.step != step:
                raise CheckpointError(f"{path}: holds step {checkpoint.step} (want the step of its name)")
        except CheckpointError as error:
            if strict:
                raise
            report(f"skipped a checkpoint: {error}")
            skipped.append(str(error))
        else:
            return checkpoint
    if skipped:
        raise CheckpointError(f"{folder}: no checkpoint of {len(skipped)} can be used (the newest: {skipped[0]})")
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint folder. Tensors are on the CPU.

    Raises:
        CheckpointError: a file is missing, unreadable, damaged, a link, or of another format; the line names it.
    """
    path = Path(path)
    try:
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a symbolic link (want the folder itself)")
        manifest = read_manifest(path)
        state = parse_json(path / STATE, read_file(path / STATE, manifest.files[STATE]))
        tensors = {
            Path(name).stem: read_tensors(path / name, facts) for name, facts in manifest.files.items() if name != STATE
        }
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror}") from error
    return Checkpoint(manifest.step, tensors, state)


def _candidates(folder: Path) -> list[tuple[Path, int]]:
    """Folders named like checkpoints with their steps, newest first, a replaced one after its successor."""
    found = [(path, match) for path in _members(folder) if (match := _STEP.fullmatch(path.name))]
    found.sort(key=lambda item: (-int(item[1][1]), item[1][2] is not None))
    return [(path, int(match[1])) for path, match in found]
