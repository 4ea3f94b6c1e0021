"""What a reward function may do to the run: nothing. Its exceptions become faults, its random numbers are its own.

An async function is cancelled at its limit. One that runs inline and never returns holds the run up; a line names it
every 30 s (unless it also holds the interpreter, as one long call into C does).
Left out: worker processes (reward_pool.py), which alone can end a call for certain.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grpo.reward_import import describe
from grpo.reward_spec import Reward
from grpo.seeds import seed_for


class RewardWarning(UserWarning):
    """Something about a reward function that the run survives. Given once per function and kind."""


def warn_once(reward: Reward, kind: str, text: str, label: str | None = None) -> None:
    """Warn about `reward` (or what `label` names), once per `kind` in a run."""
    if kind not in reward.warned:
        reward.warned.add(kind)
        warnings.warn(f"{label or reward.label}: {text}", RewardWarning, stacklevel=2)


@dataclass(frozen=True)
class Fault:
    """Why a completion has no value. `on_call`: the whole call failed, not one of its values. `timed_out`: it took
    too long."""

    text: str
    on_call: bool = False
    timed_out: bool = False
    error: BaseException | None = None


def guarded(action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `action` returns, or a `Fault`. Only KeyboardInterrupt passes: `sys.exit()` in a reward is an error."""
    try:
        return action(*args, **kwargs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the boundary to user code; GeneratorExit and CancelledError come here too
        return Fault(f"raised {describe(error)}", on_call=True, error=error)


# --- what it may not disturb ---------------------------------------------------------------------------------


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Put the global generators of Python, numpy and torch (CPU and used GPUs) back as they were found.

    torch is never imported here: where nobody has, there is no generator to disturb.
    """
    torch = sys.modules.get("torch")
    python, numpy_state = random.getstate(), np.random.get_state()
    cpu = torch.get_rng_state() if torch is not None else None
    cuda = torch.cuda.get_rng_state_all() if torch is not None and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        if torch is not None and cpu is not None:
            torch.set_rng_state(cpu)
        if torch is not None and cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def seed_generators(*key: int | str) -> None:
    """Start the global CPU generators at a function of `key`: what a reward draws is then the same after a resume."""
    seed = seed_for(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the GPUs as well


@contextmanager
def watched_process(rewards: Sequence[Reward]) -> Iterator[None]:
    """Put the working directory back when a reward changed it, and warn; only warn of environment variables."""
    folder, environment = _working_directory(), dict(os.environ)
    try:
        yield
    finally:
        now = _working_directory()
        if folder is not None and now != folder:
            os.chdir(folder)
            warn_once(rewards[0], "cwd", f"changed the working directory to {now} (put back)")
        if environment != dict(os.environ):
            names = sorted({*environment.items()} ^ {*os.environ.items()})
            shown = ", ".join(dict.fromkeys(name for name, _ in names))
            warn_once(rewards[0], "environment", f"changed environment variables: {describe(shown)} (left as they are)")


def _working_directory() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:  # the folder was removed
        return None


# --- one that does not return --------------------------------------------------------------------------------


class Watchdog:
    """Warns of a call that is still running after `interval` seconds, and again each `interval`. Ends nothing."""

    interval = 30.0

    def __init__(self) -> None:
        self._label = ""
        self._since: float | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def on(self, label: str) -> Iterator[None]:
        """Watch what runs inside."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="reward watchdog", daemon=True)
            self._thread.start()
        self._label, self._since = label, time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        told, count = None, 1
        wait = self.interval
        while not self._ended.wait(wait):
            since = self._since
            now = time.monotonic()
            if since != told:
                told, count = since, 1
            if since is not None and now - since >= count * self.interval:
                count = int((now - since) // self.interval) + 1
                warnings.warn(
                    f"{self._label}: still running after {now - since:.0f} s (what runs in this process cannot be "
                    "ended; where: process and timeout_s can)",
                    RewardWarning,
                    stacklevel=2,
                )
            wait = self.interval if since is None else max(since + count * self.interval - now, 0.001)


# --- async functions -----------------------------------------------------------------------------------------


def gather(calls: Sequence[tuple[Reward, Awaitable[Any]]]) -> list[tuple[Any, float]]:
    """Await all together, in a new event loop: (result or `Fault`, seconds) of each, in order.

    A call that exceeds the `timeout` of its function is cancelled; at most `max_concurrency` calls of a function run at
    the same time. In a notebook, whose own loop is running in this thread, the new one runs in a thread of its own.
    """
    results: list[Any] = [None] * len(calls)
    seconds = [0.0] * len(calls)
    done: set[int] = set()

    async def settle(place: int) -> None:
        reward, awaitable = calls[place]
        start = time.perf_counter()
        limit = asyncio.timeout(reward.timeout)
        try:
            async with limit:
                results[place] = await awaitable
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the boundary to user code
            results[place] = Fault(f"raised {describe(error)}", on_call=True, error=error)
        if limit.expired():
            results[place] = Fault(f"gave no answer within {reward.timeout:g} s (cancelled)", True, timed_out=True)
        seconds[place] = time.perf_counter() - start
        done.add(place)

    async def everything() -> None:
        slots = {
            reward.name: asyncio.Semaphore(reward.max_concurrency) for reward, _ in calls if reward.max_concurrency
        }

        async def in_turn(place: int) -> None:
            async with slots.get(calls[place][0].name) or nullcontext():
                await settle(place)

        await asyncio.gather(*(in_turn(place) for place in range(len(calls))))

    ended = guarded(_run, everything)
    if isinstance(ended, Fault):  # a task that the function started itself has torn the loop down
        torn = [place not in done or _was_cancelled(result) for place, result in enumerate(results)]
        results = [ended if lost else result for lost, result in zip(torn, results, strict=True)]
    for _, awaitable in calls:
        if asyncio.iscoroutine(awaitable):
            guarded(awaitable.close)  # one whose turn never came
    return list(zip(results, seconds, strict=True))


def _was_cancelled(result: Any) -> bool:
    return isinstance(result, Fault) and isinstance(result.error, asyncio.CancelledError)


def _run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(lambda: asyncio.run(main())).result()
