"""The worker's side of a pool: `python -m rewards.worker_main REQUEST_FD REPLY_FD`. Imports once, then answers.

The first frame says what to be: {"target", "init", "warmup", "memory_mb", "parent"}; the answer, id "ready", comes
when the target is imported and warm. Left out: anything that protects against deliberate attacks on the machine;
what runs here is the user's own function, and the pool's kill is what bounds it.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from rewards.worker_frames import HEADER, MAX_REPLY, decode, encode

_PR_SET_PDEATHSIG = 1


def load_target(name: str) -> Callable[..., Any]:
    """The callable that "module:function" names; dots after the colon go into objects."""
    import importlib

    module, _, path = name.partition(":")
    target: Any = importlib.import_module(module)
    for part in path.split("."):
        target = getattr(target, part)
    return target


def describe(error: BaseException) -> str:
    """Type and message of an exception in at most 500 characters; a `__str__` that raises is replaced.

    >>> describe(KeyError("x"))
    "KeyError: 'x'"
    """
    try:
        text = " ".join(str(error).split())
    except BaseException:  # the boundary to user code
        text = "(its message cannot be read)"
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def _read(fd: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(fd, min(count, 2**20))
        if not part:  # the pool is gone
            os._exit(0)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _read_frame(fd: int) -> Any:
    return decode(_read(fd, int.from_bytes(_read(fd, HEADER), "big")))


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _answer(request_id: str, action: Callable[[], Any]) -> bytes:
    """The frame with what `action` returns or raises; SystemExit and the like are errors as others are."""
    try:
        value = action()
    except BaseException as error:  # the boundary to user code
        return encode({"id": request_id, "error": describe(error)})
    try:
        frame = encode({"id": request_id, "value": value})
    except (TypeError, ValueError, RecursionError) as error:
        return encode({"id": request_id, "error": f"returned what JSON cannot hold: {describe(error)}"})
    if len(frame) - HEADER > MAX_REPLY:
        return encode({"id": request_id, "error": f"returned {len(frame)} bytes (want at most {MAX_REPLY})"})
    return frame


def _limit(memory_mb: int | None) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_mb is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20, memory_mb * 2**20))


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when the thread that started it ends (Linux only)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before that
            os._exit(0)


def _target_of(order: dict[str, Any]) -> Callable[..., Any]:
    target = load_target(order["target"])
    if order["init"] is not None:
        target = target(*order["init"])
    if order["warmup"] is not None:
        target(*order["warmup"])
    return target


def main(request_fd: int, reply_fd: int) -> None:
    """Serve until the pool closes its end."""
    for fd in (request_fd, reply_fd):
        os.set_inheritable(fd, False)  # a program that the target starts gets neither
    order = _read_frame(request_fd)
    if order["parent"] is not None:
        die_with(order["parent"])
    _limit(order["memory_mb"])
    found: list[Callable[..., Any]] = []
    _write(reply_fd, _answer("ready", lambda: found.append(_target_of(order))))
    if not found:
        return
    gc.freeze()  # what was imported is never garbage: collections stay short
    while True:
        request = _read_frame(request_fd)
        _write(reply_fd, _answer(request["id"], lambda r=request: found[0](*r["args"], **r["kwargs"])))  # type: ignore[misc]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
