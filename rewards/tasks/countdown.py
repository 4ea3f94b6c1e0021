"""Countdown: `Use the numbers 3, 7, 12, each once, with + - * /, to make 57.`

    difficulty d: d + 2 numbers (at most 6) below 10 + 10·d; never the plain sum of all.

Source: the Countdown task of TinyZero (github.com/Jiayi-Pan/TinyZero).
Left out: rows without a solution, and targets that are no whole numbers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

from rewards.countdown import countdown

_Part = tuple[Fraction, str]


def make(rng: random.Random, difficulty: int) -> dict[str, Any]:
    """One row: prompt, target, numbers, and one expression as answer."""
    while True:
        numbers = [rng.randint(2, 10 + 10 * difficulty) for _ in range(min(difficulty + 2, 6))]
        parts = [(Fraction(number), str(number)) for number in numbers]
        while len(parts) > 1:
            first, second = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
            parts.append(rng.choice(list(_joined(first, second))))
        value, expression = parts[0]
        fits = value.denominator == 1 and 10 < value < 1000
        if fits and value != sum(numbers) and value not in numbers:
            listed = ", ".join(map(str, numbers))
            prompt = f"Use the numbers {listed}, each once, with + - * / and brackets, to make {value}. "
            prompt += "Give only the expression in <answer> tags."
            return {"prompt": prompt, "answer": expression, "target": int(value), "numbers": numbers}


def _joined(one: _Part, other: _Part) -> list[_Part]:
    """Everything that two parts can be made into."""
    (a, left), (b, right) = one, other
    found = [(a + b, f"({left} + {right})"), (a * b, f"({left} * {right})")]
    found += [(a - b, f"({left} - {right})"), (b - a, f"({right} - {left})")]
    found += [(a / b, f"({left} / {right})")] if b else []
    return found + ([(b / a, f"({right} / {left})")] if a else [])


def _solved(parts: Sequence[_Part], target: int) -> str | None:
    """Every pair joined in every way until one part is left: the first expression that reaches the target."""
    if len(parts) == 1:
        return parts[0][1] if parts[0][0] == target else None
    for i, j in combinations(range(len(parts)), 2):
        rest = [part for place, part in enumerate(parts) if place not in (i, j)]
        for joined in _joined(parts[i], parts[j]):
            if (found := _solved([*rest, joined], target)) is not None:
                return found
    return None


def oracle(prompt: str) -> str:
    """An expression that reaches the target, from the prompt, by trying them all (seconds for 6 numbers).

    >>> oracle("Use the numbers 3, 4, 5, each once, to make 17.")
    '<answer>(5 + (3 * 4))</answer>'
    """
    listed, _, rest = prompt.partition("make")
    numbers = [(Fraction(number), number) for number in re.findall(r"\d+", listed)]
    return f"<answer>{_solved(numbers, int(re.findall(r'[0-9]+', rest)[0]))}</answer>"


def countdown_score(completion: str, target: int, numbers: Sequence[int]) -> float:
    """1.0 for an expression that uses every number once and reaches the target.

    >>> countdown_score("<answer>3 * 4 + 5</answer>", 17, [3, 4, 5]), countdown_score("17", 17, [3, 4, 5])
    (1.0, 0.0)
    """
    return countdown(completion, target, numbers, use_all=True)
