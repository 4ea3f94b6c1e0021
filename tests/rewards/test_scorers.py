"""Scorers, row by row. Rows of REWARDS.md section 5 and 8 say which one they are."""

from fractions import Fraction

import pytest

from rewards import Score, exact_match, find_answer, math_accuracy, numeric, parse_number, think_answer_format


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72", 72),
        ("72.", 72),  # pitfall 5
        ("72.0", 72),
        ("1,234.00", 1234),  # pitfall 5
        ("1,234,567", 1234567),
        ("0072", 72),
        (" 72 \n", 72),
        ("+72", 72),
        ("-72", -72),
        ("- 72", -72),
        ("−72", -72),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("0.1", Fraction(1, 10)),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("6 / 8", Fraction(3, 4)),
        ("1,000/2,000", Fraction(1, 2)),
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"\dfrac{3}{4}", Fraction(3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"-\tfrac34", Fraction(-3, 4)),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        ("2.5e3", 2500),
        ("1e-2", Fraction(1, 100)),
        (r"2.5 \times 10^{3}", 2500),
        (r"2 \times 10^3", 2000),
        (r"2 × 10^{-3}", Fraction(1, 500)),
        ("$12", 12),
        (r"\$12.50", Fraction(25, 2)),
        ("$12$", 12),
        (r"\(12\)", 12),
        (r"1\,234", 1234),
        ("1{,}234", 1234),
        ("50%", Fraction(1, 2)),
        (r"50\%", Fraction(1, 2)),
        ("50 %", Fraction(1, 2)),
        ("12.5%", Fraction(1, 8)),
        ("７２", 72),
        ("1\u00a0/\u00a02", Fraction(1, 2)),
    ],
)
def test_numbers(text, expected):
    assert parse_number(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ".", "-", "%", "abc", "72 or 73", "72, 73", "72 73", "1,5", "1,23", "12,34,567", "1.2.3", "72 cm"),
        *("x = 72", "1/0", r"\frac{1}{0}", "1//2", "1/2/3", "--72", "72%%", "2^{10}", "10^8!", "9^{9^{9^9}}"),
        *("5²", "½", "0x10", "1_000", "inf", "nan", "Infinity", "1e401", "1e99999", "1e999999", "9" * 121),
        *(r"\frac{1}", r"\frac{1}{2", r"\sqrt{4}", "4**2", "__import__('os')", "72\0", "72\ud800", "1 000", "True"),
        *(r"2 \times 10^{401}", r"2 \times 10^{x}", "7" + " " * 1000),
    ],
)
def test_what_is_not_a_number(text):
    assert parse_number(text) is None


def test_percent_has_one_reading_at_a_time():
    """Section 5: one library takes 50% for 0.5 and for 50, a hundred apart."""
    assert [
        numeric(given, gold) for given, gold in (("50%", "0.5"), ("50%", "50"), ("0.5", "50%"), ("50%", "50%"))
    ] == [1, 0, 1, 1]
    points = [("50%", "0.5"), ("50%", "50"), ("50", "50%"), ("0.5", "50%")]
    assert [numeric(given, gold, percent="points") for given, gold in points] == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("given", "gold", "knobs", "expected"),
    [
        ("72", "72", {}, 1.0),
        ("72.", 72, {}, 1.0),
        ("72", 72.0, {}, 1.0),
        ("0.1", 0.1, {}, 1.0),
        ("73", "72", {}, 0.0),
        ("0.333", "1/3", {}, 0.0),
        ("0.333333", "1/3", {}, 0.0),
        ("0.333", "1/3", {"abs_tol": 1e-3}, 1.0),
        ("0.332", "1/3", {"abs_tol": 1e-3}, 0.0),
        ("-101", "-100", {"rel_tol": 0.01}, 1.0),
        ("-101.1", "-100", {"rel_tol": 0.01}, 0.0),
        ("hm</think>72", "72", {}, 1.0),
        ("<think>72", "72", {}, 0.0),
        ("72 or 73", "72", {}, 0.0),
        (None, "72", {}, 0.0),
        ("", "72", {}, 0.0),
        ("72", "x + 1", {}, None),
        ("72", None, {}, None),
        ("1", True, {}, None),
        ("1", float("nan"), {}, None),
    ],
)
def test_numeric(given, gold, knobs, expected):
    assert numeric(given, gold, **knobs) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("012479", "012479", 1.0),
        (" 012479\n", "012479", 1.0),
        ("<think>x</think> yes", "yes", 1.0),
        ("<think>yes", "yes", 0.0),
        ("Yes", "yes", 0.0),
        ("yes no", "yes", 0.0),
        ("5²", "52", 0.0),
        ("e\u0301", "é", 1.0),
        ("72", 72, 1.0),
        ("yes\0", "yes\0", 0.0),
        ("", "yes", 0.0),
        (None, "yes", 0.0),
        ("", "", None),
        ("", None, None),
    ],
)
def test_exact_match(completion, answer, expected):
    assert exact_match(completion, answer) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        # the order: box, ####, last number
        (r"\boxed{72}", "72"),
        ("#### 72", "72"),
        ("so it is 72.", "72"),
        (r"5 and \boxed{72} and 9", "72"),
        ("5\n#### 72\n9", "72"),
        ("<think>9</think><answer>72</answer>", "72"),
        ("<think>9</think><answer>It is 72 apples</answer> 5", "72"),
        (r"<answer>\boxed{72}</answer> \boxed{5}", "72"),
        # section 8.4: exactly one answer block after the end of reasoning
        (r"<think>\boxed{5}</think> \boxed{72}", "72"),
        (r"\boxed{5} </think> \boxed{72}", "72"),
        (r"<think>\boxed{72}</think> done", None),
        (r"<think>\boxed{72}", None),
        (r"<think>x</think> \boxed{72} = \boxed{72}", "72"),
        (r"<think>x</think> \boxed{72} or \boxed{73}", None),
        (r"first \boxed{70}, better \boxed{72}", "72"),  # no delimiter: the last box counts
        (r"\boxed{72 or 73}", "72 or 73"),  # is no number for the scorer
        ("72 or 73", None),
        ("#### 72\n#### 73", None),
        ("#### 72\n#### 72", None),
        ("<answer>72</answer><answer>73</answer>", None),
        ("<answer>72</answer><answer>72</answer>", None),
        ("<answer>72", None),
        (r"\boxed{72}" + "\n#### 72", "72"),
        (r"\boxed{72}" + "\n#### 73", None),
        ("", None),
        ("no number", None),
    ],
)
def test_the_one_answer(completion, expected):
    assert find_answer(completion)[0] == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"It is \boxed{72}.", "72", 1.0),
        (r"It is \boxed{72.00}.", 72, 1.0),
        (r"It is \boxed{\frac{1}{2}}.", "0.5", 1.0),
        (r"It is \boxed{\frac{1}{2}}.", r"\frac{1}{2}", 1.0),
        (r"It is \boxed{\frac{1}{2}}.", "1", 0.0),
        ("#### 1,234", "1234", 1.0),
        ("#### 72", "He had 48 + 24 = <<48+24=72>>72 clips.\n#### 72", 1.0),
        ("72", r"so the answer is $\boxed{72}$", 1.0),
        ("72 clips", "72", 1.0),
        ("72 or 73", "72", 0.0),
        (r"\boxed{72 or 73}", "72", 0.0),
        (r"\boxed{72, 73}", "72", 0.0),
        (r"\boxed{72} \boxed{73}</think>\boxed{72} \boxed{73}", "72", 0.0),
        ("1 2 3 4 5 6 7 8 9", "5", 0.0),
        ("", "72", 0.0),
        ("<think>" + "72 " * 1000, "72", 0.0),
        ("72\0", "72", 0.0),
        ("The answer is 72.\n" * 50, "72", 1.0),
        ("x + 1", "x + 1", None),
        ("72", "", None),
        ("72", None, None),
        ("anything", "(1, 2)", None),
    ],
)
def test_math_accuracy(completion, answer, expected):
    assert math_accuracy(completion, answer) == expected


def test_math_accuracy_passes_its_knobs_on():
    assert math_accuracy(r"\boxed{0.33}", "1/3", abs_tol=0.01) == 1.0
    assert math_accuracy(r"\boxed{50\%}", "50") == 0.0
    assert math_accuracy(r"\boxed{50\%}", "50", percent="points") == 1.0


def test_math_accuracy_logs_how_many_boxes_it_saw():
    logged = []
    math_accuracy(r"\boxed{1} \boxed{2}", "2", log_metric=lambda *entry: logged.append(entry))
    math_accuracy(r"\boxed{2}", "2", log_metric=lambda *entry: logged.append(entry))
    assert logged == [("num_boxes", 2)]


@pytest.mark.parametrize(
    ("completion", "prefill", "expected"),
    [
        ("<think>a</think><answer>b</answer>", "", 1.0),
        ("<think>\na\n\nb\n</think>\n<answer>\nc\n</answer>\n", "", 1.0),  # pitfall 1: line breaks
        ("\n <think>a</think>  \n\n <answer>b</answer>", "", 1.0),
        ("<think></think><answer>b</answer>", "", 1.0),
        ("a</think><answer>b</answer>", "", 0.0),
        ("a</think><answer>b</answer>", "<think>", 1.0),  # pitfall 4: the template has opened it
        ("<think>a</think><answer>b</answer>", "<think>", 0.0),
        ("<think>a</think>so<answer>b</answer>", "", 0.0),
        ("so <think>a</think><answer>b</answer>", "", 0.0),
        ("<think>a</think><answer>b</answer> so", "", 0.0),
        ("<think>a</think><answer> </answer>", "", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", "", 0.0),
        ("<think>a<think>b</think></think><answer>c</answer>", "", 0.0),
        ("<answer>b</answer><think>a</think>", "", 0.0),
        ("<think>a<answer>b</think></answer>", "", 0.0),
        ("<think>a</think><answer>b", "", 0.0),
        ("", "", 0.0),
    ],
)
def test_think_answer_format(completion, prefill, expected):
    assert think_answer_format(completion, prefill) == expected


def test_score_compares_and_refuses_notes_that_are_neither_number_nor_text():
    assert Score(1.0, steps=3, why="x") == Score(1.0, steps=3, why="x") != Score(1.0)
    assert Score(None).value is None and Score(1, value=2).notes == {"value": 2}
    with pytest.raises(TypeError, match="note 'steps' is list"):
        Score(1.0, steps=[1])
