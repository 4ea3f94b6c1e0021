r"""Text rewards: token F1 and normalised exact match of SQuAD, multiple choice, regular expressions.

    F1 = 2·P·R / (P + R),  P = common / words of the answer given,  R = common / words of the gold answer

Source: SQuAD (arXiv 1606.05250), whose normalisation is: lower case, no punctuation, no articles, single spaces.
Only the answer part of a completion is judged (after `</think>`, inside `<answer>`). Exact match without normalisation
is `rewards.exact_match`. Left out: stemming, synonyms, articles of other languages than English.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rewards.extract import all_boxed, answer_part, readable

MAX_TEXT = 50_000
"""Characters of an answer that are compared; a longer one is wrong."""
MAX_SUBJECT = 10_000
"""Characters that a regular expression is tried on; a longer answer is wrong."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = frozenset({"a", "an", "the"})
_SPACES = re.compile(r"\s+")
_STATED = re.compile(
    r"\b(?i:answer|choice|option)s?(?: is|:| is:)?[ \n*]{0,4}\(?([A-Z])\)?(?![\w'])(?!\s+(?:or|and)\b)", re.ASCII
)
_HEDGED = re.compile(r"\b(?i:answer|choice|option)s?(?: is|:| is:)?[ \n*]{0,4}\(?[A-Z]\)?\s+(?:or|and)\b", re.ASCII)
_LETTER = re.compile(r"[(\[*]{0,3}([A-Za-z])[)\]*.:]{0,4}", re.ASCII)
_LABELLED = re.compile(r"\(?([A-Z])(?:\)|[.:](?=\s))[ *]{0,3}(\S.{0,400})", re.ASCII | re.DOTALL)


def squad_words(text: str) -> list[str]:
    """`text` as SQuAD compares it: words in lower case without punctuation and English articles.

    >>> squad_words("The  Eiffel-Tower, Paris!")
    ['eiffeltower', 'paris']
    """
    return [word for word in text.lower().translate(_PUNCTUATION).split() if word not in _ARTICLES]


def f1(completion: str | None, answer: Any) -> float | None:
    """Word F1 of the answer part against `answer`; the best one where `answer` is a list. None without an answer.

    >>> f1("<think>hm</think> the tall Eiffel Tower", "Eiffel Tower")
    0.8
    >>> f1("Rome", "Paris"), f1("in Paris", ["London", "Paris!"]), f1("Paris", None)
    (0.0, 0.6666666666666666, None)
    """
    golds = [words for gold in _golds(answer) if (words := squad_words(gold))]
    if not golds:
        return None
    given = squad_words(_answer(completion))
    return max(_f1(given, gold) for gold in golds)


def _f1(given: list[str], gold: list[str]) -> float:
    common = (Counter(given) & Counter(gold)).total()
    return 2 * common / (len(given) + len(gold)) if common else 0.0


def squad_exact(completion: str | None, answer: Any) -> float | None:
    """1.0 when the answer part and `answer` (or one of them, in a list) have the same words in the same order.

    >>> squad_exact("The Eiffel tower.", "eiffel tower"), squad_exact("tower Eiffel", "Eiffel tower")
    (1.0, 0.0)
    """
    golds = [words for gold in _golds(answer) if (words := squad_words(gold))]
    return float(squad_words(_answer(completion)) in golds) if golds else None


def _golds(answer: Any) -> list[str]:
    return [str(each) for each in (answer if isinstance(answer, list | tuple) else [answer]) if each is not None]


def _answer(completion: str | None) -> str:
    """The answer part, stripped; empty where there is none or it cannot be an honest one."""
    text = answer_part(completion)[0].strip() if completion is not None else ""
    return text if len(text) <= MAX_TEXT and readable(text) else ""


def multiple_choice(completion: str | None, answer: Any, choices: Sequence[str] | None = None) -> float | None:
    r"""1.0 when the one choice that a completion names is `answer`.

    A choice is named in a box, or as all of the answer part (`B`, `(B)`, `B. Paris`, with `choices` also the text of
    one), or in `the answer is (B)`. One choice or none: boxes that differ, `A or B` and, behind `</think>`, two
    statements that differ are no answer; where no tag ends the reasoning, the last statement counts.

    Args:
        completion: text of one completion.
        answer: a letter, an index from 0, or the text of one of `choices`. Else None is returned.
        choices: the texts behind A, B, C, …; a completion may then also name a choice by its text.

    >>> multiple_choice("<think>A?</think> The answer is (B).", "B"), multiple_choice(r"so \boxed{B}", 1)
    (1.0, 1.0)
    >>> multiple_choice("Paris", "B", ["Rome", "Paris"]), multiple_choice("The answer is A or B", "B")
    (1.0, 0.0)
    """
    gold = _gold_letter(answer, choices)
    if gold is None:
        return None
    given = None
    if completion is not None and readable(completion) and len(completion) <= 4 * MAX_TEXT:
        given = _chosen(*answer_part(completion), choices)
    return float(given == gold)


def _gold_letter(answer: Any, choices: Sequence[str] | None) -> str | None:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return chr(ord("A") + answer) if 0 <= answer < (len(choices) if choices else 26) else None
    return _letter(answer, choices) if isinstance(answer, str) else None


def _chosen(region: str, delimited: bool, choices: Sequence[str] | None) -> str | None:
    named = all_boxed(region)
    if not named:
        if (whole := _letter(region, choices)) is not None:
            return whole
        if _HEDGED.search(region) is not None:
            return None
        named = _STATED.findall(region)
    letters = [_letter(each, choices) for each in named]
    return letters[-1] if letters and (not delimited or len(set(letters)) == 1) else None


def _letter(text: str, choices: Sequence[str] | None) -> str | None:
    """The letter of the choice that the whole of `text` names."""
    letters = string.ascii_uppercase[: len(choices)] if choices else string.ascii_uppercase
    if (match := _LETTER.fullmatch(text.strip())) is not None and match[1].upper() in letters:
        return match[1].upper()
    wanted = _folded(text)
    for letter, choice in zip(letters, choices or (), strict=False):  # as many as there are letters
        if wanted == _folded(choice):
            return letter
    match = _LABELLED.fullmatch(text.strip())
    if match is None or not choices or match[1] not in letters:
        return None
    return match[1] if _letter(match[2], choices) == match[1] else None


def _folded(text: str) -> str:
    return _SPACES.sub(" ", text.strip()).casefold().rstrip(".")


def regex_match(completion: str | None, pattern: str) -> float:
    r"""1.0 when all of the answer part, stripped, matches `pattern` (DOTALL; `re.fullmatch`), else 0.0.

    The pattern belongs to the task, so it is trusted: one with nested repetitions, like `(a+)+`, can take for ever on
    a short answer. Answers of more than `MAX_SUBJECT` characters are wrong.

    Raises:
        ValueError: `pattern` is no regular expression.

    >>> regex_match("<think>hm</think> 2024-05-01\n", r"\d{4}-\d\d-\d\d"), regex_match("on 2024-05-01", r"\d{4}")
    (1.0, 0.0)
    """
    compiled = _compiled(pattern)
    text = _answer(completion)
    return float(0 < len(text) <= MAX_SUBJECT and compiled.fullmatch(text) is not None)


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
