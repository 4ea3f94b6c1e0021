"""Code against tests: the last fenced block of a completion, run on hidden inputs in a sandbox, judged outside it.

    r = passed / tests  ("fraction")        r = 1 if passed = tests else 0  ("all")

Sources: APPS (arXiv 2105.09938), MBPP (arXiv 2108.07732), HumanEval (arXiv 2107.03374). No code runs before a tier is
named (`rewards.sandbox`). The judged process is given an input and gives back bytes: exit codes, printed verdicts,
patched test runners, forged result files and objects that equal everything score nothing, as expectation, comparison
and score never enter it. Each test gets a fresh process and folder, so tests cannot tell one another anything.
A failure of the sandbox itself is an exception (a fault), never a 0. The tests that a row hides run in an order drawn
from the row, the same for every completion, so that neither `max_tests` nor a time limit favours the first.
Left out: other languages than Python, packages beyond the standard library, partial credit inside a test. Code that
draws from `random` without a seed is as repeatable as it wants to be; hashes of text are (the hash seed is fixed).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rewards.blocks import fenced_code
from rewards.code_tests import CallTest, StdinTest, Test, read_tests
from rewards.extract import after_think, readable
from rewards.sandbox import Limits, Outcome, Request, SandboxError, check_tier, describe, open_sandbox, probe

MAX_CODE = 65_536
_LANGUAGES = ("python", "python3", "py", "")


@dataclass(frozen=True)
class CodeTests:
    """The reward that `code_tests` makes: `f(completion, tests, entry_point=None)`. Can be pickled for a worker."""

    tier: str
    mode: Literal["fraction", "all"] = "fraction"
    limits: Limits = field(default_factory=Limits)
    abs_tol: float = 0.0
    max_tests: int | None = None
    url: str | None = None
    service: str = "piston"
    headers: dict[str, str] | None = field(default=None, repr=False)
    num_visible: int = 0
    __name__ = "code_tests"

    def describe(self) -> str:
        """The line to print before training: which tier is live, and what it does not protect against."""
        return describe(self.tier)

    def __call__(
        self,
        completion: str,
        tests: Any,
        entry_point: str | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> float | None:
        """Score one completion; None where `tests` is None. See `code_tests`."""
        if tests is None:
            return None
        read = self._ordered(read_tests(tests, entry_point, self.abs_tol), tests)
        source = code_of(completion)
        if source is None:
            return 0.0
        passed, timed_out = self._run(source, read)
        if log_metric is not None:
            log_metric("timed_out", timed_out / len(read))
            if 0 < self.num_visible < len(read):
                shown = all(passed[: self.num_visible]) and len(passed) >= self.num_visible
                log_metric("visible_only", float(shown and sum(passed) < len(read)))
        return sum(passed) / len(read) if self.mode == "fraction" else float(sum(passed) == len(read))

    def _ordered(self, read: list[Test], tests: Any) -> list[Test]:
        """The visible tests, then the hidden ones in an order that is a function of the row alone."""
        shown, hidden = read[: self.num_visible], read[self.num_visible :]
        random.Random(repr(tests)).shuffle(hidden)  # text is hashed with SHA-512: the same everywhere
        return [*shown, *hidden][: self.max_tests]

    def _run(self, source: str, tests: list[Test]) -> tuple[list[bool], int]:
        """Which tests pass and how many run out of time; with "all" the first failure is the last test."""
        passed: list[bool] = []
        timed_out = 0
        with open_sandbox(
            self.tier, source, self.limits, url=self.url, service=self.service, headers=self.headers
        ) as box:
            for test in tests:
                good, status = judged(test, box.run, self.abs_tol)
                passed.append(good)
                timed_out += status == "timeout"
                if not good and self.mode == "all":
                    break
        return passed, timed_out


def code_tests(  # noqa: PLR0913 (a factory: each is a key of a configuration)
    tier: str | None = None,
    *,
    mode: Literal["fraction", "all"] = "fraction",
    limits: Limits | Mapping[str, Any] | None = None,
    abs_tol: float = 0.0,
    max_tests: int | None = None,
    num_visible: int = 0,
    url: str | None = None,
    service: str = "piston",
    headers: dict[str, str] | None = None,
) -> CodeTests:
    """A reward in [0, 1] for code: `f(completion, tests, entry_point=None)`, with `tests` a column of the dataset.

    Args:
        tier: "process", "namespace", "confined", "bubblewrap" or "remote"; there is no default. It is tried at once.
        mode: the fraction of tests passed, or all or nothing.
        limits: seconds, bytes and counts of a test; a mapping of the fields of `Limits`, as a configuration has it.
        abs_tol: numbers in outputs may differ by that much.
        max_tests: only so many tests of a row: the visible ones, then hidden ones.
        num_visible: the first so many tests of a row stand in its prompt. The share of completions that pass these and
            fail another is logged as `visible_only`: when it grows, the policy learns the tests, not the task.
        url, service, headers: of the tier "remote"; service is "piston" or "sandboxfusion".

    Returns:
        A callable. It gives None where `tests` is None, and raises ValueError for tests that cannot be read.

    Raises:
        SandboxError: no tier is named, or it cannot be had on this machine; also in a call, when the sandbox fails.

    >>> code_tests()
    Traceback (most recent call last):
    rewards.sandbox.tiers.SandboxError: running model-written code: no tier is named (want one of process, namespace, \
confined, bubblewrap, remote)
    >>> reward = code_tests("process")
    >>> reward("```python\\na, b = map(int, input().split())\\nprint(a + b)\\n```", [{"input": "3 4", "output": "7"}])
    1.0
    """
    if mode not in ("fraction", "all"):
        raise ValueError(f"mode is {mode!r} (want fraction or all)")
    if not math.isfinite(abs_tol) or abs_tol < 0:
        raise ValueError(f"abs_tol is {abs_tol} (want 0 or more)")
    if max_tests is not None and max_tests < 1:
        raise ValueError(f"max_tests is {max_tests} (want 1 or more)")
    if num_visible < 0:
        raise ValueError(f"num_visible is {num_visible} (want 0 or more)")
    held = Limits(**limits) if isinstance(limits, Mapping) else limits or Limits()
    probe(tier, url=url, service=service, headers=headers)
    return CodeTests(check_tier(tier), mode, held, abs_tol, max_tests, url, service, headers, num_visible)


def code_of(completion: str) -> str | None:
    """The last closed fenced block, of Python or of no language, after the reasoning; None when there is none.

    >>> code_of("<think>```python\\nx = 1\\n```</think>\\n```python\\nx = 2\\n```")
    'x = 2\\n'
    >>> code_of("```python\\nx = 1") is None
    True
    """
    region = after_think(completion)
    code = None if region is None else fenced_code(region, *_LANGUAGES)
    return code if code is not None and len(code) <= MAX_CODE and readable(code) else None


def judged(test: Test, run: Callable[[Request], Outcome], abs_tol: float) -> tuple[bool, str]:
    """Whether one test is passed, and the outcome's status. The one place where a comparison is made."""
    if isinstance(test, StdinTest):
        outcome = run(Request(test.stdin))
        return outcome.status == "ok" and same_output(outcome.stdout, test.expected, abs_tol), outcome.status
    return _judged_calls(test, run)


def _judged_calls(test: CallTest, run: Callable[[Request], Outcome]) -> tuple[bool, str]:
    values = []
    for call in test.calls:
        outcome = run(Request(call=call))
        if outcome.status != "ok":
            return False, outcome.status
        values.append(outcome.value)
    return test.passes(values), "ok"


def same_output(output: str, expected: str, abs_tol: float = 0.0) -> bool:
    """Equal line by line, but for space at line ends and blank lines at the end; numbers up to `abs_tol` apart.

    >>> same_output("3 7 9 \\n\\n", "3 7 9"), same_output("3", "3 7 9"), same_output("0.5001", "0.5", 0.001)
    (True, False, True)
    """
    lines, wanted = _lines(output), _lines(expected)
    if lines == wanted or not abs_tol:
        return lines == wanted
    return len(lines) == len(wanted) and all(
        _close_words(one.split(), other.split(), abs_tol) for one, other in zip(lines, wanted, strict=True)
    )


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _close_words(words: list[str], wanted: list[str], abs_tol: float) -> bool:
    return len(words) == len(wanted) and all(
        one == other or _close_numbers(one, other, abs_tol) for one, other in zip(words, wanted, strict=True)
    )


def _close_numbers(one: str, other: str, abs_tol: float) -> bool:
    try:
        return abs(float(one) - float(other)) <= abs_tol
    except ValueError:
        return False


__all__ = ["code_tests", "CodeTests", "code_of", "same_output", "SandboxError"]
