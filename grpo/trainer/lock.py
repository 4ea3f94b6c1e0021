"""The run lock: one process per run folder, for the life of the run.

`flock` on `run.lock`; the kernel releases it however the holder ends. The file says who holds it (pid, host, run id)
and stays when the run is over. Left out: network file systems (flock does not hold between hosts there: keep run
folders on a local one) and Windows.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from grpo.errors import InputError, clip

RUN_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,100}")
_WAIT_FOR_NAME = 1.0  # seconds in which a new holder has surely written who it is


class RunLock:
    """Holds `run_dir` while entered: `with RunLock(run_dir, run_id): …`.

    Raises:
        InputError: on entering, when another process (or another lock of this one) holds the folder: one line that
            names it; the folder is missing or cannot be locked; `run_id` is not `[A-Za-z0-9._-]{1,100}`.
    """

    def __init__(self, run_dir: Path, run_id: str) -> None:
        if not RUN_NAME.fullmatch(run_id):
            raise InputError(f"run id {run_id!r}: has other characters than A-Z a-z 0-9 . _ - (want 1 to 100 of those)")
        self.path = Path(run_dir) / "run.lock"
        self._run_id = run_id
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror} (want a run folder that can be locked)") from error
        try:
            self._take(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            with suppress(OSError):  # the name is a courtesy, the lock is the descriptor
                os.ftruncate(self._descriptor, 0)
            self._close()

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise InputError(f"{self.path}: {error.strerror} (want a local file system, with flock)") from error
            raise InputError(f"{self.path.parent}: {_holder(descriptor)} (want another output_dir)") from None
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "run_id": self._run_id}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror} (want a run folder that can be written)") from error

    def _close(self) -> None:
        """Give up this process's hold. Not LOCK_UN: in a forked child that would unlock the parent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self)


def _holder(descriptor: int) -> str:
    """Who holds the lock, in words. The name is written just after the lock is taken, so it is waited for."""
    deadline = time.monotonic() + _WAIT_FOR_NAME
    while time.monotonic() < deadline:
        holder = _read_holder(descriptor)
        if holder is not None:
            return f"in use by pid {holder['pid']} on {holder['host']}, run {holder['run_id']}"
        time.sleep(0.01)
    return "in use by another process"


def _read_holder(descriptor: int) -> dict[str, Any] | None:
    """The name in the file; None while it is unfinished or that of a holder which was killed."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        pid, host, run_id = int(holder["pid"]), holder["host"], holder["run_id"]
    except (ValueError, TypeError, KeyError):
        return None
    if not (0 < pid < 2**31 and isinstance(host, str) and isinstance(run_id, str) and RUN_NAME.fullmatch(run_id)):
        return None
    here = host == socket.gethostname()
    return None if here and not _alive(pid) else {"pid": pid, "host": clip(host), "run_id": run_id}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _forget_in_child() -> None:
    """A forked child (a reward worker, say) must not keep the folder locked when it outlives the run."""
    for lock in list(_held):
        lock._close()


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()
os.register_at_fork(after_in_child=_forget_in_child)
