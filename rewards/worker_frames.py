"""Frames between a pool and its workers: 4 bytes of length, big-endian, then one JSON object in ASCII.

    request  {"id": text, "args": […], "kwargs": {…}}
    reply    {"id": text, "value": any} or {"id": text, "error": text}

What a worker sends is parsed, never unpickled; NaN, ±Infinity and numbers that overflow a float are refused, and so is
every reply that is not exactly one of the two forms. Left out: descriptors and processes (worker.py, worker_main.py).
"""

from __future__ import annotations

import json
import math
from typing import Any

HEADER = 4
MAX_REPLY = 16 * 2**20
"""Bytes of a reply; a longer one is refused on both sides."""


def encode(message: dict[str, Any]) -> bytes:
    """One frame.

    Raises:
        TypeError, ValueError, RecursionError: `message` holds what JSON cannot.

    >>> encode({"id": "a", "value": 1})
    b'\\x00\\x00\\x00\\x17{"id": "a", "value": 1}'
    """
    body = json.dumps(message, allow_nan=False).encode("ascii")
    return len(body).to_bytes(HEADER, "big") + body


def decode(body: bytes) -> Any:
    """The JSON value of a frame's body.

    Raises:
        ValueError: not JSON, or a number that is not finite.

    >>> decode(b'{"value": NaN}')
    Traceback (most recent call last):
    ...
    ValueError: the number NaN
    """
    try:
        return json.loads(body.decode("ascii"), parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(token: str) -> Any:
    raise ValueError(f"the number {token}")


def _finite(token: str) -> float:
    number = float(token)
    return number if math.isfinite(number) else _refuse(token)


def check_reply(reply: Any, request_id: str) -> dict[str, Any]:
    """`reply` when it answers `request_id` in one of the two forms.

    Raises:
        ValueError: it does not.

    >>> check_reply({"id": "a", "value": 1}, "b")
    Traceback (most recent call last):
    ...
    ValueError: an answer to no question
    """
    if not isinstance(reply, dict) or reply.keys() not in ({"id", "value"}, {"id", "error"}):
        raise ValueError("no reply")
    if reply["id"] != request_id:
        raise ValueError("an answer to no question")
    if not isinstance(reply.get("error", ""), str):
        raise ValueError("an error that is no text")
    return reply
