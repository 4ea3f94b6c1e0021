"""Combinators: reward functions made of reward functions, in the same two signatures.

    weighted sum Σ w·r      product Π r      gate r if every condition holds      clip max(low, min(high, r))
    schedule     c(step)·r  route   the reward of the row's task                  extracted  r(extract(completion))

None means "does not apply" and is kept apart from numbers: a sum or product runs over the parts that apply, a
condition that does not apply holds, and None alone stays None. The formulas need no source; why a gate and no sum for
the format: an added bonus for the format pays for long wrong answers as well.
Left out: normalising parts by their spread in the group (a matter of advantages).
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import fsum
from typing import Any

from rewards.parts import Combined, Part, Values, name_of, per_row

Function = Callable[..., Any]


def weighted_sum(*parts: tuple[Function, float], name: str | None = None) -> Combined:
    """Σ weight · reward over the parts that apply.

    >>> def right(completion, answer): return float(completion == answer)
    >>> def brief(completion): return float(len(completion) < 9)
    >>> total = weighted_sum((right, 1.0), (brief, 0.5))
    >>> total.__name__, total(completion="7", answer="8")
    ('right_plus_brief', 0.5)
    """
    weights = [_finite("weight", weight) for _, weight in parts]
    functions = [function for function, _ in parts]

    def rule(values: Sequence[Values], given: Mapping[str, Any]) -> Values:
        rows = [
            [w * v for w, v in zip(weights, row, strict=True) if v is not None] for row in zip(*values, strict=True)
        ]
        return [fsum(terms) if terms else None for terms in rows]

    return Combined(functions, rule, name=name or "_plus_".join(map(name_of, functions)))


def product(*functions: Function, name: str | None = None) -> Combined:
    """Π reward over the parts that apply.

    Raises (when called):
        ValueError: two factors of a completion are negative, whose product would be a reward.

    >>> def right(completion, answer): return float(completion == answer)
    >>> def brief(completion): return 1 / len(completion)
    >>> product(right, brief)(completion="seven", answer="seven")
    0.2
    """

    def rule(values: Sequence[Values], given: Mapping[str, Any]) -> Values:
        found: Values = []
        for row in zip(*values, strict=True):
            factors = [value for value in row if value is not None]
            if sum(factor < 0 for factor in factors) > 1:
                raise ValueError(f"product of {factors}: two negative factors would make a positive reward")
            found.append(math.prod(factors) if factors else None)
        return found

    return Combined(functions, rule, name=name or "_times_".join(map(name_of, functions)))


def gate(reward: Function, *conditions: Function, threshold: float = 1.0, closed: float = 0.0) -> Combined:
    """`reward` where every condition is at least `threshold`, else `closed`, or `reward` if that is lower.

    So breaking a condition never pays. A condition that does not apply (None) holds.

    >>> def right(completion, answer): return float(answer in completion)
    >>> def tagged(completion): return float("</think>" in completion)
    >>> gated = gate(right, tagged)
    >>> gated.__name__, gated(completion="</think>7", answer="7"), gated(completion="7", answer="7")
    ('right', 1.0, 0.0)
    """
    if not conditions:
        raise ValueError("a gate needs at least one condition")

    def rule(values: Sequence[Values], given: Mapping[str, Any]) -> Values:
        return [
            value if value is None or all(each is None or each >= threshold for each in held) else min(closed, value)
            for value, *held in zip(*values, strict=True)
        ]

    return Combined([reward, *conditions], rule)


def clip(reward: Function, low: float, high: float) -> Combined:
    """`reward`, at least `low` and at most `high`. NaN and infinities are errors, not clipped.

    >>> clip(lambda completion: len(completion), 0.0, 2.0)(completion="abc")
    2.0
    """
    if not low <= high:
        raise ValueError(f"clip from {low} to {high} (want low at most high)")
    return Combined(
        [reward], per_row(lambda value, given: None if value is None else max(float(low), min(float(high), value)))
    )


def schedule(reward: Function, points: Sequence[tuple[int, float]]) -> Combined:
    """`reward` times a factor of the number of optimizer steps done: linear between `points`, constant outside.

    Args:
        reward: any reward function.
        points: (step, factor), steps rising. `trainer_state.global_step` is the step.

    >>> class State: global_step = 50
    >>> fading = schedule(lambda completion: 2.0, [(0, 1.0), (100, 0.0)])
    >>> fading(completion="…", trainer_state=State)
    1.0
    """
    steps = [step for step, _ in points]
    if not points or any(one >= other for one, other in pairwise(steps)):
        raise ValueError(f"schedule over steps {steps} (want at least one, rising)")
    for _, each in points:
        _finite("factor", each)

    def shape(value: float | None, given: Mapping[str, Any]) -> float | None:
        return None if value is None else value * _between(points, given["trainer_state"].global_step)

    return Combined([reward], per_row(shape), needs=("trainer_state",))


def _between(points: Sequence[tuple[int, float]], step: int) -> float:
    if step <= points[0][0]:
        return float(points[0][1])
    for (start, first), (end, last) in pairwise(points):
        if step <= end:
            return first + (last - first) * (step - start) / (end - start)
    return float(points[-1][1])


def route(rewards: Mapping[Any, Function], column: str = "task", name: str = "route") -> Combined:
    """The reward of each row's task. A task that is not in `rewards` gives None, is counted and warned of once.

    The share of such rows is logged as `unknown_<column>`: data that says "code" where the rewards say "coding" would
    otherwise leave all of its rows without a reward, and nobody would notice.

    Args:
        rewards: task -> reward function.
        column: the dataset column that holds the task.
        name: of the metric.

    >>> by_task = route({"yes": lambda completion: 1.0, "no": lambda completion: 0.0})
    >>> by_task(completion="…", task="yes"), by_task(completion="…", task="no")
    (1.0, 0.0)
    """
    tasks = list(rewards)
    warned: set[str] = set()

    def rows(place: int, given: Mapping[str, Any]) -> list[int]:
        return [row for row, task in enumerate(given[column]) if task == tasks[place]]

    def rule(values: Sequence[Values], given: Mapping[str, Any]) -> Values:
        for task in given[column]:
            _count_unknown(task, tasks, column, warned, given.get("log_metric"))
        return [next((value for value in row if value is not None), None) for row in zip(*values, strict=True)]

    return Combined(list(rewards.values()), rule, needs=(column,), name=name, rows=rows)


def _count_unknown(task: Any, tasks: list[Any], column: str, warned: set[str], log: Function | None) -> None:
    unknown = task not in tasks
    if log is not None:
        log(f"unknown_{column}", float(unknown))
    shown = repr(task)[:80]
    if unknown and shown not in warned and len(warned) < 100:
        warned.add(shown)
        known = ", ".join(repr(each) for each in tasks)
        warnings.warn(f"no reward for {column} {shown} (there are: {known}); such rows get None", stacklevel=3)


def extracted(reward: Function, extract: Callable[[str], str | None], name: str | None = None) -> Function:
    """A per-sample `reward` that sees what `extract` finds in a completion (None where it finds nothing).

    >>> from rewards import boxed, numeric
    >>> boxed_number = extracted(numeric, boxed)
    >>> boxed_number.__name__, boxed_number(completion=r"so \\boxed{72}", answer="72")
    ('numeric', 1.0)
    >>> boxed_number(completion="so 72", answer="72")
    0.0
    """
    part = Part(reward)
    if part.kind == "batch":
        raise TypeError(f"{part.name} judges whole batches (want a function with a parameter 'completion')")

    def judge(*, completion: str, **given: Any) -> Any:
        return reward(completion=extract(completion), **given)

    judge.__name__ = name or part.name
    judge.__doc__ = inspect.getdoc(reward)
    kept = [
        each.replace(kind=each.KEYWORD_ONLY) if each.kind is each.POSITIONAL_OR_KEYWORD else each
        for key, each in inspect.signature(reward).parameters.items()
        if key not in (reward.keywords if isinstance(reward, functools.partial) else {})
    ]
    judge.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
    return judge


def _finite(what: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{what} is {value} (want a finite number)")
    return float(value)
