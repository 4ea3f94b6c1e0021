r"""Countdown: combine the given numbers with + − × ÷ to reach the target.

    1 if value(expression) = target and every given number is used at most once, else 0

Source: the Countdown task of TinyZero (github.com/Jiayi-Pan/TinyZero). The expression is parsed to Python's syntax tree
and walked over a whitelist: integers, + - * / and signs. Nothing is evaluated as code; the arithmetic is exact.
Left out: powers, roots, joining digits.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rewards.extract import all_boxed, answer_part, plain_digits, readable
from rewards.scorers import parse_number

MAX_EXPRESSION = 400
"""Characters that an expression may have."""
MAX_OPERATORS = 64
MAX_LEVELS = 30
"""Parentheses that may be open at once."""

_OTHER_SIGNS = str.maketrans("×⋅·∙÷∕", "****//")
_LATEX = (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\\left", ""), ("\\right", ""), ("$", ""))
_ALPHABET = re.compile(r"[0-9+\-*/() ]+")


def countdown(
    completion: str | None,
    target: Any,
    numbers: Sequence[int] | str,
    *,
    use_all: bool = False,
    well_formed: float = 0.0,
) -> float:
    r"""1.0 when the expression of the answer reaches `target` with `numbers`.

    The expression stands in `<answer>`, in a box, or is all of the answer part; `= target` may follow it.

    Args:
        completion: text of one completion.
        target: the number to reach.
        numbers: what may be used, each as often as it is listed; also as text: "3, 5, 7".
        use_all: every number must be used (TinyZero's rule).
        well_formed: the reward of an expression that obeys the rules and misses the target (TinyZero: 0.1).

    Raises:
        ValueError: target or numbers are none.

    >>> countdown("<think>hm</think><answer>(25 - 5) * 3 = 60</answer>", 60, [3, 5, 25, 7])
    1.0
    >>> countdown("<answer>5 * 5 + 35</answer>", 60, [5, 35]), countdown("<answer>60</answer>", 60, [3, 20])
    (0.0, 0.0)
    """
    goal = parse_number(str(target))
    given = _numbers(numbers)
    if goal is None:
        raise ValueError(f"target is {str(target)[:80]!r} (want a number)")
    found = _expression(completion)
    if found is None:
        return 0.0
    left, equals, right = found.partition("=")
    if equals and parse_number(right) != goal:
        return 0.0
    parsed = evaluate(left)
    if parsed is None:
        return 0.0
    value, used = parsed
    if used - given or (use_all and given - used):
        return 0.0
    return 1.0 if value == goal else well_formed


def evaluate(expression: str) -> tuple[Fraction, Counter[int]] | None:
    """The exact value of an expression and the integers in it; None if it is anything but + - * / and parentheses.

    >>> evaluate("(1 + 2) / 4")
    (Fraction(3, 4), Counter({1: 1, 2: 1, 4: 1}))
    >>> [evaluate(text) for text in ("2 ** 9", "7 // 2", "1 / 0", "x", "1.5", "9 9", "")]
    [None, None, None, None, None, None, None]
    """
    text = _plain(expression)
    if _ALPHABET.fullmatch(text) is None or "**" in text or "//" in text or not _is_shallow(text):
        return None
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        return None
    used: Counter[int] = Counter()
    try:
        return _value(tree.body, used), used
    except (ZeroDivisionError, ValueError):
        return None


def _value(node: ast.expr, used: Counter[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used[node.value] += 1
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, used)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, used), _value(node.right, used)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    raise ValueError(f"{type(node).__name__} is not allowed")


def _is_shallow(text: str) -> bool:
    """Whether walking the tree of `text` stays within bounds."""
    depth = deepest = 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        deepest = max(deepest, depth)
    return len(text) <= MAX_EXPRESSION and deepest <= MAX_LEVELS and sum(map(text.count, "+-*/")) <= MAX_OPERATORS


def _plain(expression: str) -> str:
    if len(expression) > 4 * MAX_EXPRESSION:
        return ""
    text = plain_digits(expression).translate(_OTHER_SIGNS)
    for latex, plain in _LATEX:
        text = text.replace(latex, plain)
    return text.strip().removesuffix(".")


def _expression(completion: str | None) -> str | None:
    """What the completion offers: one box (or several that say the same), else the answer part."""
    if completion is None or not readable(completion):
        return None
    region, delimited = answer_part(completion)
    boxes = all_boxed(region)
    if boxes and delimited and len(set(boxes)) > 1:
        return None
    found = boxes[-1] if boxes else region.strip()
    return found if 0 < len(found) <= 4 * MAX_EXPRESSION else None


def _numbers(numbers: Sequence[int] | str) -> Counter[int]:
    listed = numbers.strip(" []()").replace(",", " ").split() if isinstance(numbers, str) else list(numbers)
    read = [parse_number(str(number)) for number in listed]
    if not read or any(number is None or number.denominator != 1 for number in read):
        raise ValueError(f"numbers is {str(numbers)[:80]!r} (want integers)")
    return Counter(int(number) for number in read if number is not None)
