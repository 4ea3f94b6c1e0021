"""Sorting: `Sort in ascending order: 18 98 10 55.`

    difficulty d: d + 3 different numbers below 100 · d; never sorted in advance, in either direction.

Source: sorting as a task whose answer is easy to check and long to write.
Left out: partial credit.
"""

from __future__ import annotations

import random
import re
from typing import Any

from rewards.tasks.answers import final_answer


def make(rng: random.Random, difficulty: int) -> dict[str, Any]:
    """One row: prompt, answer."""
    while True:
        numbers = rng.sample(range(100 * difficulty), difficulty + 3)
        rising = sorted(numbers)
        down = rng.random() < 0.5
        if numbers not in (rising, rising[::-1]):
            break
    listed = " ".join(map(str, numbers))
    order = "descending" if down else "ascending"
    prompt = f"Sort in {order} order: {listed}. Give only the numbers, separated by spaces."
    return {"prompt": prompt, "answer": " ".join(map(str, rising[::-1] if down else rising))}


def oracle(prompt: str) -> str:
    """The answer, from the prompt.

    >>> oracle("Sort in descending order: 3 20 1.")
    '20 3 1'
    """
    numbers = sorted(map(int, re.findall(r"\d+", prompt)), reverse="descending" in prompt)
    return " ".join(map(str, numbers))


def sorting_score(completion: str, answer: str) -> float:
    """1.0 for exactly these numbers in this order; commas and brackets do not matter.

    >>> sorting_score("[1, 3, 20]", "1 3 20"), sorting_score("1 20 3", "1 3 20"), sorting_score("1 3", "1 3 20")
    (1.0, 0.0, 0.0)
    """
    found = final_answer(completion)
    if found is None or not re.fullmatch(r"[\d\s,;\[\]]*\.?", found):
        return 0.0
    return float(re.findall(r"\d+", found) == answer.split())
