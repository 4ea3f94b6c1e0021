"""HTTP to `vllm serve`: one `Server` per process and calls that can be broken off.

A call has its own connection: a rollout is a few hundred calls of many seconds. Breaking calls off closes their
sockets, upon which vLLM drops the requests. No proxies, no keys, no keep-alive.
Left out: asyncio. A call is a thread that waits on a socket.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from grpo.errors import InputError, clip

_CONNECT_S = 10.0
_CONTROL_S = 120.0  # loading an adapter, listing models

Result = TypeVar("Result")


class UnreachableError(Exception):
    """No answer: refused, broken off, or not in time."""


class BrokenOffError(Exception):
    """This side has broken the call off."""


class Calls:
    """The calls of one rollout, which end together: `break_off()` ends those that wait, and refuses new ones."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._ended = threading.Event()

    def add(self, sock: socket.socket) -> None:
        """A call begins. Raises BrokenOffError."""
        with self._lock:
            self.check()
            self._sockets.add(sock)

    def remove(self, sock: socket.socket) -> None:
        """A call has ended."""
        with self._lock:
            self._sockets.discard(sock)

    def check(self) -> None:
        """Raises BrokenOffError after `break_off()`."""
        if self._ended.is_set():
            raise BrokenOffError

    def wait(self, seconds: float) -> None:
        """Sleep. Raises BrokenOffError as soon as `break_off()` is called."""
        if self._ended.wait(seconds):
            raise BrokenOffError

    def break_off(self) -> None:
        """End every call that waits for its answer; its thread raises BrokenOffError."""
        with self._lock:
            self._ended.set()
            for sock in self._sockets:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:  # the other side was faster
                    continue


@dataclass(frozen=True)
class Reply:
    """An HTTP answer: status and body."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The body, read as JSON. Raises ValueError."""
        return json.loads(self.body)

    def __str__(self) -> str:
        return f"HTTP {self.status}: {clip(self.body.decode(errors='replace'), 200)}"


class Server:
    """One `vllm serve`.

    `alive` is false once it was found dead; `outstanding` counts its generate calls; `adapter` is the adapter that it
    was last given (guarded by `lock`); `max_length` is the longest sequence that it takes, None: not said.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"rollout.servers: {clip(url)} (want http://host:port)")
        self.url = url.rstrip("/")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/")
        self.alive = True
        self.outstanding = 0
        self.adapter: str | None = None
        self.max_length: int | None = None
        self.lock = threading.RLock()

    def call(
        self, method: str, path: str, body: Any = None, *, timeout_s: float = _CONTROL_S, calls: Calls | None = None
    ) -> Reply:
        """One request, `body` sent as JSON. `timeout_s` bounds each wait of the socket: an answer comes in one piece.

        Raises:
            UnreachableError: no answer.
            BrokenOffError: `calls` was broken off.
        """
        calls = calls or Calls()
        calls.check()
        connection = self._kind(self._host, self._port, timeout=min(_CONNECT_S, timeout_s))
        try:
            return self._exchange(connection, method, path, body, timeout_s, calls)
        except (OSError, http.client.HTTPException) as error:
            calls.check()
            what = f"no answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else _named(error)
            raise UnreachableError(what) from error
        finally:
            connection.close()

    def _exchange(self, connection: Any, method: str, path: str, body: Any, timeout_s: float, calls: Calls) -> Reply:
        connection.connect()
        sock = connection.sock
        sock.settimeout(timeout_s)
        calls.add(sock)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self._path + path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return Reply(response.status, response.read())
        finally:
            calls.remove(sock)

    def is_healthy(self, calls: Calls | None = None) -> bool:
        """Whether GET /health says so, within seconds."""
        try:
            return self.call("GET", "/health", timeout_s=_CONNECT_S, calls=calls).status == 200
        except UnreachableError:
            return False


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {clip(error)}" if str(error) else type(error).__name__


# --- many calls ------------------------------------------------------------------------------------------------------


def in_parallel(
    jobs: Sequence[Callable[[], Result]],
    num_threads: int,
    calls: Calls,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Results in the order of `jobs`. The first exception, also Ctrl-C, breaks the other calls off, waits until their
    threads have ended, and passes on. `progress(done, total)` is called in this thread."""
    if not jobs:
        return []
    executor = ThreadPoolExecutor(min(num_threads, len(jobs)), thread_name_prefix="rollout-server")
    finished = False
    try:
        futures = [executor.submit(job) for job in jobs]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            if progress is not None:
                progress(done, len(jobs))
        finished = True
        return [future.result() for future in futures]
    finally:
        if not finished:
            calls.break_off()
        executor.shutdown(wait=True, cancel_futures=True)
