"""Fenced code and JSON, row by row: the block as it stands in the text, or None."""

import json

import pytest

from rewards.blocks import MAX_DEPTH, code_blocks, fenced_code, json_text, parse_json

ONE = "```python\nx = 1\n```\n"
TWO = "```python\ny = 2\n```\n"


@pytest.mark.parametrize(
    ("text", "languages", "expected"),
    [
        (ONE, (), "x = 1\n"),
        (ONE + TWO, (), "y = 2\n"),  # the last
        (ONE + "```text\n2\n```", ("python",), "x = 1\n"),
        (ONE + "```text\n2\n```", ("python", "text"), "2\n"),
        ("```Python\nx\n```", ("python",), "x\n"),
        ("```python title=a\nx\n```", ("python",), "x\n"),
        ("``` python\nx\n```", ("python",), "x\n"),
        ("```\nx\n```", ("",), "x\n"),
        ("```\nx\n```", ("python",), None),
        ("~~~python\nx\n~~~", ("python",), "x\n"),
        ("````\n```\nx\n```\n````", (), "```\nx\n```\n"),  # a longer fence holds shorter ones
        ("```\nx\n````", (), "x\n"),
        ("```\nx\n~~~\n```", (), "x\n~~~\n"),
        ("   ```\nx\n   ```", (), "x\n"),
        ("    ```\nx\n    ```", (), None),  # four spaces: no fence
        ("```\n```", (), ""),
        ("```\r\nx\r\n```\r\n", (), "x\r\n"),
        ("```python\nx = 1", (), None),  # cut off
        (ONE + "```python\ny", (), "x = 1\n"),
        ("use ```x``` so", (), None),
        ("```x```\ny\n```", (), None),  # code within a line
        ("``\nx\n``", (), None),
        ("```\nx\n```python\n", (), None),  # a closing fence has no language
        ("```\na\u2028```\n```", (), "a\u2028```\n"),  # only \n ends a line
        ("", (), None),
    ],
)
def test_fenced_code(text, languages, expected):
    assert fenced_code(text, *languages) == expected


def test_all_blocks_in_order():
    assert [tuple(block) for block in code_blocks(f"{ONE}so\n{TWO}~~~\nz\n~~~")] == [
        ("python", "x = 1\n"),
        ("python", "y = 2\n"),
        ("", "z\n"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', '{"a": 1}'),
        (" [1, 2] \n", "[1, 2]"),
        ("7", "7"),
        ('```json\n{"a": 1}\n```', '{"a": 1}'),
        ('```\n{"a": 1}\n```', '{"a": 1}'),
        ('```json\n{"a": 1}\n```\n```json\n{"a": 2}\n```', '{"a": 2}'),
        ('```json\n{"a": 1}\n```\nor {"a": 2}', '{"a": 1}'),  # fenced before bare
        ('```python\n{"a": 1}\n```', '{"a": 1}'),  # no JSON fence: bare
        ('```json\n{"a": 1,}\n```', None),
        ('```json\n{"a": 1}\n```\n```json\n{"a"\n```', None),  # the last one is broken
        ('It is {"a": 1}, so', '{"a": 1}'),
        ('{"a": 1} and {"b": 2}', '{"b": 2}'),
        ('{"a": 1} of the set {x}', '{"a": 1}'),
        ('the set {x, y} gives {"a": 1}', '{"a": 1}'),
        ('an open { and {"a": 1}', '{"a": 1}'),
        ('{"a": "}"} so', '{"a": "}"}'),
        ('{"a": "\\"}"} so', '{"a": "\\"}"}'),
        ('he said "yes {"a": 1}', '{"a": 1}'),
        ('{"a": {"b": 1},} so', None),  # nothing is taken out of a broken one
        ('{"a": [1, {"b": 2}]} so', '{"a": [1, {"b": 2}]}'),
        ("[1, 2] so", "[1, 2]"),
        ("{'a': 1}", None),
        ('{"a": NaN} so', None),
        ('{"a": 1e999} so', None),
        ('{"a": 1, "a": 2} so', None),
        ('{"a": 1', None),
        ("no JSON", None),
        ("", None),
    ],
)
def test_json_text(text, expected):
    assert json_text(text) == expected


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, -3e2, null, true, "x\\n"]}', "[]", '"["', '"\\\\"', "{}", "0"])
def test_json_is_read_as_the_standard_library_reads_it(text):
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NaN", "NaN"),
        ("-Infinity", "Infinity"),
        ("[1e400]", "out of range"),
        ("9" * 401, "digits"),
        ('{"a": 1, "a": 1}', "twice"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "levels"),
        ("[" * 100_000, "levels"),
        ("{} {}", "Extra data"),
        ("", "Expecting value"),
    ],
)
def test_what_is_no_json(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_depth_counts_brackets_outside_strings_only():
    assert parse_json(json.dumps("[" * 200)) == "[" * 200
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deep) == json.loads(deep)
