r"""`check`: whether a reward function scores what it should, before any model is loaded.

Shows the function dozens of completions per row (see probes.py), each of them three times, once in another order, and
reports with row and column: constant rewards, None for a whole value of a label column, gold below the maximum, wrong
or empty answers at the maximum, scores that change, wrong lengths and types, calls that are slow or never end, changed
inputs, and a weight that drowns the others. `top` is the highest score seen (or `maximum`), `bottom` the lowest; "at
the top" is within 5 % of that range, and 50 % for functions that do not look at the answer (formats, lengths).
Source: mistakes reproduced with rewards in use, listed in probes.py.
Left out: what a model's own completions score (the trainer's command measures that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from rewards.check_calls import Caller, name_of
from rewards.check_report import Finding, Report, Setting
from rewards.check_trial import Trial

DROWNING = 10.0
"""A weighted range so many times that of all other functions together drowns them."""


def check(
    functions: Callable[..., Any] | Sequence[Callable[..., Any]],
    samples: Iterable[Mapping[str, Any]],
    *,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    **setting: Any,
) -> Report:
    r"""Try reward functions on completions made from `samples`; see the top of the file for what is reported.

    Args:
        functions: one, or all that a run adds up.
        samples: rows of the dataset, with `prompt` and the columns that the functions name; 8 to 64 are enough.
        weights: of the functions; 1 each.
        names: of the functions, in findings; their own.
        setting: see `Setting`.

    Raises:
        ValueError: no rows, or a function whose parameters cannot be provided.

    >>> from rewards import math_accuracy
    >>> rows = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in (36, 40, 50)]
    >>> check(math_accuracy, rows).ok
    True
    >>> def until_the_first_brace(completion, answer):
    ...     import re
    ...     found = re.findall(r"\\boxed\{(.*?)\}", completion)
    ...     return float(bool(found) and found[-1] == answer)
    >>> rows = [{"prompt": "Half of 1?", "answer": r"\frac{1}{2}"}, {"prompt": "1 + 1?", "answer": "2"}]
    >>> print(check(until_the_first_brace, rows).errors[0])
    error: until_the_first_brace: the right answer gets at most 0 of 1 in every presentation (row 1, column 'answer')
    """
    rows = [dict(row) for row in samples]
    if not rows:
        raise ValueError("check: no rows (want at least one)")
    every = [functions] if callable(functions) else list(functions)
    called = [name_of(each) for each in every] if names is None else list(names)
    plan = Setting(**setting)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    trials = [Trial(_caller(each, name, columns, plan), rows, plan) for each, name in zip(every, called, strict=True)]
    for trial in trials:
        trial.run()
    findings = [finding for trial in trials for finding in trial.findings()]
    findings += _uncovered(trials) + _drowned(trials, [1.0] * len(trials) if weights is None else weights)
    kept = [finding for finding in findings if finding.kind not in plan.skip]
    kept.sort(key=lambda finding: finding.level != "error")
    return Report(kept, {trial.name: trial.summary() for trial in trials})


def _caller(function: Callable[..., Any], name: str, columns: Sequence[str], plan: Setting) -> Caller:
    limit = None if name in plan.in_process else plan.timeout_s
    return Caller(function, columns, plan.tokenize, plan.without, limit, name)


def _uncovered(trials: Sequence[Trial]) -> list[Finding]:
    """Values of a label column to which a function does not apply. An error unless another function takes them over:
    one that is itself selective, as a router's parts are (a format reward that applies everywhere judges nothing).
    """
    found = []
    for trial in trials:
        for column, value, rows in trial.none_labels():
            others = [other for other in trials if other is not trial and other.none_labels()]
            taken = any(not set(rows) & set(other.none_rows()) for other in others)
            text = f"returns None for every row with {column} = {value!r}"
            text += (
                ", which another function takes over" if taken else ": is that label spelled as the function has it?"
            )
            level: Literal["error", "note"] = "note" if taken else "error"
            found.append(Finding(level, trial.name, "none", text, tuple(row + 1 for row in rows), column))
    return found


def _drowned(trials: Sequence[Trial], weights: Sequence[float]) -> list[Finding]:
    """A function whose weighted range is many times that of the others together decides alone."""
    ranges = [abs(weight) * (trial.top - trial.bottom) for trial, weight in zip(trials, weights, strict=True)]
    found = []
    for place, trial in enumerate(trials):
        rest = sum(ranges) - ranges[place]
        if rest > 0 and ranges[place] >= DROWNING * rest:
            text = (
                f"weight {weights[place]:g} drowns the others: its range is {ranges[place]:g}, theirs {rest:g} together"
            )
            found.append(Finding("error", trial.name, "weight", text))
    return found
