r"""Scorers: 1.0 for a right answer, 0.0 for a wrong or missing one, None where the row has no answer to compare with.

A number is read exactly, as a Fraction, by one small grammar with bounds: no eval, no float rounding, no symbolic
algebra. `72.`, `1,234.00`, `.5`, `-3/4`, `1 1/2`, `\frac{3}{4}`, `2.5e3`, `$12` and `50%` are numbers; `72 cm`,
`1,5` and `2^{10}` are not.
Left out: symbolic equality, units, sets and intervals (math_equality.py).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

from rewards.extract import after_think, all_boxed, answer_part, hash_answer, last_number, plain_digits, readable

Percent = Literal["ratio", "points"]

MAX_NUMBER = 120
"""Characters that a number may have."""
_MAX_EXPONENT = 400

_INTEGER = r"\d{1,3}(?:,\d{3})+|\d+"
_DECIMAL = re.compile(
    rf"(?:(?P<whole>{_INTEGER})(?:\.(?P<part>\d*))?|\.(?P<only>\d+))(?:[eE](?P<exponent>[-+]?\d{{1,5}}))?"
)
_SCIENCE = re.compile(r"\s?(?:\\times|\\cdot|×)\s?10\^(?:\{([-+]?\d{1,5})\}|(\d))")
_RATIO = re.compile(rf"(?:(?P<mixed>\d+)\s)?(?P<above>{_INTEGER})\s?/\s?(?P<below>{_INTEGER})")
_LATEX_RATIO = re.compile(
    r"(?P<mixed>\d+)?\s?\\[dt]?frac\s?(?:\{\s?(?P<above>[-+]?\d+)\s?\}\s?\{\s?(?P<below>[-+]?\d+)\s?\}|(?P<short>\d\d))"
)
_SPACING = re.compile(r"\\[,!;: ]|\{,\}(?=\d{3})")


def parse_number(text: str, percent: Percent = "ratio") -> Fraction | None:
    r"""`text` as an exact number; None when the whole of it is not one number.

    Args:
        text: the answer alone; spaces, `$…$`, a currency sign and a final full stop around it are allowed.
        percent: what the task means by `50%`: "ratio" 1/2, "points" 50. One reading, never both.

    >>> parse_number("72.") == parse_number("72") == 72
    True
    >>> parse_number("1,234.00"), parse_number(r"-\frac{3}{4}"), parse_number("50%"), parse_number("50%", "points")
    (Fraction(1234, 1), Fraction(-3, 4), Fraction(1, 2), Fraction(50, 1))
    >>> parse_number("72 or 73"), parse_number("1,5"), parse_number("9" * 200)
    (None, None, None)
    """
    if len(text) > 4 * MAX_NUMBER or not readable(text):
        return None
    body = _undressed(plain_digits(text))
    if not 0 < len(body) <= MAX_NUMBER:
        return None
    negative = body[0] == "-"
    body = body[1:].strip() if body[0] in "-+" else body
    body = body.removeprefix("\\").removeprefix("$") if body.startswith(("$", "\\$")) else body
    unit = Fraction(1)
    if body.endswith("%"):
        body = body[:-1].removesuffix("\\").rstrip()
        unit = Fraction(1, 100) if percent == "ratio" else unit
    value = _magnitude(body)
    return None if value is None else (-value if negative else value) * unit


def _undressed(text: str) -> str:
    """Without what stands around or inside a number for looks only: spaces, math delimiters, a final full stop."""
    text = _SPACING.sub(lambda match: "," if match.group() == "{,}" else "", text.strip())
    for opening, closing in (("\\(", "\\)"), ("$", "$")):
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)].strip()
    return text[:-1].rstrip() if text.endswith(".") and text[:-1].rstrip()[-1:].isdecimal() else text


def _magnitude(text: str) -> Fraction | None:
    for pattern, reader in ((_RATIO, _ratio), (_LATEX_RATIO, _ratio), (_DECIMAL, _decimal)):
        if (match := pattern.fullmatch(text)) is not None:
            return reader(match)
    if (power := _SCIENCE.search(text)) is not None and power.end() == len(text):
        match = _DECIMAL.fullmatch(text, 0, power.start())
        return None if match is None else _scaled(_decimal(match), int(power.group(1) or power.group(2)))
    return None


def _decimal(match: re.Match[str]) -> Fraction | None:
    part = match["part"] or match["only"] or ""
    digits = (match["whole"] or "").replace(",", "") + part
    return _scaled(Fraction(int(digits), 10 ** len(part)), int(match["exponent"] or 0))


def _scaled(value: Fraction | None, exponent: int) -> Fraction | None:
    return None if value is None or abs(exponent) > _MAX_EXPONENT else value * Fraction(10) ** exponent


def _ratio(match: re.Match[str]) -> Fraction | None:
    found = match.groupdict()
    short = found.get("short")
    above, below = (short[0], short[1]) if short else (found["above"], found["below"])
    denominator = int(below.replace(",", ""))
    if denominator == 0:
        return None
    return int(found["mixed"] or 0) + Fraction(int(above.replace(",", "")), denominator)


def exact_match(completion: str | None, answer: Any) -> float | None:
    """1.0 when the completion's answer part (after `</think>`), stripped, is the text of `answer`.

    Source: the exact-match score of SQuAD (arXiv 1606.05250), without its dropping of case, articles and punctuation.
    Both are compared as Unicode NFC; NFKC would make 5² equal to 52.

    >>> exact_match("<think>hm</think>\\n012479\\n", "012479"), exact_match("12479", "012479")
    (1.0, 0.0)
    """
    gold = _text(answer)
    if not gold:
        return None
    given = after_think(completion) if completion is not None else None
    return float(given is not None and readable(given) and _text(given) == gold)


def _text(value: Any) -> str:
    return "" if value is None else unicodedata.normalize("NFC", str(value)).strip()


def numeric(
    completion: str | None, answer: Any, *, abs_tol: float = 0.0, rel_tol: float = 0.0, percent: Percent = "ratio"
) -> float | None:
    """1.0 when the completion's answer part (after `</think>`) is a number, alone, and equal to `answer`.

    Args:
        completion: text, or what an extractor found (None: 0.0).
        answer: the right number, as text or a number. None is returned where it is not a number.
        abs_tol, rel_tol: |x − answer| ≤ max(abs_tol, rel_tol · |answer|), computed exactly. 0: equality.
        percent: see `parse_number`.

    >>> numeric("72.", "72"), numeric("0.333", "1/3"), numeric("0.333", "1/3", rel_tol=0.01), numeric("7 or 8", "8")
    (1.0, 0.0, 1.0, 0.0)
    """
    gold = parse_number(str(answer), percent)
    if gold is None:
        return None
    given = after_think(completion) if completion is not None else None
    value = None if given is None else parse_number(given, percent)
    return float(value is not None and abs(value - gold) <= max(Fraction(abs_tol), Fraction(rel_tol) * abs(gold)))


def find_answer(text: str, percent: Percent = "ratio") -> tuple[str | None, int]:
    r"""The one numeric answer of a completion, as written, and how many boxes were looked at.

    Only the answer part counts (after the last `</think>`; inside `<answer>`, of which there may be one). There:
    the content of `\boxed{…}`, else the `####` line, else the last number. It is one answer or none: boxes of
    different content, two `####` lines, a box and a `####` line that differ, or `72 or 73` are no answer. Where no
    tag ends the reasoning, earlier boxes belong to it and the last one counts.

    >>> find_answer(r"first \boxed{70}, better \boxed{72}"), find_answer(r"</think> \boxed{70}, or \boxed{72}")
    (('72', 2), (None, 2))
    """
    region, delimited = answer_part(text)
    boxes = all_boxed(region)
    if boxes:
        marked = boxes[-1] if not delimited or len(set(boxes)) == 1 else None
        if marked is not None and "####" in region and not _agree(marked, hash_answer(region), percent):
            marked = None
        return marked, len(boxes)
    return (hash_answer(region) if "####" in region else last_number(region)), 0


def _agree(one: str, other: str | None, percent: Percent) -> bool:
    value = parse_number(one, percent)
    return other is not None and value is not None and value == parse_number(other, percent)


def math_accuracy(
    completion: str,
    answer: Any,
    *,
    abs_tol: float = 0.0,
    rel_tol: float = 0.0,
    percent: Percent = "ratio",
    log_metric: Callable[[str, float], None] | None = None,
) -> float | None:
    r"""1.0 when the completion's one answer (see `find_answer`) is the number `answer`, else 0.0.

    Source: accuracy rewards of DeepSeek-R1 (arXiv 2501.12948) and the answer formats of MATH and GSM8K.

    Args:
        completion: text of one completion.
        answer: the right number, or a worked solution that ends in `####` or holds a box. None is returned ("not
            applicable") where there is no number in it: plain numbers are all that this reward can judge.
        abs_tol, rel_tol, percent: see `numeric` and `parse_number`. For GSM8K's percent questions, whose answers are
            written without the sign, take percent="points".
        log_metric: given by the trainer; logs `num_boxes` where a completion has several.

    >>> math_accuracy(r"<think>7 \cdot 10 + 2</think> It is \boxed{72}.", "72")
    1.0
    >>> math_accuracy("48 + 24 = 72\n#### 72", "48/2 = 24 ... #### 72"), math_accuracy("It is 72 or 73.", 73)
    (1.0, 0.0)
    >>> math_accuracy("x + 1", "x + 1") is None
    True
    """
    gold = _gold(answer, percent)
    if gold is None:
        return None
    found, num_boxes = find_answer(completion, percent) if readable(completion) else (None, 0)
    if num_boxes > 1 and log_metric is not None:
        log_metric("num_boxes", num_boxes)
    return 0.0 if found is None else numeric(found, gold, abs_tol=abs_tol, rel_tol=rel_tol, percent=percent)


def _gold(answer: Any, percent: Percent) -> str | None:
    """The number in an answer column: all of it, else its last box, else what follows its last `####`."""
    text = str(answer)
    boxes = all_boxed(text)
    _, marked, rest = text.rpartition("####")
    for candidate in (text, boxes[-1] if boxes else "", rest if marked else ""):
        if parse_number(candidate, percent) is not None:
            return candidate
    return None
