"""Base conversion: `Write the number 1f (base 16) in base 7.`

    difficulty d: numbers below 16 · 4^d, two different bases out of 2 to 16, never with the same digits in both.

Source: conversions, a task with an exact answer that is text and no number.
Left out: fractions and negative numbers.
"""

from __future__ import annotations

import random
import re
from typing import Any

from rewards.tasks.answers import final_answer

_DIGITS = "0123456789abcdef"


def make(rng: random.Random, difficulty: int) -> dict[str, Any]:
    """One row: prompt, answer."""
    while True:
        value = rng.randrange(16, 16 * 4**difficulty)
        source, target = rng.sample(range(2, 17), 2)
        given, answer = written(value, source), written(value, target)
        if given != answer:
            prompt = f"Write the number {given} (base {source}) in base {target}. Give only its digits."
            return {"prompt": prompt, "answer": answer}


def written(value: int, base: int) -> str:
    """The digits of a positive number.

    >>> written(31, 16), written(5, 2)
    ('1f', '101')
    """
    digits = ""
    while value:
        value, digit = divmod(value, base)
        digits = _DIGITS[digit] + digits
    return digits


def oracle(prompt: str) -> str:
    """The answer, from the prompt.

    >>> oracle("Write the number 1f (base 16) in base 2. Give only its digits.")
    '11111'
    """
    found = re.search(r"number (\w+) \(base (\d+)\) in base (\d+)", prompt)
    assert found is not None  # a prompt of this task
    return written(int(found[1], int(found[2])), int(found[3]))


def bases_score(completion: str, answer: str) -> float:
    """1.0 for exactly these digits; capital letters, a prefix 0x, 0o or 0b, and a full stop do not matter.

    >>> bases_score("0x1F", "1f"), bases_score("1f0", "1f"), bases_score("31", "1f")
    (1.0, 0.0, 0.0)
    """
    found = final_answer(completion)
    if found is None:
        return 0.0
    text = found.strip(" \n\t.\"'`*$").lower()
    return float(answer in (text, re.sub(r"^0[xob]", "", text)))
