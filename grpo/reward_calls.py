"""One step's calls of reward functions: copies of the arguments go in; a float, None or a `Fault` comes out.

Left out: what is made of the values (scoring.py), and how a call is ended early (reward_isolation.py for async
functions, reward_pool.py for those in processes).
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from grpo.batch import Completion, Prompt
from grpo.reward_import import describe
from grpo.reward_isolation import Fault, Watchdog, gather, guarded, seed_generators, watched_process
from grpo.reward_pool import Reply, ask
from grpo.reward_prefill import prefill_in
from grpo.reward_spec import OnError, Reward, RewardError

Value = float | Fault | None

MAX_REWARD = 1e6
"""Largest size of a reward that is taken for one; beyond it is a fault."""
MAX_NAMES = 64
"""Metric names that one function may use in a run, and columns in a step."""
_MAX_NAME = 100
_MADE_HERE = ("trainer_state", "log_metric", "log_extra")  # arguments that a worker process makes itself
_ATOMS = (str, int, float, bool, type(None), bytes)


@dataclass(frozen=True)
class Sample:
    """One completion to judge."""

    prompt: Prompt
    completion: Completion
    generation: int


@dataclass(frozen=True)
class TrainerState:
    """What a reward may know of the run: optimizer steps done, their number in all, epochs of data consumed."""

    global_step: int
    max_steps: int
    epoch: float


# --- what goes in --------------------------------------------------------------------------------------------


def arguments(reward: Reward, samples: Sequence[Sample], state: TrainerState, log: Log, row: int) -> dict[str, Any]:
    """Keyword arguments of one call on `samples` (one of them, at `row`, for the sample form), all of them copies."""
    makers: dict[str, Callable[[Sample], Any]] = {
        "prompts": _prompt,
        "prompt": _prompt,
        "completions": _completion,
        "completion": lambda sample: sample.completion.text,
        "completion_ids": lambda sample: list(sample.completion.token_ids),
        "truncated": lambda sample: sample.completion.finish_reason == "length",
        "messages": _conversation,
        "prefill": lambda sample: prefill_in(sample.prompt.example["prompt"], reward.prefill or ""),
    }
    lists = {name: [makers[name](sample) for sample in samples] for name in reward.injected if name in makers}
    for name in reward.columns:
        if name in reward.required or any(name in sample.prompt.example for sample in samples):
            lists[name] = [_copied(sample.prompt.example.get(name)) for sample in samples]
    shared = {
        "trainer_state": state,
        "log_metric": log.metric,
        "log_extra": log.column if reward.kind == "batch" else partial(log.cell, row),
    }
    given = lists if reward.kind == "batch" else {name: values[0] for name, values in lists.items()}
    return given | {name: value for name, value in shared.items() if name in reward.injected}


def _copied(value: Any) -> Any:
    return value if type(value) in _ATOMS else copy.deepcopy(value)


def _prompt(sample: Sample) -> Any:
    return _copied(sample.prompt.example["prompt"])


def _completion(sample: Sample) -> Any:
    """Text for a text prompt, one assistant message for a chat prompt (as TRL gives it)."""
    text = sample.completion.text
    return text if isinstance(sample.prompt.example["prompt"], str) else [{"role": "assistant", "content": text}]


def _conversation(sample: Sample) -> list[Any]:
    prompt = _prompt(sample)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*before, {"role": "assistant", "content": sample.completion.text}]


# --- what comes out ------------------------------------------------------------------------------------------


def to_values(result: Any, count: int) -> list[Any] | Fault:
    """The `count` elements of what a batch function returned, or a fault on the whole call. Nothing is broadcast."""
    want = f"(want a list, tuple, 1-D array or 1-D tensor of {count} numbers or None)"
    if _is_tensor(result) or _is_array(result):
        if result.ndim != 1:
            return Fault(f"returned {type(result).__name__} of shape {tuple(result.shape)} {want}", on_call=True)
        values = result.detach().cpu().tolist() if _is_tensor(result) else list(result)
    elif isinstance(result, list | tuple):
        values = list(result)
    else:
        return Fault(f"returned {_what(result)} {want}", on_call=True)
    if len(values) != count:
        return Fault(f"returned {len(values)} values for {count} completions", on_call=True)
    return values


def to_number(value: Any) -> Value:
    """One reward as float64: from None, int, bool, float, a numpy scalar or a 0-d array or tensor."""
    if (_is_tensor(value) or _is_array(value)) and value.ndim == 0:
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, int | float | np.bool_ | np.integer | np.floating) or isinstance(value, np.timedelta64):
        return Fault(f"returned {_what(value)} (want a number or None)")
    if isinstance(value, int) and abs(value) > MAX_REWARD:  # before float(), which overflows
        return Fault(f"returned an int of {value.bit_length()} bits (want at most {MAX_REWARD:g} in size)")
    number = float(value)
    if not math.isfinite(number):
        return Fault(f"returned {number} (want a finite number; None means not applicable)")
    if abs(number) > MAX_REWARD:
        return Fault(f"returned {number:g} (want at most {MAX_REWARD:g} in size)")
    return number


def to_rewards(reward: Reward, log: Log, rows: Sequence[int], result: Any) -> list[Value]:
    """Take the result of one call on `rows` apart: a value each. Reading it may run user code too, so that is guarded
    as well. Notes of Scores go into `log`."""
    if reward.kind == "batch" and not isinstance(result, Fault):
        result = guarded(to_values, result, len(rows))
    if isinstance(result, Fault):
        return [result] * len(rows)
    elements = [result] if reward.kind == "sample" else result
    values = [guarded(_number, log, row, element) for row, element in zip(rows, elements, strict=True)]
    return [replace(value, on_call=False) if isinstance(value, Fault) else value for value in values]


def _in_range(reward: Reward, value: Value) -> Value:
    """`value`, or a fault where the range that the configuration declares does not hold it."""
    if reward.range is None or not isinstance(value, float) or reward.range[0] <= value <= reward.range[1]:
        return value
    return Fault(f"returned {value:g} (want its range, {reward.range[0]:g} to {reward.range[1]:g})")


def _number(log: Log, row: int, element: Any) -> Value:
    value, notes = split_score(element)
    log.notes(row, notes)
    return to_number(value)


def split_score(value: Any) -> tuple[Any, Mapping[str, Any]]:
    """(value, notes) of a `rewards.Score`; anything else has no notes. Whoever returns a Score has imported it."""
    kind = getattr(sys.modules.get("rewards.score"), "Score", ())
    if not isinstance(value, kind):
        return value, {}
    score: Any = value
    return score.value, score.notes


def _is_array(value: Any) -> bool:
    """A numpy array, but no masked one: what its masked elements mean is not for us to say."""
    return isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists or numbers."""
    if _is_tensor(value):
        return value.detach().cpu().tolist()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _what(value: Any) -> str:
    if value is None:
        return "None"
    shown = "" if isinstance(value, Iterator | Coroutine) else f" {describe(value, 40)}"
    return type(value).__name__ + shown


# --- what it logs --------------------------------------------------------------------------------------------


class Log:
    """Metrics and columns that one function logs in one step. `num_rows` completions are judged.

    Names beyond `MAX_NAMES` and numbers that are not finite are dropped and counted; a call that makes no sense raises
    inside the function that made it.
    """

    def __init__(self, reward: Reward, num_rows: int) -> None:
        self.reward = reward
        self.num_rows = num_rows
        self.metrics: dict[str, list[float]] = {}
        self.columns: dict[str, list[Any]] = {}
        self.num_dropped = 0

    def metric(self, name: str, value: Any) -> None:
        """`log_metric(name, value)`: a number; several of one name in a step are averaged."""
        _check_name(name)
        if _is_tensor(value) or _is_array(value):
            value = value.item()
        if not isinstance(value, int | float | np.bool_ | np.integer | np.floating):
            raise TypeError(f"log_metric({name!r}, …): the value is {_what(value)} (want a number)")
        known = self.reward.metric_names
        if name not in known and len(known) < MAX_NAMES:
            known.append(name)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if name in known and math.isfinite(number):
            self.metrics.setdefault(name, []).append(number)
        else:
            self.num_dropped += 1

    def column(self, name: str, values: Any) -> None:
        """`log_extra(column, values)` of the batch form: one value per completion."""
        values = list(_plain(values))
        if len(values) != self.num_rows:
            raise ValueError(f"log_extra({name!r}, …): {len(values)} values for {self.num_rows} completions")
        if (column := self._column(name)) is not None:
            column[:] = [_copied(_plain(value)) for value in values]

    def cell(self, row: int, name: str, value: Any) -> None:
        """`log_extra(column, value)` of the sample form, with the row bound."""
        if (column := self._column(name)) is not None:
            column[row] = _copied(_plain(value))

    def _column(self, name: str) -> list[Any] | None:
        _check_name(name)
        if name not in self.columns and len(self.columns) >= MAX_NAMES:
            self.num_dropped += 1
            return None
        return self.columns.setdefault(name, [None] * self.num_rows)

    def notes(self, row: int, notes: Mapping[str, Any]) -> None:
        """Notes of a Score: numbers become metrics, text becomes columns."""
        for name, value in notes.items():
            if isinstance(value, str):
                self.cell(row, name, value)
            elif value is not None:
                self.metric(name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _MAX_NAME:
        raise TypeError(f"{describe(name, 40)} is no name to log under (want 1 to {_MAX_NAME} printable characters)")


# --- the calls of a step ---------------------------------------------------------------------------------------


def _without_gradients(reward: Reward) -> AbstractContextManager[Any]:
    """For functions on the GPU: a reward model keeps no activations."""
    if reward.where != "gpu":
        return nullcontext()
    import torch

    return torch.no_grad()


class Calls:
    """The calls of one step on its finished completions (`samples`, the rows here) and what came of them.

    Attributes:
        values: per function, one float, None or `Fault` a row.
        logs: per function, what it logged.
        seconds: per function, those of each of its calls.
        faults: row -> its first fault, with the function's label.
    """

    def __init__(self, samples: Sequence[Sample], step: int, state: TrainerState, on_error: OnError, seed: int) -> None:
        self.samples = samples
        self.step = step
        self.state = state
        self.on_error = on_error
        self.seed = seed
        self.values: dict[str, list[Value]] = {}
        self.logs: dict[str, Log] = {}
        self.seconds: dict[str, list[float]] = {}
        self.faults: dict[int, str] = {}
        self._waiting: list[tuple[Reward, Sequence[int], Any]] = []  # (function, rows, awaitable)
        self._watchdog = Watchdog()

    def call(self, reward: Reward) -> None:
        """One call (batch) or one per completion (sample)."""
        count = len(self.samples)
        self.values[reward.name] = [None] * count
        self.logs[reward.name] = Log(reward, count)
        self.seconds[reward.name] = []
        every = [range(count)] if reward.kind == "batch" else [range(row, row + 1) for row in range(count)]
        if reward.where == "process":
            self._call_in_processes(reward, every)
            return
        with watched_process([reward]), _without_gradients(reward):
            for rows in every:
                start = time.perf_counter()
                with self._watchdog.on(reward.label):
                    result = guarded(self._invoke, reward, rows)
                if inspect.isawaitable(result):
                    self._waiting.append((reward, rows, result))
                else:
                    self.seconds[reward.name].append(time.perf_counter() - start)
                    self._settle(reward, rows, result)

    def _invoke(self, reward: Reward, rows: Sequence[int]) -> Any:
        given = self._arguments(reward, rows)
        seed_generators(*self._key(reward, rows))
        return reward.function(**given)

    def _arguments(self, reward: Reward, rows: Sequence[int]) -> dict[str, Any]:
        return arguments(reward, [self.samples[row] for row in rows], self.state, self.logs[reward.name], rows[0])

    def _key(self, reward: Reward, rows: Sequence[int]) -> list[int | str]:
        """What the random numbers of a call are a function of."""
        first = self.samples[rows[0]]
        return [self.seed, "reward", reward.name, self.step, first.prompt.epoch, first.prompt.id, first.generation]

    def await_all(self) -> None:
        """Run what async functions have returned, all together."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        seed_generators(self.seed, "reward", "async", self.step)
        labels = ", ".join(dict.fromkeys(reward.label for reward, _, _ in waiting))
        with watched_process([reward for reward, _, _ in waiting]), self._watchdog.on(labels):
            results = gather([(reward, awaitable) for reward, _, awaitable in waiting])
        for (reward, rows, _), (result, seconds) in zip(waiting, results, strict=True):
            self.seconds[reward.name].append(seconds)
            self._settle(reward, rows, result)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close coroutines that were never awaited, when the step ends early, and stop watching."""
        try:
            yield
        finally:
            self._watchdog.end()
            for _, _, awaitable in self._waiting:
                if inspect.iscoroutine(awaitable):
                    awaitable.close()

    # --- in processes ---

    def _call_in_processes(self, reward: Reward, every: Sequence[Sequence[int]]) -> None:
        """All calls, as many at a time as its workers take; under "raise" in slices, to end at an early fault."""
        size = 8 * (reward.max_concurrency or 1) if self._raises(reward) else len(every)
        for first in range(0, len(every), size):
            part = every[first : first + size]
            requests = [guarded(self._request, reward, rows) for rows in part]
            for rows, reply in zip(part, ask(reward, requests, [len(rows) for rows in part]), strict=True):
                self._take(reward, rows, reply)

    def _request(self, reward: Reward, rows: Sequence[int]) -> dict[str, Any]:
        given = self._arguments(reward, rows)
        provided = [name for name in _MADE_HERE if given.pop(name, None) is not None]
        return {
            "given": given,
            "provided": provided,
            "state": asdict(self.state),
            "key": self._key(reward, rows),
            "count": len(rows),
        }

    def _take(self, reward: Reward, rows: Sequence[int], reply: Reply) -> None:
        log = self.logs[reward.name]
        for name, logged in reply.metrics.items():
            for value in logged:
                guarded(log.metric, name, value)
        for name, column in reply.columns.items():
            for row, value in zip(rows, column, strict=True):
                guarded(log.cell, row, name, value)
        log.num_dropped += reply.num_dropped
        self.seconds[reward.name].append(reply.seconds)
        values = reply.values
        if not isinstance(values, Fault):
            values = [value if isinstance(value, Fault) else to_number(value) for value in values]
        self._keep(reward, rows, [values] * len(rows) if isinstance(values, Fault) else values)

    # --- outcomes ---

    def _settle(self, reward: Reward, rows: Sequence[int], result: Any) -> None:
        self._keep(reward, rows, to_rewards(reward, self.logs[reward.name], rows, result))

    def _keep(self, reward: Reward, rows: Sequence[int], values: Sequence[Value]) -> None:
        for row, value in zip(rows, values, strict=True):
            value = _in_range(reward, value)
            self.values[reward.name][row] = value
            if isinstance(value, Fault):
                self._record(reward, rows, row, value)

    def _raises(self, reward: Reward) -> bool:
        return (reward.on_error or self.on_error) == "raise"

    def _record(self, reward: Reward, rows: Sequence[int], row: int, fault: Fault) -> None:
        if self._raises(reward):
            where = self._place(rows if fault.on_call else [row])
            raise RewardError(f"{reward.label}: {fault.text} (step {self.step}, {where})") from fault.error
        self.faults.setdefault(row, f"{reward.label}: {fault.text}")

    def _place(self, rows: Sequence[int]) -> str:
        if len(rows) == 1:
            sample = self.samples[rows[0]]
            return f"prompt {sample.prompt.id}, generation {sample.generation}"
        prompts = list(dict.fromkeys(str(self.samples[row].prompt.id) for row in rows))
        if len(prompts) == 1:
            return f"prompt {prompts[0]}"
        return f"prompts {', '.join(prompts[:3])}{', …' if len(prompts) > 3 else ''}"
