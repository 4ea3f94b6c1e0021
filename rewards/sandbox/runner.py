"""The supervisor: one process a completion, which forks once a test and never runs model code itself.

    judge ─ request ─▶ supervisor ─ fork ─▶ test: limits, layers, code        judge ◀─ raw bytes ─ supervisor

It is told the source first, then one request a frame; it learns no expectation and passes on what came out as it is.
Started as `python -P -s -S` with an environment of three variables, which is what -I means and keeps the hash seed.
Imports the standard library and its sister modules only (it stands on `sys.path` alone), and nothing that is slow to
import (json, typing, signal): its start is paid for every completion. Requests are marshal, as the judge is trusted;
answers are plain bytes, as nothing here is. Left out: comparing, scoring, and every guess about what output means.
"""

from __future__ import annotations

import marshal
import os
import resource
import select
import struct
import sys
import time

import calls
import confined
import namespace
import values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HEADER = struct.Struct(">I")
_ANSWER = struct.Struct(">BiIII")  # status (place in STATUSES), exit code, sizes of stdout, stderr, result
STATUSES = ("ended", "timeout", "output")
_RESULT = 3  # descriptor of the child on which results leave
STARTED = b"\x06"  # the first byte on _RESULT, written under all layers and before the code runs
_CHUNK = 1 << 16
_KILL_FOR_S = 2.0
_SIGKILL = 9


class Supervisor:
    """Holds what one job needs: source, limits, layers (names), the folder that tests may write to."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.source: str = job["source"]
        self.limits: dict[str, Any] = job["limits"]
        self.layers: list[str] = job["layers"]
        self.folder: str = job["folder"]
        self.num_tests = 0
        self.nobody = job["nobody"]
        if "seccomp" in self.layers:
            confined.check_architecture()
        if os.geteuid() == 0 and self.nobody >= 0:  # inside bwrap there is one user only
            os.setresuid(self.nobody, 0, 0)  # the kernel limits the processes of every real user but root
        if "namespaces" in self.layers:
            namespace.enter()
        confined.hide_memory()
        confined.adopt_orphans()
        self.ruleset = -1
        self.readable: list[str] = job["readable"]
        if "landlock" in self.layers:
            os.close(confined.landlock_ruleset(self.readable, []))  # the kernel has it, or this raises

    def answer(self, request: dict[str, Any]) -> bytes:
        """Run one test and say what came out: status, exit code, and the bytes of three descriptors."""
        self.num_tests += 1
        place = os.path.join(self.folder, f"t{self.num_tests}")  # noqa: PTH118
        os.mkdir(place)  # noqa: PTH102
        stdin = os.memfd_create("stdin")
        write_all(stdin, request["stdin"].encode("utf-8", "surrogatepass"))
        os.lseek(stdin, 0, os.SEEK_SET)
        pipes = [os.pipe() for _ in range(3)]
        pid = namespace.fork_first() if "namespaces" in self.layers else os.fork()
        if pid == 0:
            code = 97
            try:
                code = self.child(request, place, [stdin, *(write for _, write in pipes)])
            finally:
                os._exit(code)  # whatever happens, a child never runs on as the supervisor
        os.close(stdin)
        for _, write in pipes:
            os.close(write)
        return self.collect(pid, [read for read, _ in pipes])

    # --- in the child ---------------------------------------------------------------------------------------------

    def child(self, request: dict[str, Any], place: str, descriptors: list[int]) -> int:
        """Exit code of the test: 0 it ran to its end, 1 an exception. Without STARTED on 3 a layer was missing."""
        try:
            self.enclose(place, descriptors)
        except OSError as error:
            os.write(2, str(error).encode())
            return 1
        os.write(_RESULT, STARTED)
        try:
            return run(self.source, request)
        except SystemExit as error:
            return _exit_code(error)
        except BaseException as error:  # the boundary to model code
            return _told(error)
        finally:
            _finish()

    def enclose(self, place: str, descriptors: list[int]) -> None:
        """New session, descriptors 0 to 3 and no other, limits, layers; seccomp last, as it forbids the rest."""
        os.setsid()
        high = [os.dup(descriptor) for descriptor in descriptors if descriptor >= 0]
        for target, source in enumerate(high):
            os.dup2(source, target)
        os.closerange(_RESULT + 1, 1 << 20)
        os.chdir(place)
        confined.no_new_privs()
        if "landlock" in self.layers:
            ruleset = confined.landlock_ruleset(self.readable, [place, "/dev/null"])
            confined.restrict_files(ruleset)
            os.close(ruleset)
        self.limit()
        confined.drop_capabilities()
        if "seccomp" not in self.layers:
            confined.show_memory()  # the mark in its environment must be readable when the supervisor is lost
        confined.die_with_parent()
        if "seccomp" in self.layers:
            confined.restrict_calls()

    def limit(self) -> None:
        """Resource limits, soft = hard."""
        limits = self.limits
        for kind, value in (
            (resource.RLIMIT_AS, limits["memory_bytes"]),
            (resource.RLIMIT_CPU, int(limits["timeout_s"]) + 2),
            (resource.RLIMIT_FSIZE, limits["file_bytes"]),
            (resource.RLIMIT_NOFILE, limits["num_files"]),
            (resource.RLIMIT_NPROC, limits["num_processes"]),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))

    # --- in the supervisor ----------------------------------------------------------------------------------------

    def collect(self, pid: int, reads: list[int]) -> bytes:
        """Wait for the test, its deadline or too much output; end all that it started; then read what is left."""
        outputs: list[bytearray] = [bytearray() for _ in reads]
        status = self.watch(pid, reads, outputs)
        code = end(pid)
        end_descendants()
        for read, output in zip(reads, outputs, strict=True):
            os.set_blocking(read, False)  # no writer is left, so this ends; a descriptor that was passed on may not
            while len(output) <= self.limits["output_bytes"] and (chunk := _read(read)):
                output += chunk
            if len(output) > self.limits["output_bytes"]:
                status = "output"
            os.close(read)
        stdout, stderr, result = outputs
        most = self.limits["output_bytes"]
        parts = [bytes(stdout[:most]), bytes(stderr[-300:]), bytes(result[: most + 1])]
        return _ANSWER.pack(STATUSES.index(status), code, *map(len, parts)) + b"".join(parts)

    def watch(self, pid: int, reads: list[int], outputs: list[bytearray]) -> str:
        """Until the child ends ("ended"), its time is over ("timeout") or it wrote too much ("output")."""
        deadline = time.monotonic() + self.limits["timeout_s"]
        process = os.pidfd_open(pid)
        poll = select.poll()
        for descriptor in (0, process, *reads):
            poll.register(descriptor, select.POLLIN)
        try:
            while (left := deadline - time.monotonic()) > 0:
                ready = {descriptor for descriptor, _ in poll.poll(left * 1000)}
                if 0 in ready:  # nothing is sent while a test runs: the judge has gone
                    end(pid)
                    end_descendants()
                    os._exit(0)
                for read, output in zip(reads, outputs, strict=True):
                    if read in ready and not self.take(read, output):
                        poll.unregister(read)
                    if len(output) > self.limits["output_bytes"]:
                        return "output"
                if process in ready:
                    return "ended"
            return "timeout"
        finally:
            os.close(process)

    def take(self, read: int, output: bytearray) -> bool:
        """Read once; False at the end of the file."""
        chunk = os.read(read, _CHUNK)
        output += chunk
        return bool(chunk)


def run(source: str, request: dict[str, Any]) -> int:
    """Run the program; for a call, evaluate it then and send its value. In the child, under all layers."""
    call = request["call"]
    module = type(sys)("__main__" if call is None else "solution")
    sys.modules[module.__name__] = module
    sys.argv = ["solution.py"]
    exec(compile(source, "solution.py", "exec", dont_inherit=True), module.__dict__)  # the whole point of this process
    if call is not None:
        payload = values.dumps(calls.evaluate(call, module.__dict__)).encode()
        write_all(_RESULT, _HEADER.pack(len(payload)) + bytes.fromhex(request["nonce"]) + payload)
    return 0


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    return error.code & 0xFF if type(error.code) is int else 1


def _told(error: BaseException) -> int:
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException as another:  # an exception of the model's making, whose text raises
        text = f"{type(error).__name__} ({type(another).__name__} in its text)"
    os.write(2, text.encode("utf-8", "replace")[:300])
    return 1


def _finish() -> None:
    """What an interpreter does at its end, as far as programs rely on it: threads, atexit, flush."""
    threading = sys.modules.get("threading")
    if threading is not None:
        threading._shutdown()
    atexit = sys.modules.get("atexit")
    if atexit is not None:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()


def end(pid: int) -> int:
    """Kill the child and its process group, reap it; its exit code, negative for a signal."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, _SIGKILL)
        except ProcessLookupError:
            continue
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end_descendants() -> None:
    """Kill whatever the test started: orphans become children of this process, until there are none."""
    deadline = time.monotonic() + _KILL_FOR_S
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if time.monotonic() > deadline:
            os._exit(98)  # the judge ends what carries its mark
        for pid in children():
            try:
                os.kill(pid, _SIGKILL)
            except ProcessLookupError:
                continue


def children() -> list[int]:
    """Processes whose parent is this one, from /proc."""
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == os.getpid():
                found.append(int(name))
    return found


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, _CHUNK)
    except BlockingIOError:
        return b""


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def read_frame(descriptor: int) -> Any:
    """The next length-prefixed frame of the judge; None at the end of the stream."""
    header = read_exactly(descriptor, _HEADER.size)
    if header is None:
        return None
    body = read_exactly(descriptor, _HEADER.unpack(header)[0])
    return None if body is None else marshal.loads(body)


def read_exactly(descriptor: int, size: int) -> bytes | None:
    """`size` bytes; None when the stream ends before."""
    data = bytearray()
    while len(data) < size:
        chunk = os.read(descriptor, min(_CHUNK, size - len(data)))
        if not chunk:
            return None
        data += chunk
    return bytes(data)


def write_frame(descriptor: int, body: bytes) -> None:
    """One length-prefixed frame."""
    write_all(descriptor, _HEADER.pack(len(body)) + body)


def main() -> None:
    """Serve one job on descriptors 0 and 1 until the judge closes them."""
    job = read_frame(0)
    if job is None:
        return
    try:
        supervisor = Supervisor(job)
    except OSError as error:
        write_frame(1, str(error).encode())
        return
    write_frame(1, b"")
    while (request := read_frame(0)) is not None:
        write_frame(1, supervisor.answer(request))
