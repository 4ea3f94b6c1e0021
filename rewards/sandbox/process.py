"""The judge's side of the local tiers: start a supervisor, send it inputs, take what came out, leave nothing behind.

One supervisor a completion (`runner.py`); a request and its answer at a time, so that tests which were not run are
not in its memory either. Everything is waited for with a deadline, by poll(2): no SIGALRM, no thread. When the
supervisor does not answer, its session is killed, and everything that carries the mark of this call.
Left out: what is right (`rewards.code`).
"""

from __future__ import annotations

import contextlib
import marshal
import os
import secrets
import select
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rewards.sandbox.tiers import TIERS, Limits, Outcome, Request, SandboxError
from rewards.sandbox.values import NotPlainError, loads

_HEADER = struct.Struct(">I")
_ANSWER = struct.Struct(">BiIII")  # as in runner.py
_STATUSES = ("ended", "timeout", "output")
_CHUNK = 1 << 16
_START_S, _GRACE_S = 20.0, 4.0
_NOBODY = 65534
_HERE = Path(__file__).resolve().parent
_STARTED = b"\x06"  # what a test says first, under all layers (runner.py)
_MARK = "REWARDS_SANDBOX"


class SupervisorLostError(SandboxError):
    """The supervisor ended or fell silent: killed by the code where a tier lets it, or by the machine."""


class LocalSandbox:
    """A context: `run` answers one request. The tier is "process", "namespace", "confined" or "bubblewrap".

    Raises:
        SandboxError: a layer cannot be installed, or the supervisor was lost where code cannot reach it.
    """

    def __init__(self, tier: str, source: str, limits: Limits | None = None, prefix: tuple[str, ...] = ()) -> None:
        self.tier = tier
        self.source = source
        self.limits = limits or Limits()
        self.prefix = prefix
        self._deadline = time.monotonic() + self.limits.total_s
        self._supervisor: _Supervisor | None = None
        self._lost: str | None = None

    def __enter__(self) -> LocalSandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self, lost: bool = False) -> None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.close(lost)

    def run(self, request: Request) -> Outcome:
        """Run the program on one input; where code cannot end the supervisor, once more when that is lost."""
        reachable = self.tier in ("process", "namespace")
        for last in (False, True):
            if self._lost is not None:  # the code did that: a fault would let it choose to be masked
                return Outcome("error", detail=self._lost)
            if time.monotonic() >= self._deadline:
                return Outcome("timeout", detail=f"all tests together took {self.limits.total_s:g} s")
            try:
                if self._supervisor is None:
                    self._supervisor = _Supervisor(self.tier, self.source, self.limits, self.prefix)
                return self._supervisor.answer(request)
            except SupervisorLostError as error:
                self._close(lost=True)
                if reachable:
                    self._lost = str(error)
                elif last:
                    raise
        return Outcome("error", detail=str(self._lost))


class _Supervisor:
    def __init__(self, tier: str, source: str, limits: Limits, prefix: tuple[str, ...]) -> None:
        self.tier = tier
        self.limits, self.prefix = limits, prefix
        self.mark = secrets.token_hex(16)
        self.folder = tempfile.mkdtemp(prefix="rewards-")
        try:
            self.process = subprocess.Popen(
                [*(part.replace("{folder}", self.folder) for part in prefix), *command()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if prefix else subprocess.DEVNULL,
                cwd=self.folder,
                env={"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", _MARK: self.mark},
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            remove(self.folder)
            raise SandboxError(f"tier {tier}: cannot start {error.filename or sys.executable}: {error}") from error
        try:
            self._start(source)
        except BaseException:
            self.close()
            raise

    def _start(self, source: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self._to, self._from = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._to, False)
        limits = dict(vars(self.limits), num_processes=self.limits.num_processes + num_tasks())
        job = {"source": source, "limits": limits, "layers": TIERS[self.tier].layers, "folder": self.folder}
        deadline = time.monotonic() + _START_S
        try:
            self._send({**job, "readable": readable(), "nobody": -1 if self.prefix else _NOBODY}, deadline)
            answer = self._receive(deadline)
        except SupervisorLostError as error:
            said = self.process.stderr.read(500).decode("utf-8", "replace").strip() if self.process.stderr else ""
            raise SandboxError(f"tier {self.tier}: {said or error}") from error
        if answer:
            raise SandboxError(f"tier {self.tier}: {answer.decode('utf-8', 'replace')}")

    def answer(self, request: Request) -> Outcome:
        """Send one request and read its answer. Raises SupervisorLostError."""
        nonce = secrets.token_bytes(16)
        deadline = time.monotonic() + self.limits.timeout_s + _GRACE_S
        self._send({"stdin": request.stdin, "call": request.call, "nonce": nonce.hex()}, deadline)
        status, code, stdout, stderr, result = unpacked(self._receive(deadline))
        if not result.startswith(_STARTED):
            raise SandboxError(f"tier {self.tier}: a test did not start ({stderr or status})")
        if status != "ended":
            return Outcome(status, stdout, detail=stderr)
        if code != 0:
            return Outcome("error", stdout, detail=stderr or f"exit code {code}")
        if request.call is None:
            return Outcome("ok", stdout)
        try:
            return Outcome("ok", stdout, framed(result[len(_STARTED) :], nonce))
        except NotPlainError as error:
            return Outcome("forged", stdout, detail=str(error))

    # --- frames ---------------------------------------------------------------------------------------------------

    def _send(self, message: dict[str, Any], deadline: float) -> None:
        body = marshal.dumps(message)
        view = memoryview(_HEADER.pack(len(body)) + body)
        while view:
            self._wait(self._to, select.POLLOUT, deadline)
            try:
                view = view[os.write(self._to, view) :]
            except BrokenPipeError as error:
                raise SupervisorLostError("the supervisor has ended") from error

    def _receive(self, deadline: float) -> bytes:
        (size,) = _HEADER.unpack(self._read(_HEADER.size, deadline))
        if size > 3 * self.limits.output_bytes + 1000:
            raise SupervisorLostError(f"the supervisor announced {size} bytes")
        return self._read(size, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self._from, select.POLLIN, deadline)
            chunk = os.read(self._from, min(_CHUNK, size - len(data)))
            if not chunk:
                raise SupervisorLostError("the supervisor has ended")
            data += chunk
        return bytes(data)

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise SupervisorLostError("the supervisor did not answer in time")

    def close(self, lost: bool = False) -> None:
        """End the supervisor and all below it, and remove the folder."""
        process = self.process
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        try:
            clean = (
                not lost and process.wait(_GRACE_S) == 0
            )  # at the end of its input it ends, with all that it started
        except subprocess.TimeoutExpired:
            clean = False
        if not clean:
            kill_marked(process, self.mark)
        remove(self.folder)


def command() -> list[str]:
    """The interpreter as -I -S would start it, but for the hash seed, which -I would take away."""
    code = f"import sys; sys.path.insert(0, {str(_HERE)!r}); import runner; del sys.path[0]; "
    return [sys.executable, "-P", "-s", "-S", "-c", code + "sys.dont_write_bytecode = True; runner.main()"]


def readable() -> list[str]:
    """What an interpreter reads while it runs: its library, the system's shared libraries, time zones, randomness."""
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sysconfig.get_config_var("LIBDIR")]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/etc/localtime"]
    return [path for path in dict.fromkeys([*paths, *system, "/dev/null", "/dev/zero", "/dev/urandom"]) if path]


def num_tasks() -> int:
    """Processes and threads that the limit on processes counts already: those of this user, of nobody for root."""
    user, total = os.getuid() or _NOBODY, 0
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if place.stat().st_uid == user:
                    total += (place / "task").stat().st_nlink - 2
    return total


def unpacked(answer: bytes) -> tuple[str, int, str, str, bytes]:
    """Status, exit code, stdout, stderr and the result's bytes. Raises SupervisorLostError for another form."""
    try:
        place, code, *sizes = _ANSWER.unpack_from(answer)
        status = _STATUSES[place]
    except (struct.error, IndexError) as error:
        raise SupervisorLostError("the supervisor sent no answer") from error
    if len(answer) != _ANSWER.size + sum(sizes):
        raise SupervisorLostError("the supervisor sent no answer")
    middle, last = _ANSWER.size + sizes[0], _ANSWER.size + sizes[0] + sizes[1]
    stdout, stderr = (part.decode("utf-8", "replace") for part in (answer[_ANSWER.size : middle], answer[middle:last]))
    return status, code, stdout, stderr, answer[last:]


def framed(raw: bytes, nonce: bytes) -> Any:
    """The value in exactly one whole frame: length, nonce, text. Raises NotPlainError for anything else."""
    start = _HEADER.size + len(nonce)
    if len(raw) < start:
        raise NotPlainError("no result arrived")
    if raw[_HEADER.size : start] != nonce or _HEADER.unpack(raw[: _HEADER.size])[0] != len(raw) - start:
        raise NotPlainError("what arrived is not one result of this call")
    return loads(raw[start:])


def kill_marked(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kill the supervisor's session, then every process whose environment holds the mark, until there is none."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + _GRACE_S
    while (found := marked(mark)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def marked(mark: str) -> list[int]:
    """Processes that started with this call's mark in their environment."""
    found, needle = [], f"{_MARK}={mark}".encode()
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if needle in (place / "environ").read_bytes():
                    found.append(int(place.name))
    return found


def remove(folder: str) -> None:
    """Remove a folder that hostile code has written to: modes, depths and names of all kinds."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        for program in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*program, "--", folder], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if os.path.lexists(folder):
            raise SandboxError(f"{folder} cannot be removed") from None
