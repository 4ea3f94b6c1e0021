r"""Tries: the completions that `rewards.check` shows to a reward function, and what each of them should score.

A gold completion is the row's answer in some presentation (alone, in `\boxed{}`, after `####`, in tags, …); the ones
that a function accepts are found by trying. Around each accepted one stand variants that must score as well (line
breaks, `72.`, a nested box), and completions that must not (wrong, another row's, all answers at once, cut half-way).
Source: mistakes that were reproduced with rewards in use: a format regex without DOTALL, a box read up to its first
brace, a label that no row has, and the tries that made extractors and verifiers fail in public issues.
Left out: completions of a model (difficulty is measured with one), and answers of more than one column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from rewards.extract import all_boxed
from rewards.scorers import parse_number

Want = Literal["gold", "top", "spelling", "low", "top?", "low?", "any"]
"""gold: the answer in some presentation. top: a variant that must score like it; spelling: so does a number in other
words; low: must not. With a question mark: worth a note. any: may score anything, but must not fail."""

PRESENTATIONS = {
    "alone": "{answer}",
    "sentence": "The answer is {answer}.",
    "box": r"The answer is \boxed{{answer}}.",
    "hashes": "Let me see.\n#### {answer}",
    "tag": "<answer>{answer}</answer>",
    "think, then alone": "<think>Let me see.</think>{answer}",
    "think, then box": r"<think>Let me see.</think>\boxed{{answer}}",
    "think, then tag": "<think>Let me see.</think><answer>{answer}</answer>",
    "code block": "```python\n{answer}\n```",
}
GOLD_COLUMNS = ("answer", "solution", "ground_truth", "target", "gold", "label")
EOS = "<|im_end|>"
LONG = 50_000
_FULL_WIDTH = str.maketrans("0123456789-", "０１２３４５６７８９\u2212")


@dataclass(frozen=True)
class Try:
    """One completion for one row (from 0): what was done (`name`), in which presentation, what it should score."""

    row: int
    name: str
    text: str
    want: Want
    presentation: str = ""
    prefill: str = ""


def gold_text(value: Any) -> str | None:
    r"""The answer of a row as one short text: what follows `####`, else the last box, else all of it; None if unusable.

    >>> gold_text("48/2 = 24\n#### 72"), gold_text(r"so \boxed{3}"), gold_text(7), gold_text(["a"])
    ('72', '3', '7', None)
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    text = str(value)
    _, marked, rest = text.rpartition("####")
    boxes = all_boxed(text)
    return (rest if marked else boxes[-1] if boxes else text).strip() or None


def number_of(answer: str) -> Fraction | None:
    """The number that an answer is; None for `012`, whose zero says that it is text.

    >>> number_of("1,234"), number_of("012"), number_of("ab")
    (Fraction(1234, 1), None, None)
    """
    return None if re.match(r"[-+$\s]*0\d", answer) else parse_number(answer)


def wrong_answer(answer: str) -> str:
    """Another answer, of the same length where that can be: a number beside it, or the text with another last letter.

    >>> wrong_answer("72"), wrong_answer("99"), wrong_answer("3/4"), wrong_answer("cab"), wrong_answer("c0")
    ('73', '98', '7/4', 'ca0', 'c1')
    """
    value = number_of(answer)
    if value is None:
        return answer[:-1] + ("1" if answer[-1] == "0" else "0")
    after, before = str(value + 1), str(value - 1)
    return before if len(after) != len(answer) == len(before) else after


def spellings(answer: str) -> list[str]:
    r"""Other ways to write a number that is the whole answer.

    >>> spellings("1234"), spellings("0.75")
    (['1234.', '1,234.00'], ['3/4', '\\frac{3}{4}'])
    """
    value = number_of(answer)
    if value is None or max(len(str(value.numerator)), len(str(value.denominator))) > 15:
        return []
    above, below = value.numerator, value.denominator
    if below == 1:
        return [f"{above}.", f"{above:,}.00"]
    sign = "-" if above < 0 else ""
    found = [f"{above}/{below}", rf"{sign}\frac{{{abs(above)}}}{{{below}}}"]
    rest = below
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest == 1 and below <= 10**6:
        found.append(repr(above / below))
    return [text for text in found if text != answer]


def golds(row: int, answer: str, presentations: Mapping[str, str]) -> list[Try]:
    """The answer of a row in every presentation."""
    return [Try(row, "gold", fill(form, answer), "gold", name) for name, form in presentations.items()]


def fill(form: str, answer: str) -> str:
    r"""`form` with the answer in its place.

    >>> fill(r"\boxed{{answer}}", "7")
    '\\boxed{7}'
    """
    return form.replace("{answer}", answer)


def around(row: int, answers: Mapping[int, str], name: str, form: str, prefill: str) -> Iterator[Try]:
    """Everything that is tried in one presentation, for one row.

    Args:
        row: from 0; it has an answer.
        answers: of all rows that have one.
        name, form: the presentation.
        prefill: what the chat template puts in front of a completion, "" when it puts nothing there.
    """
    text = fill(form, answers[row])
    for what, changed, want in [*_variants(form, text, answers[row]), *_mistakes(form, text, row, answers)]:
        if changed != text:
            yield Try(row, what, changed, want, name)
    if text.startswith("<think>"):
        rest = text.removeprefix("<think>")
        yield Try(row, "pre-filled think", rest, "top" if prefill else "top?", name, prefill or "<think>")


def _variants(form: str, text: str, answer: str) -> Iterator[tuple[str, str, Want]]:
    """The right answer, written differently."""
    for what, change in _LINE_BREAKS.items():
        yield what, change(text), "top"
    yield "end-of-text token", text + EOS, "top?"
    if r"\boxed{" in form:
        yield "box in a box", fill(form, rf"\boxed{{{answer}}}"), "top"
    if number_of(answer) is not None:
        yield "unicode digits and minus", fill(form, answer.translate(_FULL_WIDTH)), "top?"
    for spelled in spellings(answer):
        if not (spelled.endswith(".") and "{answer}." in form):
            yield f"written as {_kind(spelled)}", fill(form, spelled), "spelling"
    yield "repeated 50 times", "\n".join([text] * 50), "any"


def _mistakes(form: str, text: str, row: int, answers: Mapping[int, str]) -> Iterator[tuple[str, str, Want]]:
    """What is no right answer."""
    answer = answers[row]
    yield "with NUL", text.replace(answer, answer + "\0"), "low?"
    for cut in ("</think>", "</answer>"):
        yield f"no {cut}", text.replace(cut, ""), "low?"
    yield "wrong answer", fill(form, wrong_answer(answer)), "low"
    yield "cut half-way", text[: len(text) // 2], "low"
    others = [each for place, each in answers.items() if place != row and not same(each, answer)]
    if others:
        yield "another row's answer", fill(form, others[row % len(others)]), "low"
        listed = list(dict.fromkeys([answer, *others]))[:20]
        yield "all answers listed", fill(form, ", ".join(listed)), "low"


def around_whole(row: int, completions: Mapping[int, str], name: str) -> Iterator[Try]:
    """What can be tried around a right completion whose parts are not known."""
    text = completions[row]
    yield Try(row, "line breaks at the ends", f"\n{text}\n\n", "top", name)
    yield Try(row, "end-of-text token", text + EOS, "top?", name)
    yield Try(row, "repeated 50 times", "\n".join([text] * 50), "any", name)
    yield Try(row, "cut half-way", text[: len(text) // 2], "low", name)
    others = [each for place, each in completions.items() if place != row and each != text]
    if others:
        yield Try(row, "another row's answer", others[row % len(others)], "low", name)


def anywhere(row: int, prompt: str) -> list[Try]:
    """What no presentation matters for: nothing, the prompt, and very long completions."""
    return [
        Try(row, "empty", "", "low"),
        Try(row, "white space", " \n\t\n", "low"),
        Try(row, "prompt copied back", prompt, "low"),
        Try(row, "50,000 characters", "so " * (LONG // 3), "low"),
        Try(row, "50,000 digits", "9" * LONG, "low"),
        Try(row, "50,000 characters of open boxes", r"\boxed{" * (LONG // 7), "low"),
        Try(row, "50,000 characters of open tags", "<think><answer>" * (LONG // 15), "low"),
    ]


def same(one: str, other: str) -> bool:
    """Whether two answers are equal as numbers or as text.

    >>> same("1/2", "0.5"), same("a", "A")
    (True, False)
    """
    left, right = number_of(one), number_of(other)
    return one.strip() == other.strip() if left is None or right is None else left == right


def plain_prompt(prompt: Any) -> str:
    """A prompt as text: messages one under the other.

    >>> plain_prompt([{"role": "user", "content": "1 + 1?"}])
    '1 + 1?'
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence):
        return "\n".join(str(message.get("content", "")) for message in prompt if isinstance(message, Mapping))
    return ""


def _kind(spelled: str) -> str:
    if spelled.endswith("."):
        return "72."
    if "frac" in spelled:
        return r"\frac{3}{4}"
    return "3/4" if "/" in spelled else "1,234.00" if spelled.endswith(".00") else "0.75"


def _inside(text: str) -> str:
    """Line breaks inside every block, also in the middle of the reasoning."""
    text = text.replace("Let me see.", "Let me\nsee.")
    return re.sub(r"(<think>|<answer>)(.*?)(</think>|</answer>)", r"\1\n\2\n\3", text, flags=re.DOTALL)


_LINE_BREAKS: dict[str, Callable[[str], str]] = {
    "line breaks at the ends": lambda text: f"\n{text}\n\n",
    "line breaks between the blocks": lambda text: re.sub(r"</think>(?=.)", "</think>\n\n", text, flags=re.DOTALL),
    "line breaks inside the blocks": _inside,
}
