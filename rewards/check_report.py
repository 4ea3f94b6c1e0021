"""What `rewards.check` is told (`Setting`) and what it tells (`Finding`, `Report`).

Source: the points of view of linters: an error ends with exit code 1, a note is worth knowing.
Left out: anything that looks at a reward function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rewards.probes import PRESENTATIONS


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong ("error") or worth knowing ("note"). Rows count from 1, as in the trainer's messages.

    >>> print(Finding("error", "mine", "gold", "is 0 on the right answer", (3, 7), "answer"))
    error: mine: is 0 on the right answer (row 3, 7, column 'answer')
    """

    level: Literal["error", "note"]
    function: str
    kind: str
    text: str
    rows: tuple[int, ...] = ()
    column: str = ""

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.rows[:4])) + (", …" if len(self.rows) > 4 else "")
        where = f" (row {shown}{f', column {self.column!r}' if self.column else ''})" if self.rows else ""
        return f"{self.level}: {self.function}: {self.text}{where}"


@dataclass
class Report:
    """What `check` found. `ok` when there is no error; `str(report)` is one table for people.

    Attributes:
        findings: errors first.
        summary: per function, numbers by name: calls, gold (mean score), top, bottom, none_frac, p50_s, p99_s.
    """

    findings: list[Finding] = field(default_factory=list)
    summary: dict[str, dict[str, float | None]] = field(default_factory=dict)

    @property
    def errors(self) -> list[Finding]:
        """The findings that are errors."""
        return [finding for finding in self.findings if finding.level == "error"]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def __str__(self) -> str:
        lines = []
        for name, numbers in self.summary.items():
            shown = "  ".join(f"{key} {'-' if value is None else f'{value:.3g}'}" for key, value in numbers.items())
            lines.append(f"{name}: {shown}")
        return "\n".join([*lines, *(f"  {finding}" for finding in self.findings), f"{len(self.errors)} errors"])


@dataclass(frozen=True)
class Setting:
    """How `check` looks.

    Attributes:
        gold: column of the right answer, or a function of a row that gives a right completion; None: `answer`,
            `solution`, `ground_truth`, `target`, `gold` or `label`, the first there is.
        presentations: name → text with `{answer}` in it; `{"mine": "…{answer}…"}` when the usual ones do not fit.
        maximum: score of a right answer, or those of functions by name; None: the highest seen.
        prefill: what the chat template puts in front of every completion, e.g. "<think>\\n".
        p99_s: seconds that a completion may take (99th percentile).
        skip: names of tries, or kinds of findings, that do not matter here.
        tokenize: text to token ids, for rewards that look at `completion_ids`.
        without: names that the trainer at hand does not provide, e.g. ("prefill",).
        timeout_s: seconds that one call may take, in a copy of this process that is killed then; None: no limit.
        in_process: names of functions that are called in this process, without a limit: those on a GPU.
    """

    gold: str | Callable[[Mapping[str, Any]], str | None] | None = None
    presentations: Mapping[str, str] = field(default_factory=lambda: PRESENTATIONS)
    maximum: float | Mapping[str, float] | None = None
    prefill: str = ""
    p99_s: float = 1.0
    skip: Sequence[str] = ()
    tokenize: Callable[[str], Sequence[int]] | None = None
    without: Sequence[str] = ()
    timeout_s: float | None = 10.0
    in_process: Sequence[str] = ()
