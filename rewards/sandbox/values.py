"""Plain values on the wire between judge and judged: JSON in which every type but None and bool is named.

    7 → ["i", "0x7"]    "a" → ["u", "61"] (UTF-8)    {7: True} → ["d", [[["i", "0x7"], true]]]

A whitelist by exact type: a subclass of int, or an object with an `__eq__` of its own, is no plain value. What arrives
is rebuilt by the judge from text, so nothing of the judged process's making is ever called or compared.
Used on both sides; to write, nothing is imported: `json` costs the supervisor a third of its start.
Left out: numpy arrays, dataclasses, anything with methods.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_DEPTH = 64
MAX_ODD_KEYS = 4096  # keys whose hashes somebody could have chosen to be equal
MAX_INTEGER_BITS = 400_000  # division of larger ones would take the judge seconds
_PRIME = 2**61 - 1  # hash(n) is n modulo this
_SEQUENCES: dict[type, str] = {list: "l", tuple: "t", set: "s", frozenset: "z"}
_BACK: dict[str, Any] = {"l": list, "t": tuple, "s": set, "z": frozenset}


class NotPlainError(ValueError):
    """A value of another type, too deep, or text that no plain value was written as."""


def encode(value: Any, depth: int = 0) -> Any:  # noqa: PLR0911 - one a type
    """`value` as JSON-ready lists. Raises NotPlainError.

    >>> encode([1, "a", None])
    ['l', [['i', '0x1'], ['u', '61'], None]]
    """
    if depth > MAX_DEPTH:
        raise NotPlainError(f"nested more than {MAX_DEPTH} deep")
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return ["u", value.encode("utf-8", "surrogatepass").hex()]
    if kind is int and value.bit_length() <= MAX_INTEGER_BITS:
        return ["i", hex(value)]
    if kind is float:
        return ["f", value.hex()]
    if kind is complex:
        return ["c", value.real.hex(), value.imag.hex()]
    if kind is bytes:
        return ["b", value.hex()]
    if kind in _SEQUENCES:
        return [_SEQUENCES[kind], [encode(element, depth + 1) for element in value]]
    if kind is dict:
        return ["d", [[encode(key, depth + 1), encode(element, depth + 1)] for key, element in value.items()]]
    raise NotPlainError(f"{kind.__name__} is no plain value, or too large")


def dumps(value: Any) -> str:
    """`value` as JSON text (ASCII). Raises NotPlainError."""
    return _text(encode(value))


def _text(node: Any) -> str:
    """What encode gave: lists, None, bool, and text that needs no escapes."""
    if type(node) is list:
        return f"[{','.join(map(_text, node))}]"
    return {None: "null", True: "true", False: "false"}[node] if type(node) is not str else f'"{node}"'


def loads(text: str | bytes) -> Any:
    """The value that `dumps` wrote; hostile text costs time linear in its length. Raises NotPlainError.

    >>> loads(dumps({"a": (1, 0.5), "b": {2, 3}}))
    {'a': (1, 0.5), 'b': {2, 3}}
    """
    import json

    try:
        return decode(json.loads(text, parse_int=_refuse, parse_float=_refuse, parse_constant=_refuse))
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise NotPlainError(str(error)) from error


def _refuse(text: str) -> Any:
    raise NotPlainError("a bare number")


def decode(node: Any, depth: int = 0) -> Any:
    """The value of JSON-ready lists, checked. Raises NotPlainError, ValueError or TypeError."""
    if depth > MAX_DEPTH:
        raise NotPlainError(f"nested more than {MAX_DEPTH} deep")
    if node is None or type(node) is bool:
        return node
    if type(node) is not list or len(node) not in (2, 3) or type(node[0]) is not str:
        raise NotPlainError("no tagged value")
    tag, *content = node
    if tag in ("l", "t", "s", "z") and len(content) == 1 and type(content[0]) is list:
        elements = [decode(element, depth + 1) for element in content[0]]
        return _BACK[tag](_hashable(elements) if tag in "sz" else elements)
    if tag == "d" and len(content) == 1 and type(content[0]) is list:
        pairs = [(decode(key, depth + 1), decode(element, depth + 1)) for key, element in content[0]]
        _hashable([key for key, _ in pairs])
        return dict(pairs)
    return _scalar(tag, content)


def _scalar(tag: str, content: list[Any]) -> Any:
    if tag == "i" and len(content[0]) > MAX_INTEGER_BITS // 4 + 3:
        raise NotPlainError("an integer too large")
    if not all(type(part) is str for part in content) or len(content) != (2 if tag == "c" else 1):
        raise NotPlainError("no tagged value")
    match tag:
        case "u":
            return bytes.fromhex(content[0]).decode("utf-8", "surrogatepass")
        case "i":
            return int(content[0], 16)
        case "f":
            return float.fromhex(content[0])
        case "b":
            return bytes.fromhex(content[0])
        case "c":
            return complex(float.fromhex(content[0]), float.fromhex(content[1]))
    raise NotPlainError("an unknown tag")


def _hashable(keys: list[Any]) -> list[Any]:
    """`keys`, unless so many of them could collide that building the set takes time quadratic in their number."""
    if len(keys) > MAX_ODD_KEYS and not all(map(_spread, keys)):
        raise NotPlainError(f"more than {MAX_ODD_KEYS} keys that are no text or small integers")
    return keys


def _spread(key: Any) -> bool:
    return type(key) in (str, bytes) or (type(key) is int and abs(key) < _PRIME)
