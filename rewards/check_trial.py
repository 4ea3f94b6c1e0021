"""One reward function on trial: every try shown to it three times, and what is wrong with the scores.

Source and left out: see check.py, which adds what concerns several functions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from rewards.check_calls import Caller, Fault, NoAnswer, Untried
from rewards.check_report import Finding, Setting
from rewards.probes import GOLD_COLUMNS, Try, anywhere, around, around_whole, gold_text, golds, number_of, plain_prompt

Value = float | Fault | None
LABEL_NAMES = ("task", "task_type", "type", "kind", "domain", "category", "source", "data_source", "subject", "ability")
MAX_PRESENTATIONS = 3


class Trial:
    """One function and what it made of every try.

    >>> trial = Trial(Caller(lambda completion: len(completion) / 1e5, ["prompt"]), [{"prompt": "hm"}], Setting())
    >>> trial.run()
    >>> trial.top, trial.blind, trial.findings()
    (0.5, True, [])

    Attributes:
        values: score of each try; other: the scores of the second call and of the call in another order.
    """

    def __init__(self, caller: Caller, rows: Sequence[Mapping[str, Any]], plan: Setting) -> None:
        self.caller, self.name, self.rows, self.plan = caller, caller.name, rows, plan
        self.column, self.answers, self.whole = _answers(rows, plan)
        self.maximum = plan.maximum.get(self.name) if isinstance(plan.maximum, Mapping) else plan.maximum
        self.values: dict[Try, Value] = {}
        self.changed: dict[Try, tuple[Value, Value]] = {}

    # --- trying ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Every try, three times."""
        try:
            self._run()
        finally:
            self.caller.close()

    def _run(self) -> None:
        forms = {"as given": "{answer}"} if self.whole else self.plan.presentations
        self._score([one for row, answer in self.answers.items() for one in golds(row, answer, forms)])
        self.accepted = self._accepted(forms)
        tries = [one for row in range(len(self.rows)) for one in anywhere(row, plain_prompt(self._prompt(row)))]
        for name in self.accepted:
            for row in self.answers:
                if self.whole:
                    tries += around_whole(row, self.answers, name)
                else:
                    tries += around(row, self.answers, name, forms[name], self.plan.prefill)
        self._score([one for one in tries if one.name not in self.plan.skip and one not in self.values])
        self._alone()
        self._again()
        scores = list(self.numbers().values())
        self.top = self.maximum if self.maximum is not None else max(scores, default=0.0)
        self.bottom = min(scores, default=0.0)
        self.blind = self._is_blind()
        self.slack = (0.5 if self.blind else 0.05) * max(self.top - self.bottom, 0.0)

    def _prompt(self, row: int) -> Any:
        return self.rows[row].get("prompt", "")

    def _batches(self, tries: Sequence[Try]) -> list[list[Try]]:
        """The tries of a row together, as a group is in training."""
        by_row: dict[int, list[Try]] = defaultdict(list)
        for one in tries:
            by_row[one.row].append(one)
        return list(by_row.values())

    def _score(self, tries: Sequence[Try]) -> None:
        for batch in self._batches(tries):
            for one, value in zip(batch, self.caller.scores(batch, self.rows), strict=True):
                self.values[one] = value

    def _alone(self) -> None:
        """One completion in a call of its own: a result that is squeezed then fails in training too."""
        if self.caller.form == "batch":
            one = replace(next(iter(self.values)), name="one completion alone", want="any")
            self.values[one] = self.caller.scores([one], self.rows)[0]

    def _again(self) -> None:
        """The same batches a second time, then in reverse, from the last row to the first."""
        batches = self._batches(list(self.values))
        first = {one: value for batch in batches for one, value in self._scored(batch)}
        reversed_ = {one: value for batch in batches[::-1] for one, value in self._scored(batch[::-1])}
        for one, value in list(self.values.items()):
            for other in (first[one], reversed_[one]):
                if isinstance(other, NoAnswer):
                    self.values[one] = other
                elif other != value and not isinstance(other, Untried):
                    self.changed.setdefault(one, (value, other))

    def _scored(self, batch: Sequence[Try]) -> list[tuple[Try, Value]]:
        return list(zip(batch, self.caller.scores(batch, self.rows), strict=True))

    def numbers(self, *wants: str) -> dict[Try, float]:
        """The tries that got a number, of these kinds (default: all)."""
        return {
            one: value
            for one, value in self.values.items()
            if isinstance(value, float) and (not wants or one.want in wants)
        }

    def _accepted(self, forms: Mapping[str, str]) -> list[str]:
        """The presentations in which most right answers score highest, at most MAX_PRESENTATIONS of them."""
        found = self.numbers("gold")
        top = max(found.values(), default=0.0) if self.maximum is None else self.maximum
        hits = {name: sum(value >= top for one, value in found.items() if one.presentation == name) for name in forms}
        best = sorted(forms, key=lambda name: -hits[name])
        good = [name for name in best if hits[name] and 2 * hits[name] >= hits[best[0]]]
        return good[:MAX_PRESENTATIONS] or best[:1]

    def _is_blind(self) -> bool:
        """Whether right and wrong answers (of one length, where there are such) always score the same."""
        gold = {(one.row, one.presentation): (one, value) for one, value in self.numbers("gold").items()}
        wrong = [(one, v) for one, v in self.numbers("low").items() if one.name in ("wrong answer", _FOREIGN)]
        pairs = [(*gold[key], *each) for each in wrong if (key := (each[0].row, each[0].presentation)) in gold]
        pairs = [pair for pair in pairs if len(pair[0].text) == len(pair[2].text)] or pairs
        return all(abs(right - other) <= 1e-12 for _, right, _, other in pairs)

    # --- judging ---------------------------------------------------------------------------------------------

    def findings(self) -> list[Finding]:
        """All findings on this function alone."""
        return [*self._judged(), *self._cost()]

    def _judged(self) -> list[Finding]:
        found = [*self._faults(), *self._changes(), *self._nones()]
        scores = set(self.numbers().values())
        if len(scores) == 1 and len(self.values) > 1:
            return [*found, self._error("constant", f"every one of {len(self.values)} tries scores {scores.pop():g}")]
        if not scores:
            return found
        if self.blind and self.column in self.caller.named:
            text = f"takes {self.column!r}, but right and wrong answers score the same"
            found.append(self._error("blind", text, sorted(self.answers)))
        elif self.blind and self.answers:
            found.append(self._note("blind", "does not look at the answer: only its format tries are judged"))
        if self.blind:
            return [*found, *self._tops()]
        return [*found, *self._golds(), *self._tops(), *self._lows()]

    def _error(self, kind: str, text: str, rows: Iterable[int] = (), column: str | None = None) -> Finding:
        return self._finding("error", kind, text, rows, column)

    def _note(self, kind: str, text: str, rows: Iterable[int] = (), column: str | None = None) -> Finding:
        return self._finding("note", kind, text, rows, column)

    def _finding(
        self, level: Literal["error", "note"], kind: str, text: str, rows: Iterable[int], column: str | None
    ) -> Finding:
        places = tuple(dict.fromkeys(row + 1 for row in rows))
        return Finding(level, self.name, kind, text, places, self.column if column is None else column)

    def _faults(self) -> Iterable[Finding]:
        kinds: dict[str, list[Try]] = defaultdict(list)
        for one, value in self.values.items():
            if isinstance(value, Fault):
                kinds[re.sub(r"\d+", "#", value)].append(one)
        for tries in list(kinds.values())[:10]:
            text = self.values[tries[0]]
            yield self._error("fault", f"{text}, on {_named(tries)}", [one.row for one in tries], "")

    def _changes(self) -> Iterable[Finding]:
        if self.changed:
            one, (before, after) = next(iter(self.changed.items()))
            text = f"scores change between calls or with order, on {len(self.changed)} tries: {before} and {after}, "
            yield self._error("changing", text + f"on {_named([one])}", [each.row for each in self.changed], "")
        if self.caller.mutations:
            tries = [one for one, _ in self.caller.mutations]
            text = f"changes its inputs: {self.caller.mutations[0][1]!r}"
            yield self._error("mutation", text, [one.row for one in tries], "")

    def _cost(self) -> Iterable[Finding]:
        p99 = _percentile(self.caller.seconds, 0.99)
        if p99 > self.plan.p99_s:
            yield self._error("slow", f"p99 is {p99:.2g} s a completion (want at most {self.plan.p99_s:g} s)")

    def _nones(self) -> Iterable[Finding]:
        """Rows of which every try was None: all of them, or where no label explains it."""
        without = self.none_rows()
        if len(without) == len(self.rows):
            yield self._error("none", "returns None for every row: it applies to none of them", without, "")
        elif without and not self.none_labels():
            yield self._note("none", "returns None, whatever the completion", without)

    def none_rows(self) -> list[int]:
        """Rows for which nothing but None came."""
        with_value = {one.row for one, value in self.values.items() if value is not None}
        return [row for row in range(len(self.rows)) if row not in with_value]

    def none_labels(self) -> list[tuple[str, Any, list[int]]]:
        """(column, value, rows) of each value of a label column for which all rows are None."""
        none = set(self.none_rows())
        found = []
        for column in _label_columns(self.rows):
            rows_of: dict[Any, list[int]] = defaultdict(list)
            for row, values in enumerate(self.rows):
                rows_of[values.get(column)].append(row)
            found += [(column, value, rows) for value, rows in rows_of.items() if none.issuperset(rows)]
        return found if len(none) < len(self.rows) else []

    def _golds(self) -> Iterable[Finding]:
        best: dict[int, float] = {}
        for one, value in self.numbers("gold").items():
            best[one.row] = max(value, best.get(one.row, value))
        for level in sorted({value for value in best.values() if value < self.top - self.slack}):
            rows = [row for row, value in best.items() if value == level]
            text = f"the right answer gets at most {level:g} of {self.top:g} in every presentation"
            yield self._error("gold", text, rows)

    def _tops(self) -> Iterable[Finding]:
        """Variants that should score as the plain form does."""
        gold = {(one.row, one.presentation): value for one, value in self.numbers("gold").items()}
        lost: dict[tuple[str, str], list[Try]] = defaultdict(list)
        kept: set[str] = set()
        for one, value in self.numbers("top", "top?", "spelling").items():
            if gold.get((one.row, one.presentation), self.bottom) < self.top - self.slack:
                continue
            if value < self.top - self.slack:
                lost[one.name, one.want].append(one)
            elif one.want == "spelling":
                kept.add(one.name)
        numeric = kept or all(number_of(answer) is not None for answer in self.answers.values())
        for (name, want), tries in lost.items():
            text = f"a right answer scores {self.values[tries[0]]:g} of {self.top:g} with {name} {_form(tries)}"
            serious = want == "top" or (want == "spelling" and numeric)
            yield (self._error if serious else self._note)("gold", text, [one.row for one in tries])

    def _lows(self) -> Iterable[Finding]:
        """What must not reach the maximum."""
        high: dict[tuple[str, str], list[Try]] = defaultdict(list)
        for one, value in self.numbers("low", "low?").items():
            if value >= self.top - self.slack:
                high[one.name, one.want].append(one)
        for (name, want), tries in high.items():
            chance = name == "prompt copied back" and 5 * len(tries) <= len(self.rows)
            report = self._note if want == "low?" or chance else self._error
            text = f"{name} scores {self.values[tries[0]]:g} of {self.top:g} {_form(tries)}"
            yield report("wrong", text, [one.row for one in tries])

    def summary(self) -> dict[str, float | None]:
        """Numbers of one line of the report."""
        gold = [value for one, value in self.numbers("gold").items() if one.presentation in self.accepted]
        none = sum(value is None for value in self.values.values())
        return {
            "tries": float(len(self.values)),
            "gold": sum(gold) / len(gold) if gold else None,
            "top": self.top,
            "bottom": self.bottom,
            "none_frac": none / max(len(self.values), 1),
            "p50_s": _percentile(self.caller.seconds, 0.5),
            "p99_s": _percentile(self.caller.seconds, 0.99),
        }


_FOREIGN = "another row's answer"


def _answers(rows: Sequence[Mapping[str, Any]], plan: Setting) -> tuple[str, dict[int, str], bool]:
    """(column, row → right answer, whether these are whole completions)."""
    if callable(plan.gold):
        made = {row: text for row, values in enumerate(rows) if (text := plan.gold(values))}
        return "", made, True
    columns = GOLD_COLUMNS if plan.gold is None else (plan.gold,)
    column = next((name for name in columns if any(row.get(name) is not None for row in rows)), "")
    if plan.gold is not None and not column:
        raise ValueError(f"check: no column {plan.gold!r} (columns: {', '.join(rows[0])})")
    return column, {row: text for row, values in enumerate(rows) if (text := gold_text(values.get(column)))}, False


def _label_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that sort rows into kinds: those called so, and those of few different short values."""
    found = []
    for column in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(column) for row in rows]
        if column == "prompt" or not all(isinstance(value, str | int | bool | None) for value in values):
            continue
        distinct = len(set(values))
        named = column in LABEL_NAMES
        if 2 <= distinct <= 20 and (named or (column not in GOLD_COLUMNS and 2 * distinct <= len(rows))):
            found.append(column)
    return found


def _named(tries: Sequence[Try]) -> str:
    names = list(dict.fromkeys(repr(one.name) for one in tries))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _form(tries: Sequence[Try]) -> str:
    forms = list(dict.fromkeys(one.presentation for one in tries if one.presentation))
    return f"[{'; '.join(forms)}]" if forms else ""


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0
