r"""JSON rewards: whether the JSON value in a completion fits a schema.

The schema language is the part of JSON Schema 2020-12 that describes answers and tool arguments: type, enum, const,
properties, required, additionalProperties, minProperties, maxProperties, items, prefixItems, minItems, maxItems,
uniqueItems, minimum, maximum, exclusiveMinimum, exclusiveMaximum, multipleOf, minLength, maxLength, pattern, anyOf,
oneOf, allOf, not. As there, 1.0 is an integer, true is not 1, and `pattern` searches (anchor it). Any other keyword
that could decide something is an error, never passed over; titles, descriptions, defaults and formats decide nothing.
Left out: $ref, if/then/else, dependent… and patternProperties, formats; patterns are those of Python and are trusted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from rewards.blocks import json_text, parse_json
from rewards.extract import answer_part, readable

Schema = Mapping[str, Any] | bool

MAX_TEXT = 50_000
"""Characters of an answer that are parsed; a longer one does not fit."""
MAX_SUBJECT = 10_000
"""Characters of a string that a pattern is tried on; a longer one does not fit."""

_IGNORED = frozenset(
    {"$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"format", "strict"}
)
_NUMBER = (int, float)
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": lambda value: _is_number(value),
    "integer": lambda value: _is_number(value) and value == int(value),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}
_Check = Callable[[Any, Any, Mapping[str, Any], str], str | None]  # (value, keyword's value, its schema, path)


def json_schema(completion: str | None, schema: Schema | str) -> float:
    r"""1.0 when the JSON value of the answer part fits `schema`, 0.0 when it does not or there is none.

    Args:
        completion: text of one completion; see `rewards.blocks.json_text` for what its value is.
        schema: a dictionary or, better in a dataset, JSON text: tables fill the keys of dictionaries up with None.

    Raises:
        ValueError: the schema is none, or has a keyword that is not known here.

    >>> schema = '{"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}'
    >>> json_schema('<think>hm</think> {"age": 7}', schema), json_schema('{"age": -7}', schema)
    (1.0, 0.0)
    """
    known = read_schema(schema)
    text = answer_part(completion)[0] if completion is not None else ""
    if len(text) > MAX_TEXT or not readable(text) or (found := json_text(text)) is None:
        return 0.0
    return float(schema_error(parse_json(found), known) is None)


def read_schema(schema: Any) -> Schema:
    """`schema` parsed, if it is text, and found to be one that this file can judge by.

    Raises:
        ValueError: naming the keyword and where it stands.

    >>> read_schema('{"items": {"$ref": "#/x"}}')
    Traceback (most recent call last):
    ...
    ValueError: schema/items: '$ref' is not supported
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise ValueError(f"the schema is no JSON: {error}") from None
    _check_schema(schema, "schema")
    return schema


def _check_schema(schema: Any, path: str) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"{path} is {type(schema).__name__} (want an object or a boolean)")
    for keyword, given in schema.items():
        if keyword in _IGNORED:
            continue
        if keyword not in _KEYWORDS:
            raise ValueError(f"{path}: {keyword!r} is not supported")
        wanted = _KEYWORDS[keyword][0]
        if not wanted(given):
            raise ValueError(f"{path}/{keyword}: {str(given)[:80]} cannot be used there")
        for place, inner in _inner(keyword, given):
            _check_schema(inner, f"{path}/{place}")


def _inner(keyword: str, given: Any) -> list[tuple[str, Any]]:
    """The schemas that a keyword holds."""
    if keyword == "properties":
        return [(f"properties/{name}", inner) for name, inner in given.items()]
    if keyword in ("prefixItems", "anyOf", "oneOf", "allOf"):
        return [(f"{keyword}/{place}", inner) for place, inner in enumerate(given)]
    return [(keyword, given)] if keyword in ("items", "additionalProperties", "not") else []


def schema_error(value: Any, schema: Schema, path: str = "value") -> str | None:
    """What about the JSON `value` does not fit `schema` first, or None. The schema must have been read before.

    >>> schema_error({"a": [1, "x"]}, {"properties": {"a": {"items": {"type": "integer"}}}})
    'value/a/1: type is not integer'
    """
    if isinstance(schema, bool):
        return None if schema else f"{path}: nothing fits here"
    for keyword, given in schema.items():
        if keyword in _KEYWORDS:
            problem = _KEYWORDS[keyword][1](value, given, schema, path)
            if problem is not None:
                return problem
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBER) and not isinstance(value, bool)


def same_json(value: Any) -> Any:
    """A hashable that is equal for equal JSON values: 1 is 1.0, true is not 1, key order does not matter.

    >>> same_json({"a": 1, "b": [True]}) == same_json({"b": [True], "a": 1.0}), same_json(True) == same_json(1)
    (True, False)
    """
    if isinstance(value, dict):
        return "object", frozenset((key, same_json(each)) for key, each in value.items())
    if isinstance(value, list):
        return "array", tuple(same_json(each) for each in value)
    return type(value).__name__ if isinstance(value, bool) else "atom", value


# --- one check per keyword ------------------------------------------------------------------------------------


def _type(value: Any, given: Any, schema: Mapping[str, Any], path: str) -> str | None:
    names = [given] if isinstance(given, str) else given
    return None if any(_TYPES[name](value) for name in names) else f"{path}: type is not {' or '.join(names)}"


def _enum(value: Any, given: Any, schema: Mapping[str, Any], path: str) -> str | None:
    return None if same_json(value) in [same_json(each) for each in given] else f"{path}: not in enum"


def _const(value: Any, given: Any, schema: Mapping[str, Any], path: str) -> str | None:
    return None if same_json(value) == same_json(given) else f"{path}: not the const"


def _properties(value: Any, given: Any, schema: Mapping[str, Any], path: str) -> str | None:
    if not isinstance(value, dict):
        return None
    found = (schema_error(value[name], inner, f"{path}/{name}") for name, inner in given.items() if name in value)
    return next((problem for problem in found if problem is not None), None)


def _required(value: Any, given: Any, schema: Mapping[str, Any], path: str) -> str | None:
    missing = [name for name in given if name not in value] if isinstance(value, dict) else []
    return f"{path}: {missing[0]!r} is missing" if missing else None


def _additional(value: Any, given: Any, schema: Mapping[str, Any], path: str) -> str | None:
    if not isinstance(value, dict):
        return None
    others = [name for name in value if name not in schema.get("properties", {})]
    found = (schema_error(value[name], given, f"{path}/{name}") for name in others)
    return next((problem for problem in found if problem is not None), None)


def _prefix_items(value: Any, given: Any, schema: Mapping[str, Any], path: str) -> str | None:
    pairs = enumerate(zip(value, given, strict=False)) if isinstance(value, list) else ()
    found = (schema_error(each, inner, f"{path}/{place}") for place, (each, inner) in pairs)
    return next((problem for problem in found if problem is not None), None)


def _items(value: Any, given: Any, schema: Mapping[str, Any], path: str) -> str | None:
    if not isinstance(value, list):
        return None
    first = len(schema.get("prefixItems", ()))
    found = (schema_error(each, given, f"{path}/{place}") for place, each in enumerate(value) if place >= first)
    return next((problem for problem in found if problem is not None), None)


def _unique(value: Any, given: Any, schema: Mapping[str, Any], path: str) -> str | None:
    doubled = given and isinstance(value, list) and len({same_json(each) for each in value}) < len(value)
    return f"{path}: items are not unique" if doubled else None


def _bound(name: str, kind: type, holds: Callable[[Any, Any], bool]) -> _Check:
    """A check of a number, or of the length of a `kind`."""

    def check(value: Any, given: Any, schema: Mapping[str, Any], path: str) -> str | None:
        applies = _is_number(value) if kind is float else isinstance(value, kind)
        measured = value if kind is float else len(value) if applies else 0
        return f"{path}: breaks {name} {given}" if applies and not holds(measured, given) else None

    return check


def _is_multiple(value: float, step: float) -> bool:
    return (Fraction(str(value)) / Fraction(str(step))).denominator == 1  # as written: 0.3 is 3 · 0.1


def _pattern(value: Any, given: Any, schema: Mapping[str, Any], path: str) -> str | None:
    if not isinstance(value, str):
        return None
    fits = len(value) <= MAX_SUBJECT and re.search(given, value) is not None
    return None if fits else f"{path}: breaks pattern {given!r}"


def _fitting(value: Any, given: Any, path: str) -> int:
    return sum(schema_error(value, inner, path) is None for inner in given)


def _any_of(value: Any, given: Any, schema: Mapping[str, Any], path: str) -> str | None:
    return None if _fitting(value, given, path) else f"{path}: fits none of anyOf"


def _one_of(value: Any, given: Any, schema: Mapping[str, Any], path: str) -> str | None:
    num = _fitting(value, given, path)
    return None if num == 1 else f"{path}: fits {num} of oneOf"


def _all_of(value: Any, given: Any, schema: Mapping[str, Any], path: str) -> str | None:
    found = (schema_error(value, inner, path) for inner in given)
    return next((problem for problem in found if problem is not None), None)


def _not(value: Any, given: Any, schema: Mapping[str, Any], path: str) -> str | None:
    return f"{path}: fits what it must not" if schema_error(value, given, path) is None else None


# --- what may stand behind a keyword --------------------------------------------------------------------------


def _is_size(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given >= 0


def _is_step(given: Any) -> bool:
    return _is_number(given) and given > 0


def _is_names(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(name, str) for name in given)


def _is_types(given: Any) -> bool:
    names = [given] if isinstance(given, str) else given
    return bool(names) and _is_names(names) and all(name in _TYPES for name in names)


def _is_pattern(given: Any) -> bool:
    try:
        return isinstance(given, str) and bool(re.compile(given))
    except re.error:
        return False


def _is_list(given: Any) -> bool:
    return isinstance(given, list) and bool(given)


def _is_schema(given: Any) -> bool:
    return isinstance(given, Mapping | bool)


_KEYWORDS: dict[str, tuple[Callable[[Any], bool], _Check]] = {
    "type": (_is_types, _type),
    "enum": (_is_list, _enum),
    "const": (lambda given: True, _const),
    "properties": (lambda given: isinstance(given, Mapping), _properties),
    "required": (_is_names, _required),
    "additionalProperties": (_is_schema, _additional),
    "minProperties": (_is_size, _bound("minProperties", dict, lambda size, given: size >= given)),
    "maxProperties": (_is_size, _bound("maxProperties", dict, lambda size, given: size <= given)),
    "items": (_is_schema, _items),
    "prefixItems": (_is_list, _prefix_items),
    "minItems": (_is_size, _bound("minItems", list, lambda size, given: size >= given)),
    "maxItems": (_is_size, _bound("maxItems", list, lambda size, given: size <= given)),
    "uniqueItems": (lambda given: isinstance(given, bool), _unique),
    "minimum": (_is_number, _bound("minimum", float, lambda value, given: value >= given)),
    "maximum": (_is_number, _bound("maximum", float, lambda value, given: value <= given)),
    "exclusiveMinimum": (_is_number, _bound("exclusiveMinimum", float, lambda value, given: value > given)),
    "exclusiveMaximum": (_is_number, _bound("exclusiveMaximum", float, lambda value, given: value < given)),
    "multipleOf": (_is_step, _bound("multipleOf", float, _is_multiple)),
    "minLength": (_is_size, _bound("minLength", str, lambda size, given: size >= given)),
    "maxLength": (_is_size, _bound("maxLength", str, lambda size, given: size <= given)),
    "pattern": (_is_pattern, _pattern),
    "anyOf": (_is_list, _any_of),
    "oneOf": (_is_list, _one_of),
    "allOf": (_is_list, _all_of),
    "not": (_is_schema, _not),
}
