"""Calls of a reward function in a forked copy of this process, that can be killed: a loop costs seconds, not the check.

The copy has the function as it is (a lambda, a closure, an object), makes the calls and sends numbers and words back as
JSON; nothing that it sends is unpickled. After a kill the next call gets a new copy, with the state of the original.
Left out: Windows, which has no fork, and functions that need a GPU or the threads of a library that this process has
started (torch after its first large product): call those in this process (`in_process`), without a limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from rewards.worker_main import die_with

_HEADER = struct.Struct("<Q")
MAX_REPLY = 1 << 26


class Hang(Exception):  # noqa: N818 (what happened, not an error of ours)
    """No answer within the limit; the copy was killed."""


class Death(Exception):  # noqa: N818
    """The copy ended by itself, in words."""


class Fork:
    """`call` in a copy of this process: `fork(request)` sends one argument, and returns the JSON value of the answer.

    Args:
        call: from one argument (pickled on the way there) to a JSON value.
        timeout_s: seconds that one call may take.

    >>> fork = Fork(lambda number: number + 1, timeout_s=5.0)
    >>> fork(2), fork.close()
    (3, None)
    """

    def __init__(self, call: Callable[[Any], Any], timeout_s: float) -> None:
        if not hasattr(os, "fork"):
            raise ValueError("check: a time limit needs os.fork, which this system lacks (want timeout_s=None)")
        self.call, self.timeout_s = call, timeout_s
        self._pid = 0
        self._out = self._in = -1

    def __call__(self, request: Any) -> Any:
        """Raises `Hang` or `Death`; the next call starts a new copy."""
        if not self._pid:
            self._start()
        deadline = time.monotonic() + self.timeout_s
        try:
            data = pickle.dumps(request)
            self._send(_HEADER.pack(len(data)) + data, deadline)
            (size,) = _HEADER.unpack(self._receive(_HEADER.size, deadline))
            if size > MAX_REPLY:
                raise Death(f"sent {size} bytes")
            return json.loads(self._receive(size, deadline))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the copy and every process that it started in its group, and reap it."""
        if not self._pid:
            return
        os.close(self._out)
        os.close(self._in)
        for kill in (os.killpg, os.kill):  # the group is there as soon as the copy has made it
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._pid = 0

    def _start(self) -> None:
        parent = os.getpid()
        request_out, request_in = os.pipe()
        reply_out, reply_in = os.pipe()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # or the copy would print it again
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: see the top of the file
            pid = os.fork()
        if pid == 0:
            os.close(request_in)
            os.close(reply_out)
            _serve(self.call, request_out, reply_in, parent)
        os.close(request_out)
        os.close(reply_in)
        os.set_blocking(request_in, False)
        self._pid, self._in, self._out = pid, request_in, reply_out

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            _wait(self._in, deadline, writing=True)
            try:
                view = view[os.write(self._in, view) :]
            except BrokenPipeError:
                raise Death(self._ending()) from None

    def _receive(self, size: int, deadline: float) -> bytes:
        received = bytearray()
        while len(received) < size:
            _wait(self._out, deadline, writing=False)
            chunk = os.read(self._out, min(size - len(received), 1 << 20))
            if not chunk:
                raise Death(self._ending())
            received += chunk
        return bytes(received)

    def _ending(self) -> str:
        """How the copy ended. It has closed its pipe; it may still run when the function closed that."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid == 0:
            time.sleep(0.1)
            pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid == 0:
            return "closed its pipe"
        os.close(self._out)
        os.close(self._in)
        self._pid = 0
        code = os.waitstatus_to_exitcode(status)
        return f"ended its process with exit code {code}" if code >= 0 else f"died of {signal.Signals(-code).name}"


def _wait(fd: int, deadline: float, *, writing: bool) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT if writing else select.POLLIN)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(left * 1000):
        raise Hang


def _serve(call: Callable[[Any], Any], request_fd: int, reply_fd: int, parent: int) -> None:
    """The copy: one call after another, until the other side closes its end. Never returns."""
    code = 1
    try:
        os.setsid()
        die_with(parent)
        while True:
            header = _read(request_fd, _HEADER.size)
            if header is None:
                code = 0
                break
            body = _read(request_fd, _HEADER.unpack(header)[0])
            answer = json.dumps(call(pickle.loads(body or b""))).encode()  # what this very process' original wrote
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            view = memoryview(_HEADER.pack(len(answer)) + answer)
            while view:
                view = view[os.write(reply_fd, view) :]
    finally:
        os._exit(code)  # nothing of the original's is to run at the end: no handlers, no buffers


def _read(fd: int, size: int) -> bytes | None:
    received = b""
    while len(received) < size:
        chunk = os.read(fd, size - len(received))
        if not chunk:
            return None
        received += chunk
    return received
