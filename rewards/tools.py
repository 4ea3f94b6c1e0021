r"""Tool-call validity: whether a completion calls tools that exist, with arguments that fit their schemas.

Source: the function tools of OpenAI's chat format for what `tools` holds; the `<tool_call>` blocks of Hermes and Qwen
templates, holding `{"name": …, "arguments": {…}}`, for how a model calls them. Arguments written as JSON text count.
Left out: whether the call is the right one, other call formats (Llama's pythonic, Mistral's), calling anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewards.blocks import json_text, parse_json
from rewards.extract import after_think, readable
from rewards.json_schema import MAX_TEXT, read_schema, schema_error

OPENING, CLOSING = "<tool_call>", "</tool_call>"


def tool_calls(text: str) -> list[Any] | None:
    """The calls in `text`: the JSON values of its `<tool_call>` blocks, else its one JSON value (a list is several).

    None when a block is not closed, nested or no JSON; empty when there is no call.

    >>> tool_calls('<tool_call>{"name": "f"}</tool_call> <tool_call>{"name": "g"}</tool_call>')
    [{'name': 'f'}, {'name': 'g'}]
    >>> tool_calls('I call {"name": "f"}'), tool_calls("no call"), tool_calls('<tool_call>{"name": "f"}')
    ([{'name': 'f'}], [], None)
    """
    if OPENING not in text and CLOSING not in text:
        found = json_text(text)
        value = [] if found is None else parse_json(found)
        return value if isinstance(value, list) else [value] if isinstance(value, dict) else []
    pieces = text.split(OPENING)
    if CLOSING in pieces[0] or any(piece.count(CLOSING) != 1 for piece in pieces[1:]):
        return None
    calls = []
    for piece in pieces[1:]:
        try:
            calls.append(parse_json(piece.partition(CLOSING)[0]))
        except ValueError:
            return None
    return calls


def tool_call(completion: str | None, tools: Sequence[Any] | str | None) -> float | None:
    r"""1.0 when a completion calls at least one tool and every call is valid, else 0.0; None without tools.

    Args:
        completion: text of one completion; calls inside the reasoning do not count.
        tools: `{"type": "function", "function": {"name": …, "parameters": schema}}` or the inner part alone, in a list
            or as JSON text of one. Arguments that the schema does not name are refused unless it allows them itself.

    Raises:
        ValueError: a tool has no name, or a schema that rewards/json_schema.py cannot read.

    >>> tools = [{"name": "add", "parameters": {"properties": {"a": {"type": "number"}}, "required": ["a"]}}]
    >>> tool_call('<think>hm</think><tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', tools)
    1.0
    >>> [tool_call(f'<tool_call>{{"name": {call}}}</tool_call>', tools) for call in ('"sub"', '"add", "arguments": {}')]
    [0.0, 0.0]
    """
    schemas = _schemas(tools)
    if not schemas:
        return None
    region = after_think(completion) if completion is not None else None
    if region is None or len(region) > MAX_TEXT or not readable(region):
        return 0.0
    calls = tool_calls(region)
    return float(bool(calls) and all(call_error(call, schemas) is None for call in calls or ()))


def call_error(call: Any, schemas: Mapping[str, Any]) -> str | None:
    """What is wrong with one call, or None. `schemas`: that of the arguments, by the name of the tool.

    >>> call_error({"name": "f", "arguments": '{"a": 1}'}, {"f": {"required": ["b"]}})
    "arguments: 'b' is missing"
    """
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not set(call) <= {"name", "arguments"}:
        return "a call is an object of name and arguments"
    if call["name"] not in schemas:
        return f"there is no tool {call['name'][:80]!r}"
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError:
            return "arguments are no JSON"
    if not isinstance(arguments, dict):
        return "arguments are no object"
    return schema_error(arguments, schemas[call["name"]], "arguments")


def _schemas(tools: Any) -> dict[str, Any]:
    tools = parse_json(tools) if isinstance(tools, str) else tools
    found = {}
    for tool in tools or ():
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise ValueError(f"{str(tool)[:80]} is no tool (want an object with a name)")
        found[inner["name"]] = _closed(read_schema(inner.get("parameters") or {}))
    return found


def _closed(schema: Any) -> Any:
    """`schema` with no further arguments allowed, unless it says something on that itself."""
    is_open = isinstance(schema, bool) or any(name in schema for name in ("anyOf", "oneOf", "allOf"))
    return schema if is_open else {"additionalProperties": False} | dict(schema)
