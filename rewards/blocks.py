r"""Extractors of blocks: fenced code and JSON values. They judge nothing; scorers do.

Fences follow CommonMark 0.31 (section 4.5): a line of at least three backticks or tildes, closed by a line of at least
as many; JSON is RFC 8259, strictly: no NaN or Infinity, no number beyond a float's range, no key twice, at most 64
levels. Everything runs in time linear in the text.
Left out: indented code, fences inside lists and quotes, JSON with comments or trailing commas.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

MAX_DEPTH = 64
"""Levels of arrays and objects that JSON may have."""
MAX_DIGITS = 400
_MAX_TRIES = 8  # bare candidates that are parsed, from the last one backwards

_FENCE = re.compile(r" {0,3}(?P<mark>`{3,}|~{3,})[ \t]*(?P<info>[^\n]*)")
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_BRACKETS = re.compile(r'["\n{}\[\]]|\\[\s\S]')
_NESTING = re.compile(r'"(?:[^"\\]|\\[\s\S])*+"?|[{}\[\]]')


class CodeBlock(NamedTuple):
    """A closed fenced block: `language` is the first word behind the fence, in lower case ("" for none)."""

    language: str
    code: str


def code_blocks(text: str) -> list[CodeBlock]:
    """Every closed fenced block, in order. A block that is cut off is none.

    >>> code_blocks("so\\n```python\\nx = 1\\n```\\nand ~~~ no\\n```\\ny = 2")
    [CodeBlock(language='python', code='x = 1\\n')]
    """
    blocks: list[CodeBlock] = []
    opened: tuple[str, str] | None = None  # (fence, language)
    lines: list[str] = []
    for line in _LINE.findall(text):
        match = _FENCE.match(line)
        mark, info = (match["mark"], match["info"].strip()) if match else ("", "")
        if opened is None:
            if mark and not (mark[0] == "`" and "`" in info):  # else it is code within a line
                opened, lines = (mark, info.split()[0].lower() if info else ""), []
        elif mark.startswith(opened[0]) and not info:
            blocks.append(CodeBlock(opened[1], "".join(lines)))
            opened = None
        else:
            lines.append(line)
    return blocks


def fenced_code(text: str, *languages: str) -> str | None:
    """The code of the last closed fenced block, of one of `languages` if any are given ("" is a block without one).

    >>> both = "```python\\nx = 1\\n```\\n```text\\n1\\n```\\n"
    >>> fenced_code(both), fenced_code(both, "python", "py"), fenced_code(both, "c"), fenced_code("```\\nx = 1")
    ('1\\n', 'x = 1\\n', None, None)
    """
    found = [block.code for block in code_blocks(text) if not languages or block.language in languages]
    return found[-1] if found else None


def parse_json(text: str) -> Any:
    r"""The JSON value that the whole of `text` is.

    Raises:
        ValueError: it is none, or breaks one of the limits at the top of this file.

    >>> parse_json('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    >>> parse_json('{"a": NaN}')
    Traceback (most recent call last):
    ...
    ValueError: NaN is no JSON
    """
    depth = 0
    for match in _NESTING.finditer(text):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(match.group(), 0)
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels of JSON")
    return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_float, parse_int=_int)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def _float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError("a number is out of range")
    return value


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    return int(digits)


def json_text(text: str) -> str | None:
    r"""The JSON value in `text`, as it is written: all of it, else the last fenced block, else the last bare one.

    A fenced block counts when it is marked `json` or nothing. Bare, only objects and arrays count, and never a part of
    a larger one: a broken object is not searched for whole ones inside it.

    >>> json_text('Call:\n```json\n{"a": 1}\n```\n'), json_text('It is {"a": {"b": 1}}, so.'), json_text("the set {x}")
    ('{"a": 1}', '{"a": {"b": 1}}', None)
    """
    fenced = [block.code for block in code_blocks(text) if block.language in ("", "json")]
    if fenced:
        return fenced[-1].strip() if _is_json(fenced[-1]) else None
    if _is_json(text):
        return text.strip()
    return next((text[start:end] for start, end in reversed(_bracketed(text)) if _is_json(text[start:end])), None)


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _bracketed(text: str) -> list[tuple[int, int]]:
    """The last balanced {…} and […], none inside another; brackets inside JSON strings do not count."""
    stack: list[tuple[str, int]] = []
    spans: list[tuple[int, int]] = []
    in_string = False
    for match in _BRACKETS.finditer(text):
        token, place = match.group(), match.start()
        if token == '"' or in_string:
            in_string = bool(stack) and token != "\n" and (token == '"') != in_string
        elif token in "{[":
            stack.append((token, place))
        elif token in "}]" and stack and stack[-1][0] == ("{" if token == "}" else "["):
            _, start = stack.pop()
            while spans and spans[-1][0] > start:
                spans.pop()
            spans.append((start, place + 1))
    return spans[-_MAX_TRIES:]
