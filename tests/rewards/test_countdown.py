"""Countdown: exact values, every number at most once, nothing but + - * / and parentheses."""

import itertools
import random
from fractions import Fraction

import pytest

from rewards.countdown import countdown, evaluate


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("7 - 2 - 1", 4),
        ("8 / 4 / 2", 1),
        ("1 / 3 + 1 / 3 + 1 / 3", 1),  # exact: no float
        ("1 / 3", Fraction(1, 3)),
        ("-3 + 5", 2),
        ("2 × 3 ÷ 6", 1),
        (r"2 \times 3 \div 6", 1),
        (r"2 \cdot \left(3 + 1\right)", 8),
        ("５ − ３", 2),
        ("5 - 3.", 2),
        ("((((7))))", 7),
    ],
)
def test_values(expression, expected):
    assert evaluate(expression)[0] == expected


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "2 ** 3",
            "2**3",
            "2 ^ 3",
            "7 // 2",
            "7 % 4",
            "1 / 0",
            "1 / (1 - 1)",
            "x + 1",
            "1.5 * 2",
            "1e3",
            "5 5",
            "1_0",
        ),
        *(
            "__import__('os')",
            "(1, 2)",
            "1, 2",
            "1 if 1 else 2",
            "1 < 2",
            "~1",
            "1 | 2",
            "f(2)",
            "5(3)",
            "(5)(3)",
            "007",
        ),
        *(
            "",
            " ",
            "()",
            "1 +",
            "* 2",
            "(1",
            "1)",
            "True",
            "1\n2",
            "[1]",
            "lambda: 1",
            "0x10",
            "5!",
            "1 @ 2",
        ),
        *("(" * 40 + "1" + ")" * 40, "1" + " + 1" * 65, "-" * 65 + "1", "1" * 401),
    ],
)
def test_what_is_no_expression(expression):
    assert evaluate(expression) is None


def test_against_python_on_random_trees():
    """200 random expressions with whole intermediate results, against Python's own arithmetic on Fractions."""
    draw = random.Random(0)
    for _ in range(200):
        numbers = [draw.randint(1, 99) for _ in range(draw.randint(2, 6))]
        text, value = str(numbers[0]), Fraction(numbers[0])
        for number in numbers[1:]:
            sign = draw.choice("+-*/")
            text = f"({text}) {sign} {number}"
            value = {"+": value + number, "-": value - number, "*": value * number, "/": value / number}[sign]
        assert countdown(f"<answer>{text}</answer>", value, numbers) == 1.0, text
        assert countdown(f"<answer>{text}</answer>", value + 1, numbers) == 0.0
        assert countdown(f"<answer>{text}</answer>", value, numbers[1:]) == 0.0


def test_every_way_to_use_a_number_too_often():
    for left, right in itertools.product([3, 5, 7], repeat=2):
        allowed = left != right
        assert countdown(f"{left} + {right}", left + right, [3, 5, 7]) == float(allowed)


@pytest.mark.parametrize(
    ("completion", "knobs", "expected"),
    [
        ("<think>x</think><answer>(25 - 5) * 3</answer>", {}, 1.0),
        ("<answer>(25 - 5) * 3 = 60</answer>", {}, 1.0),
        ("<answer>(25 - 5) * 3 = 61</answer>", {}, 0.0),
        ("<answer>60 = (25 - 5) * 3</answer>", {}, 0.0),
        ("<answer>(25 - 5) * 3 = 60 = 60</answer>", {}, 0.0),
        (r"so \boxed{(25 - 5) \times 3}", {}, 1.0),
        (r"$\boxed{3 \cdot (25 - 5)}$", {}, 1.0),
        ("(25 - 5) * 3", {}, 1.0),
        ("hm</think> (25 - 5) * 3", {}, 1.0),
        ("<think>(25 - 5) * 3", {}, 0.0),
        ("<think>(25 - 5) * 3</think>", {}, 0.0),
        ("It is (25 - 5) * 3", {}, 0.0),
        ("<answer>60</answer>", {}, 0.0),
        ("<answer>(25 - 5) * (7 - 4)</answer>", {}, 0.0),
        ("<answer>25 * 3 - 5 - 5 - 5</answer>", {}, 0.0),
        ("<answer>(25 - 5) * 3</answer><answer>7</answer>", {}, 0.0),
        (r"</think> \boxed{(25-5)*3} \boxed{25}", {}, 0.0),
        ("<answer>(25 - 5) * 3\0</answer>", {}, 0.0),
        ("<answer>(25 - 5) * 3 + 7 - 7</answer>", {}, 0.0),
        ("<answer>(25 - 5) * 3</answer>", {"use_all": True}, 0.0),
        ("<answer>25 + 3 + 5 + 7</answer>", {"well_formed": 0.1}, 0.1),
        ("<answer>25 + 4</answer>", {"well_formed": 0.1}, 0.0),
        ("<answer>25 ** 3</answer>", {"well_formed": 0.1}, 0.0),
        ("", {"well_formed": 0.1}, 0.0),
        (None, {}, 0.0),
    ],
)
def test_countdown(completion, knobs, expected):
    assert countdown(completion, 60, [3, 5, 25, 7], **knobs) == expected
    assert countdown(completion, "60", "[3, 5, 25, 7]", **knobs) == expected


def test_all_numbers_used():
    assert countdown("<answer>7 - 3 + 5 - 2</answer>", 7, [2, 3, 5, 7], use_all=True) == 1.0


@pytest.mark.parametrize(("target", "numbers"), [("x", [1]), (None, [1]), (5, []), (5, [1.5]), (5, ["x"]), (5, "")])
def test_a_row_that_is_no_task_is_an_error(target, numbers):
    with pytest.raises(ValueError, match=r"want a number|want integers"):
        countdown("5", target, numbers)
