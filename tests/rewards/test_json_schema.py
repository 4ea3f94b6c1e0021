"""The schema language row by row, against the reference validator where it is installed; and tool calls."""

import importlib.util
import json

import pytest

from rewards.json_schema import json_schema, read_schema, schema_error
from rewards.tools import tool_call, tool_calls

ROWS = [  # (schema, values that fit, values that do not)
    ({}, [1, None, "x", {}], []),
    (True, [1], []),
    (False, [], [1, None]),
    ({"type": "integer"}, [1, 1.0, -3], [1.5, "1", True, None]),
    ({"type": "number"}, [1, 1.5], ["1", True, None]),
    ({"type": "string"}, ["", "x"], [1, None, ["x"]]),
    ({"type": "boolean"}, [True, False], [0, 1, "true"]),
    ({"type": "null"}, [None], [0, False, "", []]),
    ({"type": "object"}, [{}], [[], None]),
    ({"type": "array"}, [[]], [{}, "x"]),
    ({"type": ["string", "null"]}, ["x", None], [1]),
    ({"enum": [1, "a", None]}, [1, 1.0, "a", None], [True, "b", 2]),
    ({"const": {"a": [1]}}, [{"a": [1]}, {"a": [1.0]}], [{"a": [True]}, {"a": [1], "b": 1}]),
    ({"const": False}, [False], [0, None]),
    ({"properties": {"a": {"type": "integer"}}}, [{"a": 1}, {}, {"b": "x"}, 7], [{"a": "1"}]),
    ({"required": ["a", "b"]}, [{"a": 1, "b": None}, [1]], [{"a": 1}, {}]),
    ({"properties": {"a": {}}, "additionalProperties": False}, [{"a": 1}, {}], [{"b": 1}, {"a": 1, "b": 1}]),
    ({"additionalProperties": {"type": "integer"}}, [{"x": 1}], [{"x": "1"}]),
    ({"minProperties": 1, "maxProperties": 2}, [{"a": 1}, {"a": 1, "b": 2}, []], [{}, {"a": 1, "b": 2, "c": 3}]),
    ({"items": {"type": "integer"}}, [[], [1, 2], "x"], [[1, "2"]]),
    ({"prefixItems": [{"type": "integer"}, {"type": "string"}]}, [[1, "a"], [1], [1, "a", 5]], [["a"], [1, 2]]),
    ({"prefixItems": [{"type": "integer"}], "items": {"type": "string"}}, [[1, "a"], [1]], [[1, 2], ["a"]]),
    ({"minItems": 2, "maxItems": 3}, [[1, 2], [1, 2, 3]], [[1], [1, 2, 3, 4]]),
    ({"uniqueItems": True}, [[1, 2], [1, True], [{"a": 1}, {"a": 2}]], [[1, 1.0], [{"a": 1}, {"a": 1}]]),
    ({"uniqueItems": False}, [[1, 1]], []),
    ({"minimum": 3}, [3, 3.5, "x"], [2.9, -3]),
    ({"maximum": 3}, [3, -9], [3.1]),
    ({"exclusiveMinimum": 3}, [3.1], [3]),
    ({"exclusiveMaximum": 3}, [2.9], [3]),
    ({"multipleOf": 3}, [0, 3, -6], [1, 2.5]),
    ({"minLength": 2, "maxLength": 3}, ["ab", "äöü", 7], ["a", "abcd"]),
    ({"pattern": "^a+$"}, ["aa", 7], ["", "ba"]),
    ({"pattern": "b"}, ["abc"], ["ac"]),  # searches
    ({"anyOf": [{"type": "integer"}, {"minLength": 2}]}, [1, "ab"], ["a"]),
    ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, [1, 2.5], [2, 1.5]),
    ({"allOf": [{"minimum": 2}, {"maximum": 3}]}, [2, 3], [1, 4]),
    ({"not": {"type": "integer"}}, ["x", 1.5], [1]),
    ({"title": "x", "description": "y", "default": 3, "format": "date"}, ["z"], []),
    (
        {"type": "object", "properties": {"a": {"items": {"properties": {"b": {"maximum": 1}}}}}},
        [{"a": [{"b": 1}, {}]}],
        [{"a": [{"b": 1}, {"b": 2}]}],
    ),
]
CASES = [
    (schema, value, fits)
    for schema, good, bad in ROWS
    for fits, values in ((True, good), (False, bad))
    for value in values
]


@pytest.mark.parametrize(("schema", "value", "fits"), CASES)
def test_keywords(schema, value, fits):
    assert (schema_error(value, read_schema(schema)) is None) == fits


@pytest.mark.skipif(importlib.util.find_spec("jsonschema") is None, reason="needs jsonschema")
def test_rows_are_those_of_the_reference_validator():
    from jsonschema import Draft202012Validator

    for schema, value, fits in CASES:
        assert Draft202012Validator(schema).is_valid(value) == fits, (schema, value)


def test_multiples_of_decimals_are_read_as_they_are_written():
    """0.3 is no multiple of 0.1 in binary."""
    assert schema_error(0.3, {"multipleOf": 0.1}) is None
    assert schema_error(0.35, {"multipleOf": 0.1}) is not None


def test_the_place_is_named():
    schema = {"properties": {"a": {"items": {"required": ["b"]}}}}
    assert schema_error({"a": [{"b": 1}, {}]}, schema) == "value/a/1: 'b' is missing"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "#/a"}, r"schema: '\$ref' is not supported"),
        ({"properties": {"a": {"if": {}}}}, "schema/properties/a: 'if' is not supported"),
        ({"anyOf": [{}, {"requierd": ["a"]}]}, "schema/anyOf/1: 'requierd' is not supported"),
        ({"items": [{}]}, "schema/items: .* cannot be used there"),
        ({"type": "int"}, "schema/type: int cannot"),
        ({"type": []}, "schema/type"),
        ({"required": "a"}, "schema/required"),
        ({"minimum": "3"}, "schema/minimum"),
        ({"minLength": -1}, "schema/minLength"),
        ({"multipleOf": 0}, "schema/multipleOf"),
        ({"pattern": "("}, "schema/pattern"),
        ({"anyOf": []}, "schema/anyOf"),
        ({"properties": {"a": None}}, "schema/properties/a is NoneType"),  # as tables fill dictionaries up
        ("{", "the schema is no JSON"),
        (3, "schema is int"),
    ],
)
def test_a_schema_that_cannot_be_read_is_an_error(schema, message):
    with pytest.raises(ValueError, match=message):
        json_schema("{}", schema)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ('{"age": 7}', 1.0),
        ('<think>{"age": "x"}</think> {"age": 7}', 1.0),
        ('<answer>\n```json\n{"age": 7}\n```\n</answer>', 1.0),
        ('{"age": 7} <think>', 0.0),
        ('<think>{"age": 7}', 0.0),
        ('<think>{"age": 7}</think> {"age": "7"}', 0.0),
        ('<answer>{"age": 7}</answer><answer>{"age": 7}</answer>', 0.0),
        ('{"age": -1}', 0.0),
        ('{"age": NaN}', 0.0),
        ('{"age": 7, "x": "\\u0000"}', 1.0),
        ('{"age": 7}\0', 0.0),
        ("{}", 0.0),
        ("[]", 0.0),
        ("none", 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_json_schema(completion, expected):
    schema = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}
    assert json_schema(completion, schema) == json_schema(completion, json.dumps(schema)) == expected


ADD = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
        "required": ["a", "b"],
    },
}
TOOLS = [{"type": "function", "function": ADD}, {"name": "now"}]


def call(name="add", **arguments):
    return json.dumps({"name": name, "arguments": arguments})


def block(text):
    return f"<tool_call>\n{text}\n</tool_call>"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (block(call(a=1, b=2)), 1.0),
        (block(call(a=1, b=2)) + block(call("now")), 1.0),
        ("<think>hm</think>I call " + block(call(a=1, b=2)), 1.0),
        (call(a=1, b=2), 1.0),
        ("```json\n" + call(a=1, b=2) + "\n```", 1.0),
        (f"[{call(a=1, b=2)}, {call('now')}]", 1.0),
        (block('{"name": "now"}'), 1.0),
        (block(json.dumps({"name": "add", "arguments": '{"a": 1, "b": 2}'})), 1.0),
        (block(call(a=1, b=2)) + block(call(a=1)), 0.0),  # one wrong call
        (block(call(a=1)), 0.0),
        (block(call(a=1, b="2")), 0.0),
        (block(call(a=1, b=2, c=3)), 0.0),  # an argument that nobody named
        (block(call("now", x=1)), 0.0),
        (block(call("sub", a=1, b=2)), 0.0),
        (block('{"name": "add", "arguments": {"a": 1, "b": NaN}}'), 0.0),
        (block('{"name": "add", "arguments": [1, 2]}'), 0.0),
        (block('{"name": "add", "arguments": "1, 2"}'), 0.0),
        (block('{"name": "now", "result": 3}'), 0.0),
        (block('{"name": ["now"]}'), 0.0),
        (block('"now"'), 0.0),
        (block("now()"), 0.0),
        ("<tool_call>" + call(a=1, b=2), 0.0),  # cut off
        (call(a=1, b=2) + "</tool_call>", 0.0),
        (f"<tool_call><tool_call>{call(a=1, b=2)}</tool_call></tool_call>", 0.0),
        ("<think>" + block(call(a=1, b=2)) + "</think> done", 0.0),  # reasoning does not call
        ("<think>" + block(call(a=1, b=2)), 0.0),
        ("[]", 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_tool_call(completion, expected):
    assert tool_call(completion, TOOLS) == tool_call(completion, json.dumps(TOOLS)) == expected


def test_tool_call_does_not_apply_without_tools():
    assert tool_call(block(call(a=1)), []) is None
    assert tool_call(block(call(a=1)), None) is None
    assert tool_calls("nothing") == []


def test_a_schema_that_is_open_stays_open():
    tools = [{"name": "f", "parameters": {"additionalProperties": True}}]
    assert tool_call(block(call("f", anything=1)), tools) == 1.0


def test_a_tool_without_a_name_is_an_error():
    with pytest.raises(ValueError, match="is no tool"):
        tool_call("", [{"parameters": {}}])
