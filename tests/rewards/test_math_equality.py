"""Math equality: what is decided here (with a worker that must not be asked), what is asked, and math-verify's answers.

Rows of REWARDS.md sections 5 and 6 say which one they are. Those that need math-verify are skipped without it.
"""

import importlib.util
import time

import pytest

from rewards import math_equality
from rewards.math_equality import check, find_expression, math_equal, math_verify_accuracy, refusal

needs_library = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")


class StandIn:
    """In the worker's place: notes what it is asked and answers from a table, else False."""

    def __init__(self, *equal):
        self.equal = set(equal)
        self.asked = []

    def __call__(self, gold, prediction, timeout):
        self.asked.append((gold, prediction))
        return (gold, prediction) in self.equal


@pytest.fixture
def worker(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(math_equality, "_ask", stand_in)
    return stand_in


@pytest.mark.parametrize(
    ("gold", "prediction", "knobs", "expected"),
    [
        ("x+1", "x+1", {}, True),
        ("$x+1$", "x+1", {}, True),
        (r"\(x+1\)", "$$x+1$$", {}, True),
        ("x+1.", "x+1", {}, True),
        ("e\u0301", "é", {}, True),
        ("72", "72.00", {}, True),
        ("1,234", "1234", {}, True),
        (r"\frac{1}{2}", "0.5", {}, True),
        ("72", "73", {}, False),
        ("72", "x = 72", {}, True),
        ("72", r"\theta = 72", {}, True),
        ("x = 72", "72", {}, True),
        ("1/3", "0.333", {}, False),  # section 5: six digits are not the task's tolerance
        ("1/3", "0.333333", {}, False),
        ("1/3", "0.333", {"abs_tol": 1e-3}, True),
        ("1/3", "0.333333", {"rel_tol": 1e-5}, True),
        ("50%", "0.5", {}, True),  # section 5: one reading of percent
        ("50", r"50\%", {}, False),
        ("50", r"50\%", {"percent": "points"}, True),
        ("50%", "0.5", {"percent": "points"}, False),
        ("72", "73 = 72", {}, False),
        ("72", "1 = 2 = 72", {}, False),
        ("72", "", {}, False),
        ("", "", {}, False),
        ("x\0", "x\0", {}, False),
        ("x", "x" * 50_001, {}, False),
        # refused before anybody is asked (section 6)
        ("x", "9^{9^{9^9}}", {}, False),
        ("x", "10^8!", {}, False),
        ("x", "9^{99999}", {}, False),
        ("x", "x" * 1_001, {}, False),
        ("7", r"7} \boxed{8", {}, False),
        ("7", r"\boxed{7}", {}, False),
        # no answer (section 8.4), and what math-verify would add up
        ("72", "72 or 73", {}, False),
        ("x", r"x \text{ or } y", {}, False),
        ("3", "1 2", {}, False),
        ("3", r"1\quad 2", {}, False),
        ("3", "{1}{2}", {}, False),
        ("5", "4 + 1", {}, False),
        ("391", r"17 \times 23", {}, False),
    ],
)
def test_decided_without_the_worker(worker, gold, prediction, knobs, expected):
    assert math_equal(gold, prediction, **knobs) is expected
    assert worker.asked == []


@pytest.mark.parametrize(
    ("gold", "prediction", "asked"),
    [
        ("2", r"\sqrt{4}", [("2", r"\sqrt{4}")]),
        ("x>3", "(3,∞)", [("x>3", r"(3,\infty )"), (r"(3,\infty )", "x>3")]),  # both orders for inequalities
        ("(3,4)", "x<3", [("(3,4)", "x<3"), ("x<3", "(3,4)")]),
        ("(1,2)", "[1,2]", [("(1,2)", "[1,2]")]),  # and for nothing else
        (r"2\sqrt{3}\%", r"2\sqrt{3}", [(r"\frac{2\sqrt{3}}{100}", r"2\sqrt{3}")]),
        ("y = 2x", "2x + 0", [("2x", "2x + 0")]),
        ("y = 2x", "2x = y", [("y = 2x", "2x = y")]),
        ("x^{2}", "x = 3x", [("x^{2}", "3x")]),
        ("1 or 2", "2 or 1", [("1 or 2", "2 or 1")]),  # the gold answer has them, too
    ],
)
def test_what_the_worker_is_asked(worker, gold, prediction, asked):
    assert math_equal(gold, prediction) is False
    assert worker.asked == asked


def test_the_worker_s_verdict_counts_in_either_order_for_inequalities(worker):
    worker.equal = {("(3,4)", "x<3"), (r"(3,\infty )", "x>3"), ("[1,2]", "(1,2)")}
    assert math_equal("(3,4)", "x<3") and math_equal("x>3", "(3,∞)") and not math_equal("(1,2)", "[1,2]")


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        *[(text, "nested powers") for text in ("9^{9^{9^9}}", "9^9^9", "(9^9)^9", "9**9**9", "9^{(9^9)}", "9^{9^9}")],
        *[
            (text, "nested powers")
            for text in (r"9^\left(9^9\right)", "9^-9^9", "{9^{9}}^{9}", "x^{9^{9^9}}", "[9^9]^9")
        ],
        *[(text, "large exponent") for text in ("9^{99999}", "9^99999", "9 ** 99999", "2^{-123456}", "x^{ 10000 }")],
        *[(text, "factorial") for text in ("100!", "10^8!", "(10)!", "5!!", "n!!", "{9}!", "1.5!", "99!!", "2^9!")],
        *[(text, "braces") for text in ("}{", "x}", "{x", r"\boxed{x}", "x\\")],
        ("x" * 1001, "too long"),
        *[
            (text, None)
            for text in ("e^{x^2}", "e^{-x^{2}}", "(x^2+1)^2", "2^{n^2}", "2^{10}", "x^2+y^2", "a^b", "10^{-3}")
        ],
        *[
            (text, None)
            for text in ("5!", "n!", r"\frac{5!}{3!2!}", r"10{,}\!000", r"\{1\}", "99!", "", "x^2 x^3", "9^9 + 9^9")
        ],
    ],
)
def test_refusal(expression, reason):
    assert refusal(expression) == reason


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        (r"so \boxed{x + 1}", "x+1", "x + 1"),
        (r"\boxed{x} no: \boxed{y}", "y", "y"),
        (r"</think> \boxed{x} no: \boxed{y}", "y", None),
        (r"</think> \boxed{x} = \boxed{x}", "x", "x"),
        (r"<think>\boxed{x}</think> y", "x", None),
        (r"<think>\boxed{x}", "x", None),
        ("<answer> x + 1 </answer>", "x+1", "x + 1"),
        (r"<answer>$\boxed{x}$</answer> y", "x", "x"),
        ("<answer>x</answer><answer>y</answer>", "x", None),
        ("#### x + 1", "x+1", "x + 1"),
        ("#### x\n#### y", "x", None),
        (r"\boxed{1}" + "\n#### 1.0", "1", "1"),
        (r"\boxed{1}" + "\n#### 2", "1", None),
        ("It makes 72.", "72", "72"),
        ("It makes 72.", "x", None),
        ("72 or 73", "72", None),
        ("It makes x + 1", "x + 1", None),
        ("", "x", None),
    ],
)
def test_find_expression(text, gold, expected):
    assert find_expression(text, gold) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"\boxed{x+1}", "x+1", 1.0),
        (r"\boxed{x+1}", r"we get \boxed{x+1}", 1.0),
        (r"\boxed{72}", "48 + 24 = 72\n#### 72", 1.0),
        ("It is 72.", 72, 1.0),
        (r"\boxed{x+1}", "x+2", 0.0),
        ("no answer", "x", 0.0),
        ("x\0", "x", 0.0),
        (r"\boxed{x}", None, None),
        (r"\boxed{x}", "", None),
    ],
)
def test_math_verify_accuracy(worker, completion, answer, expected):
    assert math_verify_accuracy(completion, answer) == expected


def test_no_verdict_in_time_is_a_fault_unless_it_is_asked_to_be_wrong(monkeypatch):
    from rewards.worker import WorkerDied, WorkerTimeout

    def slow(gold, prediction, timeout):
        raise WorkerTimeout(f"no answer within {timeout} s")

    monkeypatch.setattr(math_equality, "_ask", slow)
    with pytest.raises(WorkerTimeout, match=r"0\.25"):
        math_verify_accuracy(r"\boxed{\sqrt{x}}", "y", timeout=0.25)
    logged = []
    assert (
        math_verify_accuracy(r"\boxed{\sqrt{x}}", "y", on_timeout="wrong", log_metric=lambda *e: logged.append(e))
        == 0.0
    )
    assert logged == [("timeout", 1.0)]

    def dies(gold, prediction, timeout):
        raise WorkerDied("gone")

    monkeypatch.setattr(math_equality, "_ask", dies)
    with pytest.raises(WorkerDied):
        math_verify_accuracy(r"\boxed{\sqrt{x}}", "y", on_timeout="wrong")


def test_without_the_library_one_line_names_it(monkeypatch):
    monkeypatch.setattr(math_equality.importlib.util, "find_spec", lambda name: None)
    math_equality._pool.cache_clear()
    with pytest.raises(ImportError, match="needs the package math-verify"):
        math_equal("x", "y+1")


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setattr(math_equality, "_ask", lambda gold, prediction, timeout: check(gold, prediction))


@needs_library
@pytest.mark.parametrize(
    ("gold", "prediction", "expected"),
    [
        ("x>3", "(3,∞)", True),  # section 5, row 3, both ways
        ("(3,∞)", "x>3", True),
        ("1<x<2", "(1,2)", True),
        ("(1,2)", "1<x<2", True),
        ("(1,2)", "[1,2]", False),  # row 4
        ("5", "5 cm", True),
        (r"\{1,2\}", "1,2", True),
        ("{1,2}", "1,2", True),
        ("1.5", "1,5", False),
        ("2", r"\sqrt{4}", True),
        ("x+1", "1+x", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("e^{x^2}", "e^{x^{2}}", True),
        (r"\frac{\pi}{2}", "π/2", True),
        ("y=2x+1", "1+2x", True),
        ("3", "x>3", False),
        ("3", "3, 4", False),
        ("5", r"5 \pm 1", False),
        ("5", r"\{1,2,3,4,5\}", False),
        ("5", r"\text{the number}", False),
        (r"2\sqrt{3}\%", r"2\sqrt{3}", False),
        (r"\sqrt{2}", "1.414214", True),  # six digits
        (r"\sqrt{2}", "1.4142", False),
    ],
)
def test_with_math_verify(library, gold, prediction, expected):
    assert math_equal(gold, prediction) is expected


@needs_library
def test_in_a_worker_that_is_killed():
    """The pool itself: a verdict, then an expression that takes for ever, then a verdict again."""
    from rewards.worker import Pool, WorkerTimeout

    with Pool("rewards.math_equality:check", timeout=2.0, size=1) as pool:
        assert pool.call([r"\sqrt{4}", "2"]) is True
        start = time.monotonic()
        with pytest.raises(WorkerTimeout):
            pool.call(["1", "9^{9^{9^9}}"])
        assert time.monotonic() - start < 6.0
        assert pool.call([r"\sqrt{4}", "3"]) is False
