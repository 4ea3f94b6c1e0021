"""Persistent worker processes that can be killed: a call that hangs, dies or lies costs its own answer only.

    with Pool("my.module:check", timeout=2.0) as pool:
        pool.call(["1/2", "0.5"])

Source: timeouts by signal clear other people's alarms and fail off the main thread (trl#5281, Math-Verify#50,
verl#5635); a thread that timed out runs on, holding memory (AReaL#1426). So: a process of its own, started by
`python -m rewards.worker_main` (nothing re-imports the user's script), in its own session and process group, with
CUDA_VISIBLE_DEVICES empty, an environment from an allowlist, RLIMIT_AS, its output in a capped log and its temporary
files in a folder that goes with it. The parent waits in poll() with a deadline; on expiry it sends SIGKILL to the
group, reaps it and goes on with a worker that is warm already. Standard library only.
Left out: protection of the machine from hostile code (a worker may read files and open sockets); a process that leaves
its group on purpose (setsid) is not found again; the temporary folder when this process is ended by SIGKILL (its
workers end with it); use by several threads at once.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.worker_frames import HEADER, MAX_REPLY, check_reply, decode, encode

ALLOWED_ENVIRONMENT = ("PATH", "HOME", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
"""Variables that a worker inherits; `Pool(environment=…)` adds to them."""
LOG_BYTES = 16 * 1024
_CHUNK = 64 * 1024
_LOOK = 0.05  # s between looks at processes that may have died with their pipe still held open by a child


class WorkerFault(RuntimeError):  # noqa: N818  a fault, as in rewards
    """A call has no answer."""


class WorkerTimeout(WorkerFault):
    """No answer within the limit; the worker was killed."""


class WorkerDied(WorkerFault):
    """The worker ended, twice, or sent what is no answer; it was killed."""


class WorkerError(WorkerFault):
    """The function raised, or returned what JSON cannot hold; the text is that of the exception. The worker lives."""


@dataclass(frozen=True)
class Outcome:
    """What came of one call: `value`, or `error`. `seconds` from sending it to the answer or the kill."""

    value: Any = None
    error: WorkerFault | None = None
    seconds: float = 0.0


@dataclass
class _Job:
    place: int
    id: str
    frame: bytes
    died: int = 0


# --- one process ---------------------------------------------------------------------------------------------


class _Worker:
    """One process and the parent's ends of its three pipes."""

    def __init__(self, order: Mapping[str, Any], environment: Mapping[str, str], start_timeout: float) -> None:
        self.folder = tempfile.mkdtemp(prefix="rewards-worker-")
        request_out, self.requests = os.pipe()
        self.replies, reply_in = os.pipe()
        self.output, output_in = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-m", "rewards.worker_main", str(request_out), str(reply_in)],
                stdin=subprocess.DEVNULL, stdout=output_in, stderr=output_in, pass_fds=(request_out, reply_in),
                start_new_session=True, env={**environment, "TMPDIR": self.folder},
            )  # fmt: skip
        except BaseException:
            self._release()
            raise
        finally:
            for fd in (request_out, reply_in, output_in):
                os.close(fd)
        for fd in (self.requests, self.replies, self.output):
            os.set_blocking(fd, False)
        self.job: _Job | None = None
        self.ready = False
        self.talks = True
        self.log = bytearray()  # the last LOG_BYTES of what it printed
        self.incoming = bytearray()
        self.started = time.monotonic()
        self.deadline = self.started + start_timeout
        self.outgoing = memoryview(encode(dict(order)))
        self.write()

    def submit(self, job: _Job, timeout: float) -> None:
        self.job = job
        self.started = time.monotonic()
        self.deadline = self.started + timeout
        self.outgoing = memoryview(job.frame)
        self.write()

    def write(self) -> None:
        try:
            while self.outgoing:
                self.outgoing = self.outgoing[os.write(self.requests, self.outgoing) :]
        except BlockingIOError:
            pass  # the rest when poll() says so
        except BrokenPipeError:
            self.outgoing = self.outgoing[:0]  # seen as the end of its replies

    def read_output(self) -> None:
        """Keep the end of what it has printed."""
        with suppress(BlockingIOError):
            data = os.read(self.output, _CHUNK)
            self.talks = bool(data)  # or has closed its end, which poll() would report for ever
            self.log += data
            del self.log[:-LOG_BYTES]

    def read_reply(self) -> bytes | None:
        """The body of its reply when it is whole.

        Raises:
            EOFError: the pipe has ended.
            ValueError: longer than a reply may be, or more than one reply.
        """
        with suppress(BlockingIOError):
            while len(self.incoming) <= HEADER + MAX_REPLY:
                data = os.read(self.replies, _CHUNK)
                if not data:
                    raise EOFError
                self.incoming += data
                if len(data) < _CHUNK:
                    break
        size = int.from_bytes(self.incoming[:HEADER], "big") if len(self.incoming) >= HEADER else 0
        if size > MAX_REPLY:
            raise ValueError(f"a reply of {size} bytes")
        if len(self.incoming) < HEADER or len(self.incoming) < HEADER + size:
            return None
        if len(self.incoming) > HEADER + size:
            raise ValueError("more than one reply")
        body, self.incoming = bytes(self.incoming[HEADER:]), bytearray()
        return body

    def is_quiet(self) -> bool:
        """Whether an idle worker lives and has said nothing unasked. What it printed meanwhile is taken in."""
        self.read_output()
        try:
            os.read(self.replies, 1)
        except BlockingIOError:
            return not self.has_exited()
        return False  # it spoke, or closed its end

    def has_exited(self) -> bool:
        """Whether it has ended, without reaping it: until then its process group is surely its own."""
        if self.process.returncode is not None:
            return True
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, flags) is not None

    def last_words(self) -> str:
        self.read_output()
        lines = self.log.decode("utf-8", "replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" (last output: {said[:200]})" if said else ""

    def kill(self) -> int:
        """End the whole group, reap it, release what it held. Returns the exit code."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self._release()
        return code

    def _release(self) -> None:
        for fd in (self.requests, self.replies, self.output):
            with suppress(OSError):
                os.close(fd)
        shutil.rmtree(self.folder, ignore_errors=True)


# --- several -------------------------------------------------------------------------------------------------


@dataclass
class _Crew:
    """The workers, apart from the pool so that its finalizer can end them."""

    workers: list[_Worker] = field(default_factory=list)
    owner: int = field(default_factory=os.getpid)

    def dismiss_all(self) -> None:
        if os.getpid() == self.owner:  # not in a forked child
            while self.workers:
                self.workers.pop().kill()


class Pool:
    """Workers that call one function, and a spare that is warm when one has to be killed.

    Args:
        target: "module:function", importable in a fresh interpreter with this one's `sys.path`; called with JSON
            values, returns a JSON value.
        timeout: seconds that one call may take, once a worker is ready for it.
        size: calls that run at the same time.
        spare: keep one more worker than that.
        memory_mb: MiB of address space of a worker (RLIMIT_AS); None: not limited.
        init: when given, `target(*init)` is called once in each worker and what it returns is the function.
        warmup: arguments of one call that each worker makes before it counts as ready.
        environment: names of variables that workers inherit besides `ALLOWED_ENVIRONMENT`.

    Attributes:
        start_timeout: seconds that importing and warming up may take.

    Workers start in the background now, so that a first call soon after waits for less.

    Raises:
        ValueError: `target` is no "module:function", or a number makes no sense.

    >>> with Pool("math:sqrt", timeout=10) as pool:
    ...     pool.map([[4], [-1]])
    [2.0, WorkerError('ValueError: math domain error')]
    """

    start_timeout = 120.0

    def __init__(
        self, target: str, *, timeout: float, size: int = 1, spare: bool = True, memory_mb: int | None = 4096,
        init: Sequence[Any] | None = None, warmup: Sequence[Any] | None = None, environment: Sequence[str] = (),
    ) -> None:  # fmt: skip
        if target.count(":") != 1 or not all(target.split(":")):
            raise ValueError(f'target is {target!r} (want "module:function")')
        if not timeout > 0 or size < 1 or (memory_mb is not None and memory_mb < 1):
            raise ValueError(f"timeout {timeout}, size {size}, memory_mb {memory_mb}: want positive numbers")
        self.target = target
        self.timeout = timeout
        self.size = size
        self.memory_mb = memory_mb
        self._want = size + (1 if spare else 0)
        self._init = None if init is None else list(init)
        self._warmup = None if warmup is None else list(warmup)
        self._environment = _environment(environment)
        self._crew = _Crew()
        self._closed = False
        self._finalizer = weakref.finalize(self, self._crew.dismiss_all)
        self._hire()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every worker and release what it held. A closed pool answers no more."""
        self._closed = True
        self._finalizer()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, each also the id of its process group."""
        return [worker.process.pid for worker in self._crew.workers]

    def wait_ready(self) -> None:
        """Wait until a worker has imported the function and is warm.

        Raises:
            WorkerFault: none could, with the reason.
        """
        self._hire()
        failed = None
        while not any(worker.ready for worker in self._crew.workers):
            if not self._crew.workers:
                raise failed or WorkerDied(f"{self.target}: no worker starts")
            failed = self._step({}) or failed

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
        """What the function returns for these arguments.

        Raises:
            WorkerTimeout, WorkerDied, WorkerError: it has no answer.
            TypeError, ValueError: the arguments are no JSON values (NaN is none).
        """
        [outcome] = self.run([(args, kwargs or {})])
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def map(self, calls: Sequence[Sequence[Any]]) -> list[Any]:
        """`call(args)` for each, `size` at a time, in order; a call without an answer gives its `WorkerFault`."""
        outcomes = self.run([(args, {}) for args in calls])
        return [outcome.value if outcome.error is None else outcome.error for outcome in outcomes]

    def run(self, calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]]) -> list[Outcome]:
        """`(args, kwargs)` of each call -> its outcome, in order, `size` of them at a time.

        Raises:
            TypeError, ValueError: arguments are no JSON values; nothing was called.
        """
        if self._closed:
            raise ValueError(f"{self.target}: the pool is closed")
        waiting = deque(_job(place, args, kwargs) for place, (args, kwargs) in enumerate(calls))
        outcomes: dict[int, Outcome] = {}
        try:
            while len(outcomes) < len(calls):
                self._hire_if_short()
                self._assign(waiting)
                failed = self._step(outcomes, waiting)
                if failed is not None and not any(w.ready for w in self._crew.workers):
                    outcomes |= {job.place: Outcome(error=failed) for job in waiting}
                    waiting.clear()
        finally:
            for worker in [worker for worker in self._crew.workers if worker.job is not None]:  # interrupted
                self._dismiss(worker)
            self._hire()
        return [outcomes[place] for place in range(len(calls))]

    # --- staff ---

    def _hire(self) -> None:
        """Start workers up to the wanted number."""
        while not self._closed and len(self._crew.workers) < self._want:
            main_thread = threading.current_thread() is threading.main_thread()
            order = {
                "target": self.target, "init": self._init, "warmup": self._warmup, "memory_mb": self.memory_mb,
                "parent": os.getpid() if main_thread else None,  # the kernel watches the thread, not the process
            }  # fmt: skip
            self._crew.workers.append(_Worker(order, self._environment, self.start_timeout))

    def _hire_if_short(self) -> None:
        if not self._crew.workers:
            self._hire()

    def _dismiss(self, worker: _Worker) -> int:
        self._crew.workers.remove(worker)
        return worker.kill()

    def _assign(self, waiting: deque[_Job]) -> None:
        workers = self._crew.workers
        free = self.size - sum(worker.job is not None for worker in workers)
        for worker in [each for each in workers if each.ready and each.job is None]:
            if not waiting or free <= 0:
                return
            if not worker.is_quiet():  # it died or spoke since its last answer
                self._dismiss(worker)
                self._hire()
                continue
            worker.submit(waiting.popleft(), self.timeout)
            free -= 1

    # --- one round of waiting ---

    def _step(self, outcomes: dict[int, Outcome], waiting: deque[_Job] | None = None) -> WorkerFault | None:
        """Wait for the next event and deal with it. Returns why a worker could not start, if that was it."""
        active = [worker for worker in self._crew.workers if worker.job is not None or not worker.ready]
        poller, owner = select.poll(), dict[int, _Worker]()
        for worker in active:
            poller.register(worker.replies, select.POLLIN)
            if worker.talks:
                poller.register(worker.output, select.POLLIN)
                owner[worker.output] = worker
            if worker.outgoing:
                poller.register(worker.requests, select.POLLOUT)
        if active:
            left = min(worker.deadline for worker in active) - time.monotonic()
            for fd, _ in poller.poll(max(0.0, min(left, _LOOK)) * 1000):
                if fd in owner:
                    owner[fd].read_output()
        failed = None
        for worker in active:
            failed = self._attend(worker, outcomes, waiting) or failed
        return failed

    def _attend(self, worker: _Worker, outcomes: dict[int, Outcome], waiting: deque[_Job] | None) -> WorkerFault | None:
        if worker.outgoing:
            worker.write()
        gone = worker.has_exited() if time.monotonic() - worker.started > _LOOK else False  # before the last read
        try:
            body = worker.read_reply()
            if body is not None:
                return self._answered(worker, body, outcomes)
            if gone:
                raise EOFError
        except EOFError:
            return self._ended(worker, outcomes, waiting)
        except ValueError as error:
            words = worker.last_words()
            self._dismiss(worker)
            return self._failed(worker, WorkerDied(f"{self.target}: the worker sent {error}{words}"), outcomes)
        if time.monotonic() < worker.deadline:
            return None
        self._dismiss(worker)
        limit = self.timeout if worker.ready else self.start_timeout
        what = "no answer" if worker.ready else "not started"
        return self._failed(worker, WorkerTimeout(f"{self.target}: {what} within {limit:g} s (killed)"), outcomes)

    def _answered(self, worker: _Worker, body: bytes, outcomes: dict[int, Outcome]) -> WorkerFault | None:
        job = worker.job
        reply = check_reply(decode(body), "ready" if job is None else job.id)
        error = WorkerError(reply["error"]) if "error" in reply else None
        if job is None:
            worker.ready = error is None
            if error is None:
                return None
            self._dismiss(worker)
            return error
        worker.job = None
        outcomes[job.place] = Outcome(reply.get("value"), error, time.monotonic() - worker.started)
        return None

    def _ended(self, worker: _Worker, outcomes: dict[int, Outcome], waiting: deque[_Job] | None) -> WorkerFault | None:
        words = worker.last_words()
        code = self._dismiss(worker)
        if worker.job is not None and waiting is not None:
            worker.job.died += 1
            if worker.job.died < 2:
                waiting.appendleft(worker.job)
                self._hire()
                return None
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return self._failed(worker, WorkerDied(f"{self.target}: the worker ended with {how}{words}"), outcomes)

    def _failed(self, worker: _Worker, fault: WorkerFault, outcomes: dict[int, Outcome]) -> WorkerFault | None:
        """Record a fault of a call, and replace its worker at once; a fault at the start is the caller's."""
        if worker.job is None:
            return fault
        outcomes[worker.job.place] = Outcome(error=fault, seconds=time.monotonic() - worker.started)
        self._hire()
        return None


def _job(place: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Job:
    request_id = secrets.token_hex(8)  # an answer prepared before the question cannot carry it
    return _Job(place, request_id, encode({"id": request_id, "args": list(args), "kwargs": dict(kwargs)}))


def _environment(extra: Sequence[str]) -> dict[str, str]:
    names = (*ALLOWED_ENVIRONMENT, *extra)
    home = str(Path(__file__).resolve().parent.parent)
    path = [str(Path(entry).resolve()) for entry in sys.path]
    return {name: os.environ[name] for name in names if name in os.environ} | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([*path, home])),
        "PYTHONHASHSEED": "0",  # the order of a set must not depend on which worker answers
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    }  # fmt: skip
