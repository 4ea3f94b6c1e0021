"""What combinators are made of: reward functions as parts, called by name like the trainer calls them.

A combination of per-sample functions is a per-sample function; with one batch function in it, it is a batch function,
and per-sample parts are called once a row. Its signature is the union of what the parts name, so that the trainer
gives it what they need. Parts may be async; then the combination is. What a part returns is checked here, where its
name is known: a NaN that a clip turns into a number would be a fault that nobody sees.
Left out: timeouts and faults (the caller's), text notes of a Score (numeric ones are logged).
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

from rewards.score import Score

Kind = Literal["batch", "sample"]
Values = list[float | None]
Rule = Callable[[Sequence[Values], Mapping[str, Any]], Values]
"""Values of every part, one per row, and the arguments (lists over rows; `SHARED` as they are) -> one value per row."""

SHARED = frozenset({"trainer_state", "log_extra", "log_metric"})
_IN_BATCH = {"completion": "completions", "prompt": "prompts"}
_ATOMS = (str, int, float, bool, type(None))


class Part:
    """One reward function and what it names.

    Raises:
        TypeError: it is no function of completions, or of a completion.

    >>> Part(lambda completion, answer, scale=1: 1.0).required
    ['completion', 'answer']
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = name_of(function)
        if isinstance(function, type) or not callable(function):
            raise TypeError(f"{self.name} is no reward function (want a function, or an object that can be called)")
        bound = function.keywords if isinstance(function, functools.partial) else {}
        found = {name: each for name, each in inspect.signature(function).parameters.items() if name not in bound}
        self.takes_all = any(each.kind is each.VAR_KEYWORD for each in found.values())
        named = {
            name: each for name, each in found.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        }
        self.required = [name for name, each in named.items() if each.default is each.empty]
        self.optional = [name for name in named if name not in self.required]
        self.bound = frozenset(bound)
        if "completion" not in named and not {"completions", "prompts"} & set(named):
            raise TypeError(f"{self.name} has neither a parameter 'completions' nor 'completion'")
        self.kind: Kind = "sample" if "completion" in named else "batch"

    def takes(self, name: str) -> bool:
        """Whether it is given an argument of this name."""
        named = name in self.required or name in self.optional
        return named or (self.takes_all and name not in self.bound and name != "messages")


def name_of(function: Any) -> str:
    """The metric name that the trainer uses: `__name__` with partials unwrapped, else the name of the class.

    >>> name_of(functools.partial(name_of))
    'name_of'
    """
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


def per_row(shape: Callable[[float | None, Mapping[str, Any]], float | None]) -> Rule:
    """A rule of one part out of a function of its value in a row and of the arguments of that row.

    >>> per_row(lambda value, given: value * given["scale"])([[1.0, 2.0]], {"scale": [3, 4]})
    [3.0, 8.0]
    """

    def rule(values: Sequence[Values], given: Mapping[str, Any]) -> Values:
        return [shape(value, _row(given, row)) for row, value in enumerate(values[0])]

    return rule


def _row(given: Mapping[str, Any], row: int) -> dict[str, Any]:
    return {name: value if name in SHARED else value[row] for name, value in given.items()}


class Combined:
    """A reward function made of others, in one of the two signatures.

    Args:
        functions: the parts.
        rule: what is made of their values.
        needs: arguments that the rule needs beside those of the parts, by their names in the batch form or of columns.
        kind: "batch" where the rule compares completions.
        name: of the metric; None: that of the first part.
        suffix: behind the name.
        rows: rows that part `k` is asked about (`rows(k, given)`); None: all. The others are None.

    >>> def short(completion, limit): return float(len(completion) <= limit)
    >>> both = Combined([short, lambda completion: 1.0], lambda values, given: [a + b for a, b in zip(*values)])
    >>> both.__name__, both(completion="abc", limit=2)
    ('short', 1.0)
    >>> inspect.signature(both)
    <Signature (*, completion, limit, log_metric=None)>
    """

    def __init__(
        self,
        functions: Sequence[Callable[..., Any]],
        rule: Rule,
        *,
        needs: Sequence[str] = (),
        kind: Kind | None = None,
        name: str | None = None,
        suffix: str = "",
        rows: Callable[[int, Mapping[str, Any]], Sequence[int]] | None = None,
    ) -> None:
        if not functions:
            raise ValueError("nothing to combine (want at least one reward function)")
        self.parts = [Part(function) for function in functions]
        self.kind: Kind = kind or ("batch" if any(part.kind == "batch" for part in self.parts) else "sample")
        self.__name__ = (name or self.parts[0].name) + suffix
        self.__signature__ = self._signature(needs)
        self._rule = rule
        self._rows = rows

    def __repr__(self) -> str:
        return f"<reward {self.__name__} of {', '.join(part.name for part in self.parts)}>"

    def _signature(self, needs: Sequence[str]) -> inspect.Signature:
        required = ["completions" if self.kind == "batch" else "completion", *needs]
        optional = ["log_metric"]
        for part in self.parts:
            for own, into in ((part.required, required), (part.optional, optional)):
                for name in own:
                    into += self._own_names(name, part)
        names = dict.fromkeys([*required, *optional])
        given = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=inspect.Parameter.empty if name in required else None
            )
            for name in names
        ]
        if any(part.takes_all for part in self.parts):
            given.append(inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD))
        return inspect.Signature(given)

    def _own_names(self, name: str, part: Part) -> list[str]:
        """What this combination has to be given so that `part` gets `name`."""
        if self.kind == "sample" or part.kind == "batch":
            return [name]
        return ["prompts", "completions"] if name == "messages" else [_IN_BATCH.get(name, name)]

    def __call__(self, **given: Any) -> Any:
        """The value of one completion, or the list of those of a batch; awaitable when a part is."""
        is_batch = self.kind == "batch"
        table = given if is_batch else {name: v if name in SHARED else [v] for name, v in given.items()}
        count = len(table["completions"]) if is_batch else 1
        logged: dict[str, list[Any]] = {}
        asked: list[tuple[Part, Sequence[int], list[Any]]] = []
        for place, part in enumerate(self.parts):
            rows = range(count) if self._rows is None else self._rows(place, table)
            asked.append((part, rows, self._ask(part, rows, table, logged, count)))
        if any(inspect.isawaitable(answer) for _, _, answers in asked for answer in answers):
            return self._awaited(asked, table, logged, count)
        return self._settled(asked, table, logged, count)

    def _ask(self, part: Part, rows: Sequence[int], table: Mapping[str, Any], logged: Any, count: int) -> list[Any]:
        """The answers of a part: one of a batch function, one per row of a sample function, none for no rows."""
        if self.kind == "sample":
            return [part.function(**_taken(part, _row(table, row))) for row in rows]
        if part.kind == "sample":
            return [part.function(**_taken(part, _single(table, row, logged, count))) for row in rows]
        if not rows:
            return []
        some = {name: v if name in SHARED else [_copied(v[row]) for row in rows] for name, v in table.items()}
        some |= {"log_extra": functools.partial(_log_rows, logged, count, rows)} if "log_extra" in table else {}
        return [part.function(**_taken(part, some))]

    async def _awaited(self, asked: Any, table: Mapping[str, Any], logged: Any, count: int) -> Any:
        import asyncio  # takes as long to import as everything else here together

        async def answered(answer: Any) -> Any:
            return await answer if isinstance(answer, Awaitable) else answer

        done = [(p, rows, await asyncio.gather(*map(answered, answers))) for p, rows, answers in asked]
        return self._settled(done, table, logged, count)

    def _settled(self, asked: Any, table: Mapping[str, Any], logged: Any, count: int) -> Any:
        log = table.get("log_metric")
        values: list[Values] = []
        for part, rows, answers in asked:
            column: Values = [None] * count
            for row, answer in zip(rows, _answers(part, answers, len(rows)), strict=True):
                column[row] = _number(part, row, answer, log)
                if log is not None and len(self.parts) > 1 and column[row] is not None:
                    log(part.name, column[row])
            values.append(column)
        for name, cells in logged.items():
            table["log_extra"](name, cells)
        result = self._rule(values, table)
        return result if self.kind == "batch" else result[0]

    def state_dict(self) -> dict[str, Any]:
        """The states of those parts that have one, by their place."""
        return {str(place): owner.state_dict() for place, owner in self._owners()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        for place, owner in self._owners():
            if str(place) in state:
                owner.load_state_dict(state[str(place)])

    def _owners(self) -> list[tuple[int, Any]]:
        owners = [(place, getattr(part.function, "__self__", part.function)) for place, part in enumerate(self.parts)]
        return [(place, owner) for place, owner in owners if callable(getattr(owner, "load_state_dict", None))]


# --- what goes in ---------------------------------------------------------------------------------------------


def _taken(part: Part, given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if part.takes(name)}


def _copied(value: Any) -> Any:
    """A copy, so that a part that changes its arguments harms no other."""
    if isinstance(value, list):
        return [each if type(each) in _ATOMS else _copied(each) for each in value]
    return {name: _copied(each) for name, each in value.items()} if type(value) is dict else value


def _single(table: Mapping[str, Any], row: int, logged: dict[str, list[Any]], count: int) -> dict[str, Any]:
    """The arguments of a batch as those of one row: text for messages, and singular names."""
    given = {name: value if name in SHARED else _copied(value[row]) for name, value in table.items()}
    completion, prompt = given.pop("completions"), given.pop("prompts", None)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    text = completion if isinstance(completion, str) else "".join(str(each["content"]) for each in completion)
    given |= {"completion": text, "messages": [*before, {"role": "assistant", "content": text}]}
    given |= {"prompt": prompt} if prompt is not None else {}
    given |= {"log_extra": functools.partial(_log_cell, logged, count, row)} if "log_extra" in given else {}
    return given


def _log_cell(logged: dict[str, list[Any]], count: int, row: int, name: str, value: Any) -> None:
    logged.setdefault(name, [None] * count)[row] = value


def _log_rows(logged: dict[str, list[Any]], count: int, rows: Sequence[int], name: str, values: Sequence[Any]) -> None:
    for row, value in zip(rows, values, strict=True):
        _log_cell(logged, count, row, name, value)


# --- what comes out -------------------------------------------------------------------------------------------


def _answers(part: Part, answers: list[Any], count: int) -> Sequence[Any]:
    """One answer per row that was asked about. Nothing is broadcast."""
    if part.kind == "sample" or not count:
        return answers
    found = answers[0].tolist() if hasattr(answers[0], "tolist") else answers[0]
    if not isinstance(found, list | tuple):
        raise TypeError(f"{part.name} returned {type(found).__name__} (want a list of {count} numbers or None)")
    if len(found) != count:
        raise ValueError(f"{part.name} returned {len(found)} rewards for {count} completions")
    return found


def _number(part: Part, row: int, answer: Any, log: Callable[[str, float], None] | None) -> float | None:
    if isinstance(answer, Score):
        for name, note in answer.notes.items():
            if log is not None and note is not None and not isinstance(note, str):
                log(f"{part.name}_{name}", float(note))
        answer = answer.value
    if answer is None:
        return None
    value = answer.item() if hasattr(answer, "item") else answer
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{part.name} returned {type(answer).__name__} in row {row} (want a number or None)")
    if not math.isfinite(value):
        raise ValueError(f"{part.name} returned {value} in row {row} (want a finite number)")
    return float(value)
