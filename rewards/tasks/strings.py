"""String operations: reverse, sort letters, drop every other letter, rotate, shift in the alphabet; one after another.

    difficulty d: words of d + 4 letters, 1 operation for d ≤ 3, 2 for d ≤ 6, 3 above.

Source: letter-level tasks, which tokenizers make hard.
Left out: counting letters, whose few possible answers are guessed too easily.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from rewards.tasks.answers import final_answer

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_OPERATIONS: dict[str, Callable[[str], str]] = {
    "reverse it": lambda word: word[::-1],
    "sort its letters": lambda word: "".join(sorted(word)),
    "keep only every second letter, beginning with the first": lambda word: word[::2],
    "move its first letter to the end": lambda word: word[1:] + word[:1],
    "replace each letter by the next one in the alphabet (z by a)": lambda word: "".join(
        _LETTERS[(_LETTERS.index(letter) + 1) % 26] for letter in word
    ),
}


def make(rng: random.Random, difficulty: int) -> dict[str, Any]:
    """One row: prompt, answer."""
    while True:
        word = "".join(rng.choice(_LETTERS) for _ in range(difficulty + 4))
        names = rng.sample(sorted(_OPERATIONS), 1 + (difficulty > 3) + (difficulty > 6))
        prompt = f'Take the word "{word}": {"; then ".join(names)}. Give only the result.'
        answer = oracle(prompt)
        if answer != word:
            return {"prompt": prompt, "answer": answer}


def oracle(prompt: str) -> str:
    """The answer, from the prompt.

    >>> oracle('Take the word "abc": reverse it; then move its first letter to the end. Give only the result.')
    'bac'
    """
    found = re.fullmatch(r'Take the word "([a-z]+)": (.*)\. Give only the result\.', prompt)
    assert found is not None  # a prompt of this task
    word = found[1]
    for name in found[2].split("; then "):
        word = _OPERATIONS[name](word)
    return word


def strings_score(completion: str, answer: str) -> float:
    """1.0 for the word alone; quotes, a full stop and capital letters do not matter.

    >>> strings_score('"Cba".', "cba"), strings_score("abc", "cba"), strings_score("cba or abc", "cba")
    (1.0, 0.0, 0.0)
    """
    found = final_answer(completion)
    return float(found is not None and found.strip(" \n\t.\"'`*").lower() == answer)
