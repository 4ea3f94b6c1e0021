"""Reward functions: found, understood, called, and their faults kept apart from their values.

Two signatures, without a decorator: batch `f(prompts, completions, **columns) -> list[float | None]` and sample
`f(completion, answer, …) -> float | None`. Arguments are injected by name, decided once at start.
None is "not applicable"; a fault (exception, NaN, ±inf, |r| > 1e6, a wrong type or length) never becomes a number.
Left out: timeouts, worker processes and sandboxes; every function runs inline.
"""

from __future__ import annotations

import asyncio
import copy
import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import random
import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from grpo.batch import Completion, Prompt, Rollouts, ScoredRollouts
from grpo.errors import InputError, RunError, clip
from grpo.seeds import seed_for

MAX_REWARD = 1e6
MAX_METRICS = 64
_GROUP_COLUMNS = {"prompt", "prompts", "completion", "completions", "completion_ids"}
_INJECTED = _GROUP_COLUMNS | {"trainer_state", "truncated", "log_extra", "log_metric"}
_FOREIGN = {"solution_str": "verl", "queries": "OpenRLHF", "entry": "reasoning-gym"}


class RewardError(RunError):
    """A reward function failed under `rewards.on_error: raise`."""


@dataclass(frozen=True)
class TrainerState:
    """What a reward may know of the run."""

    global_step: int
    max_steps: int
    epoch: float


@dataclass(frozen=True)
class Reward:
    """One reward function. `label` is how the user named it, for messages."""

    function: Callable[..., Any]
    name: str
    weight: float = 1.0
    kind: Literal["batch", "sample"] = "sample"
    label: str = ""
    parameters: tuple[str, ...] | None = None  # None: takes **kwargs, gets everything


@dataclass(frozen=True)
class Fault:
    """Why one completion has no value from one function."""

    text: str


# --- loading -------------------------------------------------------------------------------------------------


def load_rewards(
    functions: Sequence[str | Callable[..., Any]], weights: Sequence[float] | None, columns: Collection[str]
) -> list[Reward]:
    """Find each function and decide what it is given. `columns` are the dataset's.

    Raises:
        InputError: not importable, not callable, a signature that cannot be served, two equal names; one line each.
    """
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if len(weights) != len(functions):
        raise InputError(f"rewards.weights has {len(weights)} values for {len(functions)} functions")
    rewards, problems = [], []
    for index, (function, weight) in enumerate(zip(functions, weights, strict=True)):
        name = function if isinstance(function, str) else _name_of(function)
        label = f'rewards[{index}] "{name}"'
        try:
            found = _resolve(function, label) if isinstance(function, str) else function
            rewards.append(_understand(found, weight, label, set(columns)))
        except InputError as error:
            problems += error.lines
    names = [reward.name for reward in rewards]
    problems += [
        f"rewards: two functions are named {name!r} (want different names)"
        for name in set(names)
        if names.count(name) > 1
    ]
    if problems:
        raise InputError(*problems)
    return rewards


def _resolve(text: str, label: str) -> Callable[..., Any]:
    where, colon, attribute = text.rpartition(":")
    if not colon or not where or not attribute:
        raise InputError(f'{label}: is not "module:function" or "path/file.py:function"')
    module = _load_file(Path(where), label) if where.endswith(".py") else _load_module(where, label)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise InputError(f"{label}: {where} has no {attribute!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{label}: is {type(found).__name__} (want a function)")
    return found


def _load_file(path: Path, label: str) -> Any:
    if not path.is_file():
        raise InputError(f"{label}: no such file {str(path)!r}")
    name = f"_grpo_reward_{seed_for(str(path.resolve()))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look it up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{label}: not importable: {type(error).__name__}: {clip(error)}") from error
    return module


def _load_module(name: str, label: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does; a console script does not
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise InputError(f"{label}: not importable: {type(error).__name__}: {clip(error)}") from error


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _understand(function: Callable[..., Any], weight: float, label: str, columns: set[str]) -> Reward:
    if not callable(function):
        raise InputError(f"{label}: is {type(function).__name__} (want a function or its name)")
    parameters = inspect.signature(function).parameters
    named = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if positional := [name for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]:
        raise InputError(f"{label}: parameter {positional[0]} is positional-only (want names: arguments are keywords)")
    batch, sample = {"prompts", "completions"} & set(named), {"completion"} & set(named)
    if bool(batch) == bool(sample):
        foreign = next((origin for name, origin in _FOREIGN.items() if name in named), None)
        hint = f"; it looks like {foreign}'s" if foreign else ""
        raise InputError(f"{label}: has {', '.join(named) or 'no parameters'} (want completions, or completion{hint})")
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    provided = _INJECTED | columns
    for name in named:
        if name not in provided and parameters[name].default is inspect.Parameter.empty:
            close = difflib.get_close_matches(name, provided, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(
                f"{label}: needs {name}, which no column provides (columns: {', '.join(sorted(columns))}{hint})"
            )
    return Reward(
        function,
        _name_of(function),
        float(weight),
        "batch" if batch else "sample",
        label,
        None if everything else tuple(named),
    )


def reward_states(rewards: Sequence[Reward]) -> dict[str, Any]:
    """State of the functions that have any (`state_dict`), by name."""
    return {r.name: copy.deepcopy(r.function.state_dict()) for r in rewards if hasattr(r.function, "state_dict")}


def load_reward_states(rewards: Sequence[Reward], states: Mapping[str, Any]) -> None:
    """Put back what `reward_states` returned."""
    for reward in rewards:
        if reward.name in states and hasattr(reward.function, "load_state_dict"):
            reward.function.load_state_dict(copy.deepcopy(states[reward.name]))


# --- scoring -------------------------------------------------------------------------------------------------


class _Log:
    """What `log_extra` and `log_metric` of one function collect."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.columns: dict[str, list[Any]] = {}
        self.values: dict[str, list[float]] = {}
        self.dropped = 0

    def extra(self, column: str, values: Sequence[Any]) -> None:
        self.columns[str(column)] = list(values)

    def metric(self, name: str, value: float) -> None:
        known = name in self.values or len(self.values) < MAX_METRICS
        if known and isinstance(value, int | float) and math.isfinite(value):
            self.values.setdefault(str(name), []).append(float(value))
        else:
            self.dropped += 1


def score(
    rollouts: Rollouts,
    rewards: Sequence[Reward],
    *,
    step: int,
    max_steps: int,
    epoch: float = 0.0,
    on_error: Literal["raise", "none"] = "raise",
    seed: int = 0,
) -> ScoredRollouts:
    """Call every function on every completion and form the weighted totals in float64.

    Python's, numpy's and torch's global generators are seeded from (seed, step, function) for each call and put back
    afterwards: a reward that draws or reseeds is repeatable and disturbs nothing.

    Raises:
        RewardError: `on_error` is "raise" and a function failed; names the function, step, prompt and generation.
    """
    flat = [
        (prompt, completion, g)
        for prompt, group in zip(rollouts.prompts, rollouts.completions, strict=True)
        for g, completion in enumerate(group)
    ]
    state = TrainerState(step - 1, max_steps, epoch)
    values: dict[str, list[float | None | Fault]] = {}
    logs = [_Log(reward.name) for reward in rewards]
    for reward, log in zip(rewards, logs, strict=True):
        with _own_generators(seed_for(seed, "reward", step, reward.name)):
            values[reward.name] = _call(reward, flat, state, log)
        fault = next((place for place, value in enumerate(values[reward.name]) if isinstance(value, Fault)), None)
        if fault is not None and on_error == "raise":
            prompt, _, g = flat[fault]
            text = values[reward.name][fault].text  # type: ignore[union-attr]
            raise RewardError(f"{reward.label}: {text} (step {step}, prompt {prompt.id}, generation {g})")
    broken = [
        completion.finish_reason in ("abort", "error") or any(isinstance(v[place], Fault) for v in values.values())
        for place, (_, completion, _) in enumerate(flat)
    ]
    totals = [None if bad else _total(rewards, values, place) for place, bad in enumerate(broken)]
    shape = [len(group) for group in rollouts.completions]
    parts = {
        name: _grouped([None if isinstance(v, Fault) else v for v in column], shape) for name, column in values.items()
    }
    columns = {
        f"{log.name}/{name}": _grouped(column, shape)
        for log in logs
        for name, column in log.columns.items()
        if len(column) == len(flat)
    }
    metrics = _metrics(rewards, values, _grouped(totals, shape), parts, broken, logs)
    return ScoredRollouts(
        rollouts, _grouped(totals, shape), parts, {r.name: r.weight for r in rewards}, columns, metrics
    )


def _call(
    reward: Reward, flat: list[tuple[Prompt, Completion, int]], state: TrainerState, log: _Log
) -> list[float | None | Fault]:
    batch: dict[str, Any] = {
        "prompts": [prompt.example["prompt"] for prompt, _, _ in flat],
        "completions": [_as_given(prompt, completion) for prompt, completion, _ in flat],
        "completion_ids": [completion.token_ids for _, completion, _ in flat],
        "truncated": [completion.finish_reason == "length" for _, completion, _ in flat],
    }
    names = dict.fromkeys(name for prompt, _, _ in flat for name in prompt.example if name not in _GROUP_COLUMNS)
    batch |= {name: [prompt.example.get(name) for prompt, _, _ in flat] for name in names if name not in batch}
    shared = {"trainer_state": state, "log_extra": log.extra, "log_metric": log.metric}
    if reward.kind == "batch":
        return _checked_batch(reward, _guarded(reward, {**batch, **shared}), len(flat))
    results: list[float | None | Fault] = []
    for place, (prompt, completion, _) in enumerate(flat):
        sample = {name: column[place] for name, column in batch.items() if name not in ("prompts", "completions")}
        sample |= {"prompt": prompt.example["prompt"], "completion": completion.text}
        outcome = _guarded(reward, {**sample, **shared})
        results.append(outcome if isinstance(outcome, Fault) else _checked(_unwrapped(outcome, log)))
    return results


def _as_given(prompt: Prompt, completion: Completion) -> Any:
    if isinstance(prompt.example["prompt"], str):
        return completion.text
    return [{"role": "assistant", "content": completion.text}]


def _guarded(reward: Reward, arguments: dict[str, Any]) -> Any:
    """The function's result, or a Fault. KeyboardInterrupt passes; SystemExit is an error like any other."""
    wanted = arguments if reward.parameters is None else {n: arguments[n] for n in reward.parameters if n in arguments}
    kept = {name: wanted.pop(name) for name in ("trainer_state", "log_extra", "log_metric") if name in wanted}
    try:
        result = reward.function(**copy.deepcopy(wanted), **kept)
        return asyncio.run(result) if inspect.iscoroutine(result) else result
    except (Exception, SystemExit, GeneratorExit) as error:
        return Fault(f"raised {type(error).__name__}: {clip(error)}")


def _unwrapped(value: Any, log: _Log) -> Any:
    notes = getattr(value, "notes", None)
    if isinstance(notes, dict) and hasattr(value, "value"):
        for name, note in notes.items():
            if isinstance(note, int | float):
                log.metric(name, note)
        return value.value
    return value


def _checked_batch(reward: Reward, result: Any, count: int) -> list[float | None | Fault]:
    if isinstance(result, Fault):
        return [result] * count
    if type(result).__module__.startswith("torch"):
        result = result.detach().cpu().tolist()
    if isinstance(result, np.ndarray):
        result = result.tolist()
    if not isinstance(result, list | tuple):
        return [Fault(f"returned {type(result).__name__} (want a list of {count} numbers or None)")] * count
    if len(result) != count:
        return [Fault(f"returned {len(result)} values for {count} completions")] * count
    return [_checked(value) for value in result]


def _checked(value: Any) -> float | None | Fault:
    if value is None:
        return None
    if type(value).__module__.startswith("torch") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if not isinstance(value, bool | int | float | np.number | np.bool_) or isinstance(
        value, complex | np.complexfloating
    ):
        return Fault(f"returned {type(value).__name__} {clip(repr(value), 40)} (want a number or None)")
    try:
        number = float(value)
    except OverflowError:
        return Fault("returned a number too large for a float (want at most 1e6)")
    if not math.isfinite(number) or abs(number) > MAX_REWARD:
        return Fault(f"returned {number} (want a finite number of at most 1e6; None means not applicable)")
    return number


def _total(rewards: Sequence[Reward], values: Mapping[str, list[Any]], place: int) -> float | None:
    present = [
        (reward.weight, values[reward.name][place]) for reward in rewards if values[reward.name][place] is not None
    ]
    return math.fsum(weight * value for weight, value in present) if present else None


def _grouped(flat: Sequence[Any], shape: Sequence[int]) -> list[list[Any]]:
    source = iter(flat)
    return [[next(source) for _ in range(size)] for size in shape]


@contextmanager
def _own_generators(seed: int) -> Any:
    torch = sys.modules.get("torch")
    states = random.getstate(), np.random.get_state(), torch.get_rng_state() if torch else None
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch:
        torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if torch and states[2] is not None:
            torch.set_rng_state(states[2])


# --- metrics -------------------------------------------------------------------------------------------------


def _metrics(
    rewards: Sequence[Reward],
    values: Mapping[str, list[Any]],
    totals: list[list[float | None]],
    parts: Mapping[str, list[list[float | None]]],
    broken: list[bool],
    logs: Sequence[_Log],
) -> dict[str, float]:
    every = [value for group in totals for value in group if value is not None]
    metrics = {
        "reward": statistics.fmean(every) if every else math.nan,
        "reward_std": _std(every),
        "rewards/invalid_frac": sum(broken) / max(1, len(broken)),
    }
    mixed = 0
    for reward in rewards:
        column = values[reward.name]
        numbers = [value for value in column if isinstance(value, float)]
        groups = [[value for value in group if value is not None] for group in parts[reward.name]]
        mixed += sum(0 < len(kept) < len(group) for kept, group in zip(groups, parts[reward.name], strict=True))
        prefix = f"rewards/{reward.name}/"
        metrics[prefix + "mean"] = statistics.fmean(numbers) if numbers else math.nan
        metrics[prefix + "std"] = _std(numbers)
        spreads = [_std(group) for group in groups if len(group) > 1]
        metrics[prefix + "in_group_std"] = statistics.fmean(spreads) if spreads else 0.0
        metrics[prefix + "none_frac"] = sum(value is None for value in column) / max(1, len(column))
        metrics[prefix + "error_frac"] = sum(isinstance(value, Fault) for value in column) / max(1, len(column))
    metrics["rewards/none_mixed_frac"] = mixed / max(1, len(rewards) * len(totals))
    for log in logs:
        metrics |= {f"rewards/{log.name}/{name}": statistics.fmean(v) for name, v in log.values.items()}
        if log.dropped:
            metrics[f"rewards/{log.name}/dropped_metrics"] = float(log.dropped)
    return metrics


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


class FaultBudget:
    """Ends a run whose rewards mostly fail: above 5 % invalid of the last 512 completions (full), or 10 steps without a valid group."""

    def __init__(self) -> None:
        self.recent: list[bool] = []
        self.steps_without_group = 0

    def check(self, scored: ScoredRollouts) -> None:
        """Count a step's rewards. Raises RunError beyond the budget."""
        valid = [[value is not None for value in group] for group in scored.rewards]
        self.recent = (self.recent + [not ok for group in valid for ok in group])[-512:]
        self.steps_without_group = 0 if any(sum(group) >= 2 for group in valid) else self.steps_without_group + 1
        if len(self.recent) == 512 and sum(self.recent) > 0.05 * 512:
            raise RunError(
                f"rewards: {sum(self.recent)} of the last 512 completions have no valid reward (want at most 5 %)"
            )
        if self.steps_without_group >= 10:
            raise RunError("rewards: 10 steps in a row without a group that has two valid rewards")
