"""Which length to try next, so that few tries find the longest one that fits.

A peak grows linearly with the length and a step's time with its square at most, so two short tries predict both:

    peak(T) = c + m·T        seconds(T) = a·T + b·T²

The predicted length is tried, then a little more until something fails, then less by growing steps and halves of what
lies between, until the longest that passed and the shortest that failed are 2.5 % apart. A length that would outlast
the budget is not begun; the search then ends at the longest that the budget allows and says so.
Left out: memory that does not grow linearly. The line is drawn anew through the two longest tries each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PRECISION = 0.025
_MARGIN = 0.98  # of the predicted length: the allocator cannot use a card to the last byte
Row = dict[str, Any]  # tokens; peak_gib, seconds, wall_s where it passed, failed where it did not


@dataclass
class Search:
    """The tries of one method.

    Attributes:
        capacity_gib: of the card; the predicted peak may reach it.
        budget_s: seconds for all tries.
        most: no length above this is tried.
        step: lengths are multiples of this.
        max_tries: probes included.
    """

    capacity_gib: float
    budget_s: float
    most: int
    step: int = 512
    max_tries: int = 12
    rows: list[Row] = field(default_factory=list)
    limited_by: str = ""

    @property
    def longest(self) -> int | None:
        """The longest length that passed."""
        return max((row["tokens"] for row in self.rows if "failed" not in row), default=None)

    @property
    def fails_at(self) -> int | None:
        """The shortest length that failed."""
        return min((row["tokens"] for row in self.rows if "failed" in row), default=None)

    def run(self, attempt: Callable[[int], Row], probes: tuple[int, int], clock: Callable[[], float]) -> None:
        """Try the probes, then what they predict. `attempt` returns a row; failures are rows too."""
        start = clock()
        for probe in probes:
            if self.fails_at is None:
                self.rows.append(attempt(probe))
        while (tokens := self._next(self.budget_s - (clock() - start))) is not None:
            self.rows.append(attempt(tokens))

    def _next(self, seconds_left: float) -> int | None:
        """The length to try, or None with `limited_by` set."""
        low, high = self.longest or 0, self.fails_at
        if high is not None and (high - low <= max(self.step, PRECISION * low)):
            self.limited_by = "memory"
        elif high is None and low >= self.most:
            self.limited_by = "most tokens"
        elif len(self.rows) >= self.max_tries:
            self.limited_by = "tries"
        if self.limited_by:
            return None
        wanted = self._clear_of(low, high, self._wanted(low, high))
        if self.expected_seconds(wanted) <= seconds_left:
            return wanted
        affordable = self._affordable(low, wanted, seconds_left)
        if affordable <= 1.05 * low:
            self.limited_by = "budget"
            return None
        return affordable

    def _wanted(self, low: int, high: int | None) -> float:
        line = self.line()
        if line is None:  # a probe failed: nothing to predict from
            return low + (high - low) / 2 if high is not None else 2 * low
        bound = (self.capacity_gib - line[0]) / line[1]
        if high is None:
            return _MARGIN * bound if low < (_MARGIN - PRECISION / 2) * bound else low * (1 + PRECISION)
        if low < _MARGIN * bound < high:
            return _MARGIN * bound
        failures = sum("failed" in row for row in self.rows)
        return max((low + high) / 2, high * (1 - PRECISION * 2**failures))

    def _clear_of(self, low: int, high: int | None, wanted: float) -> int:
        """A multiple of `step` above `low`, below `high` and at most `most`."""
        tokens = max(low + self.step, int(wanted) // self.step * self.step)
        if high is not None:
            tokens = min(tokens, high - self.step) if high - self.step > low else (low + high) // 2
        return min(tokens, self.most)

    def line(self) -> tuple[float, float] | None:
        """(c, m) of peak_gib = c + m·tokens through the two longest tries that passed."""
        passed = sorted((row["tokens"], row["peak_gib"]) for row in self.rows if "failed" not in row)[-2:]
        if len(passed) < 2 or passed[1][1] <= passed[0][1]:
            return None
        slope = (passed[1][1] - passed[0][1]) / (passed[1][0] - passed[0][0])
        return passed[0][1] - slope * passed[0][0], slope

    def expected_seconds(self, tokens: int) -> float:
        """Of a try of that length, what is not the step (building, pinning) growing in proportion."""
        passed = sorted((r["tokens"], r["seconds"], r["wall_s"]) for r in self.rows if "failed" not in r)[-2:]
        if not passed:
            return 0.0
        longest, seconds, wall = passed[-1]
        share = tokens / longest
        quadratic = 0.0
        if len(passed) == 2:
            rates = [row[1] / row[0] for row in passed]
            quadratic = max(0.0, (rates[1] - rates[0]) / (longest - passed[0][0]))
        step = seconds * share + quadratic * longest**2 * (share**2 - share)
        return step * max(1.0, wall / seconds) if share <= 1 else step + (wall - seconds) * share

    def _affordable(self, low: int, wanted: int, seconds_left: float) -> int:
        """The longest multiple of `step` in [low, wanted] that the rest of the budget allows."""
        fits, exceeds = low // self.step, wanted // self.step
        while exceeds - fits > 1:
            middle = (fits + exceeds) // 2
            if self.expected_seconds(middle * self.step) <= seconds_left:
                fits = middle
            else:
                exceeds = middle
        return fits * self.step
