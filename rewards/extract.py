r"""Extractors: where in a completion the answer stands. They judge nothing; scorers do.

All of them run in time linear in the text, whatever the text is, and return None when there is no answer there.
Fenced code and JSON stand in blocks.py. Left out: NFKC, which turns 5² into 52 (digits of other scripts are read).
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

_BRACES = re.compile(r"\\{1,2}boxed\s{0,8}\{|\\[\\{}]|[{}]")
_HASHES = re.compile(r"(?<!#)####(?!#)")
_UNREADABLE = re.compile("[\0\ud800-\udfff]")
# Other signs, points and spaces that numbers are written with.
_OTHER = "\u2212\ufe63\uff0d\u2010\u2011\uff0b\uff0e\uff0c\uff05\ufe6a\uff0f\u2044\u2215\uff04\u00a0\u2009\u202f\u2007"
_CHARACTERS = str.maketrans(_OTHER, "-----+.,%%///$    ")

_PLAIN = r"[-+]?\$?(?:\d(?:[\d,]*\d)?(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,5})?"
_FRACTION = r"[-+]?\\[dt]?frac\s?(?:\{[-+]?\d{1,60}\}\s?\{[-+]?\d{1,60}\}|\d\d)"
_NUMBER = re.compile(  # not glued to a word, an exponent, an index or another number
    r"(?<![\w.,/^{}\\])(?<!\^[-+])"
    rf"(?:{_FRACTION}|{_PLAIN}(?:\s?/\s?\d(?:[\d,]*\d)?)?)(?:\s?\\?%)?"
    r"(?![\w^{/]|[.,]\d|\\[a-zA-Z])"
)
_ALTERNATIVES = re.compile(r"[^.!?\n]{0,20}\bor\b[^.!?\n]{0,20}")


def readable(text: str) -> bool:
    """Whether `text` is free of NUL and lone surrogates, which no honest answer holds.

    >>> readable("72"), readable("72\\0"), readable("72\\ud800")
    (True, False, False)
    """
    return _UNREADABLE.search(text) is None


def plain_digits(text: str) -> str:
    """`text` with digits of any script, signs and spaces as ASCII; everything else as it is.

    Source: Unicode, general category Nd. Not NFKC, which also turns 5² into 52 and ½ into 1⁄2.

    >>> plain_digits("−７２"), plain_digits("٣٫5 5²")
    ('-72', '3٫5 5²')
    """
    if text.isascii():
        return text
    text = text.translate(_CHARACTERS)
    return "".join(str(unicodedata.decimal(letter)) if letter.isdecimal() else letter for letter in text)


def after_think(text: str, tag: str = "think") -> str | None:
    """What follows the last `</think>`: the answer part. The whole text when there is no tag at all.

    None when reasoning was opened and never closed (cut off). The opening tag may be missing: many chat templates
    write it into the prompt. Source: the format of DeepSeek-R1 (arXiv 2501.12948).

    >>> after_think("<think>7 or 8?</think> 8")
    ' 8'
    >>> after_think("7 or 8?</think> 8"), after_think("8"), after_think("<think>7 or 8")
    (' 8', '8', None)
    """
    _, closed, rest = text.rpartition(f"</{tag}>")
    return None if f"<{tag}>" in rest else rest if closed else text


def xml_tag(text: str, tag: str) -> str | None:
    """The content of the one `<tag>…</tag>` in `text`, stripped; None when there is none, or more than one.

    >>> xml_tag("so <answer> 72 </answer>", "answer")
    '72'
    >>> xml_tag("<answer>72</answer><answer>73</answer>", "answer"), xml_tag("<answer>72", "answer")
    (None, None)
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    return text[start:end].strip() if start <= end else None


def answer_part(text: str) -> tuple[str, bool]:
    """Where the answer of a completion may stand, and whether a tag delimits it.

    After the last `</think>`; inside `<answer>` where that tag is used, of which there may be one. Two answer blocks,
    or reasoning that never ended, leave nothing: ("", True).

    >>> answer_part("hm</think> 8"), answer_part("<think>hm</think> <answer>8</answer>, done"), answer_part("8")
    ((' 8', True), ('8', True), ('8', False))
    >>> answer_part("<answer>7</answer><answer>8</answer>"), answer_part("<think>8")
    (('', True), ('', True))
    """
    region = after_think(text)
    if region is None:
        return "", True
    if "<answer>" in region or "</answer>" in region:
        return xml_tag(region, "answer") or "", True
    return region, len(region) < len(text)


class _Box(NamedTuple):
    start: int
    end: int
    content_start: int
    content_end: int


def all_boxed(text: str) -> list[str]:
    r"""Contents of every balanced `\boxed{…}`, in order; a box around a box counts as one.

    Escaped braces do not count; a doubled backslash, as in JSON, does no harm. Source: the answer format of MATH
    (arXiv 2103.03874).

    >>> all_boxed(r"\boxed{\frac{1}{2}} then \boxed{3")
    ['\\frac{1}{2}']
    >>> all_boxed(r"\boxed{\{1, 2\}} \boxed{\boxed{7}}")
    ['\\{1, 2\\}', '7']
    """
    stack: list[tuple[int, int] | None] = []  # open braces: (start of \boxed, start of content), None for others
    boxes: list[_Box] = []  # balanced so far, none inside another
    for match in _BRACES.finditer(text):
        token = match.group()
        if "boxed" in token:
            stack.append((match.start(), match.end()))
        elif token == "{":
            stack.append(None)
        elif token == "}" and stack and (opened := stack.pop()) is not None:
            inside = []
            while boxes and boxes[-1].start > opened[0]:
                inside.append(boxes.pop())
            box = _Box(opened[0], match.end(), opened[1], match.start())
            boxes.append(_without_wrapper(text, box, inside))
    return [text[box.content_start : box.content_end].strip() for box in boxes]


def _without_wrapper(text: str, box: _Box, inside: list[_Box]) -> _Box:
    """`box`, with the content of the one box inside it where it holds nothing else."""
    if len(inside) != 1:
        return box
    inner = inside[0]
    around = text[box.content_start : inner.start] + text[inner.end : box.content_end]
    return box if around.strip() else _Box(box.start, box.end, inner.content_start, inner.content_end)


def boxed(text: str) -> str | None:
    r"""The content of the last balanced `\boxed{…}`.

    >>> boxed(r"so \boxed{3}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    boxes = all_boxed(text)
    return boxes[-1] if boxes else None


def hash_answer(text: str) -> str | None:
    r"""What follows `####` on its line; None when it stands nowhere, or more than once.

    Source: GSM8K (arXiv 2110.14168), whose solutions end in a line `#### 72`. A Markdown heading of that level counts
    as well, so ask for no headings.

    >>> hash_answer("48 + 24 = 72\n#### 72")
    '72'
    >>> hash_answer("#### 72\n#### 73") is None
    True
    """
    marks = list(_HASHES.finditer(text))
    return text[marks[0].end() :].partition("\n")[0].strip() or None if len(marks) == 1 else None


def last_number(text: str) -> str | None:
    r"""The last number in running text, as it is written (commas, percent, fraction, a dollar sign).

    None when the last digit of the text belongs to something else (`2^{10}`, `x3`, `1/2/3`) or when alternatives are
    offered (`72 or 73`): then no number is *the* answer.

    >>> last_number("48 and 24 make 72."), last_number("It costs $1,234.50!"), last_number("about 3/4 of it")
    ('72', '$1,234.50', '3/4')
    >>> last_number("72 or 73"), last_number("so 2^{10}"), last_number("none")
    (None, None, None)
    """
    text = plain_digits(text)
    matches = list(_NUMBER.finditer(text))
    last_digit = next((place for place in range(len(text) - 1, -1, -1) if text[place].isdecimal()), None)
    if not matches or last_digit is None or not matches[-1].start() <= last_digit < matches[-1].end():
        return None
    if len(matches) > 1 and _ALTERNATIVES.fullmatch(text, matches[-2].end(), matches[-1].start()):
        return None
    return matches[-1].group()
