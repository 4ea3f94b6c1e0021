r"""Word problems that end in `#### n`: a person's things come and go, sentence by sentence.

    difficulty d: d + 1 events after the beginning, numbers up to 10 + 10·d; `times as many` from d = 2 on.

Source: GSM8K (arXiv 2110.14168), whose solutions end in that line.
Left out: sentences that do not matter, and more than one person.
"""

from __future__ import annotations

import random
import re
from typing import Any

from rewards.extract import after_think, hash_answer, readable
from rewards.scorers import numeric

_PEOPLE = ("Ada", "Ben", "Chloe", "Dan", "Eva", "Finn", "Grete", "Hugo")
_THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "tickets")
_MORE = ("finds {n} more", "buys {n} more", "is given {n} more")
_LESS = ("gives away {n}", "loses {n}", "sells {n}")
_TIMES = "trades until there are {n} times as many"


def make(rng: random.Random, difficulty: int) -> dict[str, Any]:
    """One row: prompt, answer (the number)."""
    while True:
        have = rng.randint(5, 10 + 10 * difficulty)
        person, things = rng.choice(_PEOPLE), rng.choice(_THINGS)
        story = [f"{person} has {have} {things}."]
        for _ in range(difficulty + 1):
            kind = rng.randrange(5 if difficulty >= 2 else 4)
            if kind == 4 and have < 1000:
                number, event = rng.randint(2, 4), _TIMES
                have *= number
            elif kind % 2 and have > 2:
                number, event = rng.randint(1, min(have - 1, 10 + 10 * difficulty)), rng.choice(_LESS)
                have -= number
            else:
                number, event = rng.randint(1, 10 + 10 * difficulty), rng.choice(_MORE)
                have += number
            story.append(f"{person} {event.format(n=number)}.")
        asked = f"How many {things} does {person} have now? End with a line: #### and the number."
        prompt = " ".join([*story, asked])
        if str(have) not in re.findall(r"\d+", prompt):
            return {"prompt": prompt, "answer": str(have)}


def oracle(prompt: str) -> str:
    r"""The answer with its line, from the prompt.

    >>> oracle("Ada has 5 coins. Ada loses 2. Ada is given 7 more. How many coins does Ada have now?")
    '5 - 2 + 7\n#### 10'
    """
    have, steps = 0, ""
    for sentence in prompt.split(". "):
        if (found := re.search(r"\d+", sentence)) is None:
            continue
        number = int(found[0])
        if "times" in sentence:
            have, steps = have * number, f"({steps}) * {number}"
        elif any(word in sentence for word in ("gives", "loses", "sells")):
            have, steps = have - number, f"{steps} - {number}"
        else:
            have, steps = have + number, f"{steps} + {number}".removeprefix(" + ")
    return f"{steps}\n#### {have}"


def words_score(completion: str, answer: Any) -> float | None:
    r"""1.0 for the one line `#### n` after the reasoning with the right number.

    >>> words_score("5 + 5 = 10\n#### 10", "10"), words_score("It is 10.", "10"), words_score("#### 9\n#### 10", "10")
    (1.0, 0.0, 0.0)
    """
    region = after_think(completion) if readable(completion) else None
    found = None if region is None else hash_answer(region)
    return numeric(found, answer)
