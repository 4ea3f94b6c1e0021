"""Chain arithmetic: `What is (7 + 3) * 4 - 5?`, read with the usual precedence.

    difficulty d: d + 1 numbers of up to 10 + 10·d, each operation one of + − ×; brackets from d = 3 on.

Source: arithmetic chains as first tasks of reinforcement learning with verifiable rewards.
Left out: division, whose answers would need a format of their own.
"""

from __future__ import annotations

import operator
import random
import re
from typing import Any

from rewards.scorers import math_accuracy

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def make(rng: random.Random, difficulty: int) -> dict[str, Any]:
    """One row: prompt, answer."""
    size = difficulty + 1
    while True:
        numbers = [str(rng.randint(2, 10 + 10 * difficulty)) for _ in range(size)]
        text = numbers[0] + "".join(f" {rng.choice('++-*')} {number}" for number in numbers[1:])
        if difficulty >= 3:
            first, second = sorted(rng.sample(range(size), 2))
            parts = text.split(" ")
            parts[2 * first] = "(" + parts[2 * first]
            parts[2 * second] += ")"
            text = " ".join(parts)
        answer = str(evaluate(text))
        if answer not in numbers:
            return {"prompt": f"What is {text}?", "answer": answer}


def evaluate(text: str) -> int:
    """An expression of numbers, + − × and brackets, by recursive descent.

    >>> evaluate("2 + 3 * (4 - 1)")
    11
    """
    tokens = re.findall(r"\d+|[-+*()]", text)[::-1]  # the next one last

    def atom() -> int:
        token = tokens.pop()
        if token != "(":
            return int(token)
        value = chain("+-")
        tokens.pop()
        return value

    def chain(operations: str) -> int:
        value = atom() if operations == "*" else chain("*")
        while tokens and tokens[-1] in operations:
            operation = _OPERATIONS[tokens.pop()]
            value = operation(value, atom() if operations == "*" else chain("*"))
        return value

    return chain("+-")


def oracle(prompt: str) -> str:
    """The answer, from the prompt.

    >>> oracle("What is 2 + 3 * 4?")
    '14'
    """
    return str(evaluate(prompt))


def arithmetic_score(completion: str, answer: Any) -> float | None:
    """1.0 for the number, written as `math_accuracy` reads it.

    >>> arithmetic_score("It is 14.", "14"), arithmetic_score("15", "14")
    (1.0, 0.0)
    """
    return math_accuracy(completion, answer)
