"""The tier `remote`: each test is one HTTP POST to a sandbox service; an outage is an exception, never a score.

    piston:        POST {language, version, files: [{content}], stdin, run_timeout (ms)} → {run: {stdout, code, signal}}
    sandboxfusion: POST {language, code, stdin, run_timeout (s)} → {status, run_result: {status, return_code, stdout}}

Sources: the HTTP APIs of Piston (/api/v2/execute) and SandboxFusion (/run_code). The service gets code and inputs,
never expectations. A call's value comes back inside stdout, in one frame with a nonce. The deadline holds for the
whole exchange, byte by byte, and the answer's size is limited; only the look-up of the host's name has no deadline.
Left out: retries (a fault says enough), E2B's session API, proxies, redirects.
"""

from __future__ import annotations

import http.client
import io
import json
import secrets
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from rewards.sandbox.tiers import Limits, Outcome, Request, SandboxError
from rewards.sandbox.values import NotPlainError, loads

_GRACE_S = 10.0
_CHUNK = 1 << 16


class RemoteSandbox:
    """A context like `LocalSandbox`; `service` is "piston" or "sandboxfusion", `headers` e.g. hold a token.

    Raises:
        SandboxError: no connection, a status other than 200, an answer that is late, too large or not as documented.
    """

    def __init__(
        self,
        url: str,
        source: str,
        limits: Limits | None = None,
        service: str = "piston",
        headers: dict[str, str] | None = None,
    ) -> None:
        if service not in _SERVICES:
            raise SandboxError(f"tier remote: service {service!r} (want one of {', '.join(_SERVICES)})")
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise SandboxError(f"tier remote: {url!r} is no http or https address")
        self.url, self.source, self.headers = url, source, headers or {}
        self.limits = limits or Limits()
        self._body, self._outcome = _SERVICES[service]
        self._deadline = time.monotonic() + self.limits.total_s

    def __enter__(self) -> RemoteSandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is kept between requests."""

    def run(self, request: Request) -> Outcome:
        """Run the program on one input. Raises SandboxError."""
        if time.monotonic() >= self._deadline:
            return Outcome("timeout", detail=f"all tests together took {self.limits.total_s:g} s")
        nonce = secrets.token_hex(16)
        program = self.source if request.call is None else with_call(self.source, request.call, nonce)
        body = json.dumps(self._body(program, request.stdin, self.limits.timeout_s)).encode()
        limit = 20 * self.limits.output_bytes + 100_000
        answer = post(self.url, body, self.headers, self.limits.timeout_s + _GRACE_S, limit)
        try:
            outcome = self._outcome(answer)
        except (KeyError, TypeError, AttributeError) as error:
            raise SandboxError(f"tier remote: {self.url} answered in another form ({error!r})") from error
        if len(outcome.stdout) > self.limits.output_bytes:
            return Outcome("output")
        return outcome if request.call is None or outcome.status != "ok" else _value(outcome, nonce)


def with_call(source: str, call: Any, nonce: str) -> str:
    """A program that runs `source` as a module, then prints one frame with the value of `call`."""
    folder = Path(__file__).resolve().parent
    values = (folder / "values.py").read_text(encoding="utf-8")
    evaluate = (folder / "calls.py").read_text(encoding="utf-8").partition("# ---\n")[2]
    return (
        f"{values}\n{evaluate}\n_names = {{'__name__': 'solution'}}\n"
        f"exec(compile({source!r}, 'solution.py', 'exec', dont_inherit=True), _names)\n"
        f"print('\\n{nonce}' + dumps(evaluate({call!r}, _names)) + '{nonce}')\n"
    )


def _value(outcome: Outcome, nonce: str) -> Outcome:
    before, *framed = outcome.stdout.split(nonce)
    if len(framed) != 2 or framed[1].strip():
        return Outcome("forged", before, detail="not exactly one result arrived, as the last output")
    try:
        return Outcome("ok", before, loads(framed[0]))
    except NotPlainError as error:
        return Outcome("forged", before, detail=str(error))


# --- services ----------------------------------------------------------------------------------------------------


def _piston_body(program: str, stdin: str, timeout_s: float) -> dict[str, Any]:
    files = [{"name": "main.py", "content": program}]
    return {"language": "python", "version": "*", "files": files, "stdin": stdin, "run_timeout": int(timeout_s * 1000)}


def _piston_outcome(answer: dict[str, Any]) -> Outcome:
    ran = answer["run"]
    stdout, code, signal = _text(ran["stdout"]), ran["code"], ran.get("signal")
    if signal or ran.get("status") == "TO":
        return Outcome("timeout" if signal == "SIGKILL" else "error", stdout, detail=f"signal {signal}")
    return Outcome("ok", stdout) if code == 0 else Outcome("error", stdout, detail=f"exit code {code}")


def _fusion_body(program: str, stdin: str, timeout_s: float) -> dict[str, Any]:
    return {"language": "python", "code": program, "stdin": stdin, "run_timeout": timeout_s}


def _fusion_outcome(answer: dict[str, Any]) -> Outcome:
    if answer["status"] not in ("Success", "Failed"):
        raise SandboxError(f"tier remote: the service reports {answer['status']!r}")
    ran = answer["run_result"]
    stdout = _text(ran["stdout"])
    if ran["status"] == "TimeLimitExceeded":
        return Outcome("timeout", stdout)
    if ran["status"] != "Finished":
        raise SandboxError(f"tier remote: the service reports {ran['status']!r}")
    code = ran["return_code"]
    return Outcome("ok", stdout) if code == 0 else Outcome("error", stdout, detail=f"exit code {code}")


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"stdout is {type(value).__name__}")
    return value


_SERVICES: dict[str, tuple[Callable[[str, str, float], dict[str, Any]], Callable[[dict[str, Any]], Outcome]]] = {
    "piston": (_piston_body, _piston_outcome),
    "sandboxfusion": (_fusion_body, _fusion_outcome),
}


# --- HTTP with one deadline ----------------------------------------------------------------------------------------


def post(url: str, body: bytes, headers: dict[str, str], timeout_s: float, max_bytes: int) -> dict[str, Any]:
    """The JSON object that a POST is answered with. Raises SandboxError for anything else, or when time runs out."""
    try:
        raw = _exchange(url, body, headers, time.monotonic() + timeout_s, max_bytes)
        response = http.client.HTTPResponse(_Received(raw))  # type: ignore[arg-type]
        response.begin()
        answer = json.loads(response.read()) if response.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        raise SandboxError(f"tier remote: {url}: {type(error).__name__}: {error}") from error
    if type(answer) is not dict:
        raise SandboxError(f"tier remote: {url} answered {response.status} {response.reason}, no JSON object")
    return answer


class _Received:
    """A socket as HTTPResponse wants one, over bytes that have arrived."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self.raw)


def _exchange(url: str, body: bytes, headers: dict[str, str], deadline: float, max_bytes: int) -> bytes:
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    fields = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": "application/json", **headers}
    fields |= {"Content-Length": str(len(body)), "Connection": "close"}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    address = (str(parts.hostname), parts.port or (443 if secure else 80))
    with socket.create_connection(address, timeout=_left(deadline)) as plain:
        wire = ssl.create_default_context().wrap_socket(plain, server_hostname=address[0]) if secure else plain
        with wire:
            wire.settimeout(_left(deadline))
            wire.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)
            received = bytearray()
            while True:
                wire.settimeout(_left(deadline))
                chunk = wire.recv(_CHUNK)
                received += chunk
                if not chunk:
                    return bytes(received)
                if len(received) > max_bytes:
                    raise ValueError(f"answered with more than {max_bytes} bytes")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no complete answer in time")
    return left
