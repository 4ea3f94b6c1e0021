"""Calls of a reward function outside a run: arguments by name, copies compared afterwards, time taken.

    batch   f(prompts, completions, **columns) -> list[float | None]
    sample  f(completion, answer, …)           -> float | None | Score

Only for `rewards.check`: the trainer has its own caller, with the same rules for what a reward is.
With a limit of time the calls are made in a copy of this process (check_fork.py), which is killed when one gives no
answer; after MAX_HANGS of these the function is called no more.
Left out: workers that import the function by name (rewards/worker.py), which lambdas and closures do not have.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from rewards.check_fork import Death, Fork, Hang
from rewards.probes import Try
from rewards.score import Score

MAX_REWARD = 1e6
MAX_HANGS = 3
INJECTED = ("prompts", "prompt", "completions", "completion", "completion_ids", "truncated", "trainer_state",
            "log_extra", "log_metric", "messages", "prefill")  # fmt: skip


class Fault(str):
    """Why a completion has no value, in words.

    >>> Fault("returned nan")
    'returned nan'
    """


class NoAnswer(Fault):
    """No answer within the limit, or the process of the call ended.

    >>> isinstance(NoAnswer("x"), Fault)
    True
    """


class Untried(Fault):
    """Not called, after too many calls without an answer.

    >>> isinstance(Untried("x"), Fault)
    True
    """


class Caller:
    """One function, its form ("batch" or "sample") and what it may be given.

    Args:
        function: the reward.
        columns: names of the rows' columns.
        tokenize: text to token ids, for `completion_ids`; None: its UTF-8 bytes.
        without: names of INJECTED that the trainer at hand does not provide.
        timeout_s: seconds of a call; None: calls are made in this process, without a limit.
        name: in findings; None: the function's own.

    Raises:
        ValueError: neither or both of `completion` and `completions`, or a parameter that nothing provides.

    >>> Caller(lambda completion, answer: 1.0, ["prompt", "answer"]).form
    'sample'
    """

    def __init__(
        self,
        function: Callable[..., Any],
        columns: Sequence[str],
        tokenize: Callable[[str], Sequence[int]] | None = None,
        without: Sequence[str] = (),
        timeout_s: float | None = None,
        name: str | None = None,
    ) -> None:
        self.function = function
        self.name = name or name_of(function)
        self.timeout_s = timeout_s
        self._fork: Fork | None = None
        self._num_hangs = 0
        self.columns = [name for name in columns if name not in ("prompt", "completion", "prompts", "completions")]
        self.tokenize = tokenize or (lambda text: list(text.encode("utf-8", "surrogatepass")))
        parameters = inspect.signature(function).parameters.values()
        bound = function.keywords if isinstance(function, functools.partial) else {}
        self.takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
        self.named = {each.name: each for each in parameters if each.name not in bound and each.kind not in _STARRED}
        batch = [name for name in ("completions", "prompts") if name in self.named]
        if bool(batch) == ("completion" in self.named):
            raise ValueError(f"{self.name}: wants one of the parameters 'completion' and 'completions'")
        self.form = "batch" if batch else "sample"
        self.provided = {name for name in INJECTED if name not in without}
        for each in self.named.values():
            known = each.name in self.provided or each.name in self.columns
            if each.default is each.empty and not known:
                raise ValueError(f"{self.name}: parameter {each.name!r} is provided by nothing ({', '.join(columns)})")
        self.seconds: list[float] = []
        self.mutations: list[tuple[Try, str]] = []

    def scores(self, tries: Sequence[Try], rows: Sequence[Mapping[str, Any]]) -> list[float | Fault | None]:
        """One value per try. A batch function gets all at once; where that fails, one at a time, to say which."""
        if self.form == "sample":
            return [self._call([one], rows)[0] for one in tries]
        found = self._call(tries, rows)
        if len(tries) > 1 and _failed_as_a_whole(found[0]):
            return [self._call([one], rows)[0] for one in tries]
        return found

    def close(self) -> None:
        """End the copy in which calls were made."""
        if self._fork is not None:
            self._fork.close()

    def _call(self, tries: Sequence[Try], rows: Sequence[Mapping[str, Any]]) -> list[float | Fault | None]:
        if self.timeout_s is None:
            made = self._made(tries, rows)
        elif self._num_hangs >= MAX_HANGS:
            return [Untried(f"is not called any more after {MAX_HANGS} calls without an answer")] * len(tries)
        else:
            self._fork = self._fork or Fork(lambda each: self._made(each, rows), self.timeout_s)
            try:
                made = self._fork(list(tries))
            except (Hang, Death) as end:
                self._num_hangs += 1
                late = f"gave no answer within {self.timeout_s:g} s (killed)"
                return [NoAnswer(late if isinstance(end, Hang) else str(end))] * len(tries)
        self.seconds += [made["seconds"] / len(tries)] * len(tries)
        if made["changed"] is not None:
            self.mutations.append((tries[0], made["changed"]))
        return [Fault(value["fault"]) if isinstance(value, dict) else value for value in made["values"]]

    def _made(self, tries: Sequence[Try], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One call, as JSON values: `values` (a fault as {"fault": text}), `seconds`, name of the `changed` input."""
        given = self._arguments(tries, rows)
        before = copy.deepcopy({name: value for name, value in given.items() if not callable(value)})
        start = time.perf_counter()
        try:
            result = self.function(**given)
            if inspect.isawaitable(result):
                result = _awaited(result)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the boundary to user code: sys.exit() in a reward is an error too
            result = Fault(f"raised {type(error).__name__}: {str(error)[:120]}")
        seconds = time.perf_counter() - start
        changed = next((name for name, value in before.items() if given[name] != value), None)
        if isinstance(result, Fault):
            values: list[float | Fault | None] = [result] * len(tries)
        else:
            values = _values(result, len(tries)) if self.form == "batch" else [to_number(result)]
        shown = [{"fault": str(value)} if isinstance(value, Fault) else value for value in values]
        return {"values": shown, "seconds": seconds, "changed": changed}

    def _arguments(self, tries: Sequence[Try], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lists = {
            name: [_MAKERS[name](one, rows[one.row], self) for one in tries] for name in _MAKERS if self._wants(name)
        }
        for name in self.columns:
            if name not in lists and self._wants(name):
                lists[name] = [copy.deepcopy(rows[one.row].get(name)) for one in tries]
        batch = self.form == "batch"
        given: dict[str, Any] = {name: values if batch else values[0] for name, values in lists.items()}
        given |= {"trainer_state": SimpleNamespace(global_step=0, max_steps=1, epoch=0.0)}
        given |= dict.fromkeys(("log_extra", "log_metric"), _ignore)
        return {name: value for name, value in given.items() if self._wants(name)}

    def _wants(self, name: str) -> bool:
        if name in INJECTED and (name not in self.provided or name in _OF_THE_OTHER[self.form]):
            return False
        return name in self.named or (self.takes_all and name not in ("messages", "prefill"))


def _failed_as_a_whole(value: Any) -> bool:
    return isinstance(value, NoAnswer) or (isinstance(value, Fault) and value.startswith("raised"))


def _prompt(one: Try, row: Mapping[str, Any], caller: Caller) -> Any:
    return copy.deepcopy(row.get("prompt", ""))


def _said(one: Try, row: Mapping[str, Any], caller: Caller) -> Any:
    """Text for a text prompt, one assistant message for chat, as the trainer gives it."""
    return one.text if isinstance(row.get("prompt", ""), str) else [{"role": "assistant", "content": one.text}]


def _conversation(one: Try, row: Mapping[str, Any], caller: Caller) -> list[Any]:
    prompt = _prompt(one, row, caller)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*before, {"role": "assistant", "content": one.text}]


_MAKERS: dict[str, Callable[[Try, Mapping[str, Any], Caller], Any]] = {
    "prompt": _prompt,
    "prompts": _prompt,
    "completion": lambda one, row, caller: one.text,
    "completions": _said,
    "completion_ids": lambda one, row, caller: list(caller.tokenize(one.text)),
    "truncated": lambda one, row, caller: False,
    "messages": _conversation,
    "prefill": lambda one, row, caller: one.prefill,
}
_OF_THE_OTHER = {"batch": ("prompt", "completion"), "sample": ("prompts", "completions")}
_STARRED = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def name_of(function: Any) -> str:
    """`__name__`, through partials, else the name of the class.

    >>> name_of(functools.partial(print)), name_of(Fault("x"))
    ('print', 'Fault')
    """
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


def to_number(value: Any) -> float | Fault | None:
    """A reward as float, None (does not apply) or a `Fault`: the trainer's rules, without numpy.

    >>> to_number(True), to_number(Score(0.5)), to_number(None), to_number("1"), to_number(float("nan"))
    (1.0, 0.5, None, "returned str '1' (want a number or None)", 'returned nan (want a finite number)')
    """
    value = value.value if isinstance(value, Score) else value
    if not isinstance(value, int | float) and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # numpy scalars, 0-d arrays and tensors
    if value is None:
        return None
    if not isinstance(value, int | float):
        return Fault(f"returned {type(value).__name__} {repr(value)[:40]} (want a number or None)")
    if isinstance(value, float) and not math.isfinite(value):
        return Fault(f"returned {value} (want a finite number)")
    return Fault(f"returned a number over {MAX_REWARD:g} in size") if abs(value) > MAX_REWARD else float(value)


def _values(result: Any, count: int) -> list[float | Fault | None]:
    """What a batch function returned, taken apart. Nothing is broadcast."""
    if getattr(result, "ndim", None) == 1 and hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, list | tuple):
        return [Fault(f"returned {type(result).__name__} (want a list of {count} numbers or None)")] * count
    if len(result) != count:
        return [Fault(f"returned {len(result)} values for {count} completions")] * count
    return [to_number(value) for value in result]


def _awaited(awaitable: Any) -> Any:
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    async def main() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    with ThreadPoolExecutor(1) as pool:  # a notebook's own loop runs in this thread
        return pool.submit(lambda: asyncio.run(main())).result()


def _ignore(*_: Any) -> None:
    """Stands in for log_metric and log_extra."""
