"""Extractors, row by row: the answer as it stands in the text, or None."""

import time

import pytest

from rewards.extract import after_think, all_boxed, boxed, hash_answer, last_number, plain_digits, xml_tag


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{72}", "72"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),  # mistake B: a lazy regex reads \frac{1
        (r"\boxed{\frac{\sqrt{3}}{2^{10}}} end", r"\frac{\sqrt{3}}{2^{10}}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),  # the last balanced one
        (r"\boxed{ \boxed{3}", "3"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{ \boxed{\boxed{3}} }", "3"),
        (r"\boxed{x = \boxed{3}}", r"x = \boxed{3}"),
        (r"\boxed{\boxed{3} or \boxed{4}}", r"\boxed{3} or \boxed{4}"),
        (r"\boxed{\boxed{2}\boxed{\boxed{3}}} \boxed{4}", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed {7}", "7"),
        ("\\boxed{\n7\n}", "7"),
        (r"\boxed{}", ""),
        (r"{ \boxed{5}", "5"),
        (r"} \boxed{5}", "5"),
        (r"\\boxed{5}", "5"),
        (r"\boxed 5", None),
        (r"boxed{5}", None),
        (r"\boxed{5", None),
        (r"\fbox{5}", None),
        ("", None),
    ],
)
def test_boxed(text, expected):
    assert boxed(text) == expected


def test_boxes_against_a_slow_scan():
    """Every string over a small alphabet of tokens, against a scan that tries each start and counts braces."""
    import itertools

    tokens = [r"\boxed{", "{", "}", "a"]
    for size in range(7):
        for parts in itertools.product(tokens, repeat=size):
            text = "".join(parts)
            assert all_boxed(text) == slow_boxes(text), text


def slow_boxes(text):
    found, start = [], 0
    while (start := text.find(r"\boxed{", start)) >= 0:
        depth, end = 1, start + 7
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth:
            start += 7
            continue
        content = text[start + 7 : end - 1]
        inner = slow_boxes(content)
        while len(inner) == 1 and content in (rf"\boxed{{{inner[0]}}}", *wrapped(content)):
            content = inner[0]
            inner = slow_boxes(content)
        found.append(content.strip())
        start = end
    return found


def wrapped(content):
    """`content` itself when it is nothing but one box."""
    return [content] if content.startswith(r"\boxed{") and closes_at_the_end(content) else []


def closes_at_the_end(content):
    depth = 0
    for place, letter in enumerate(content):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "}" and depth == 0:
            return place == len(content) - 1
    return False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),  # the template has written the opening tag
        ("<think>a</think>b</think>c", "c"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>a</think>b<think>c", None),
        ("<think>a", None),
        ("no tags", "no tags"),
        ("", ""),
        ("<think></think>", ""),
        ("<THINK>a</THINK>b", "<THINK>a</THINK>b"),
    ],
)
def test_after_think(text, expected):
    assert after_think(text) == expected


def test_after_another_tag():
    assert after_think("<reasoning>a</reasoning>b", "reasoning") == "b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>72</answer>", "72"),
        ("x <answer>\n72\n</answer> y", "72"),
        ("<answer></answer>", ""),
        ("<answer>1</answer> <answer>2</answer>", None),
        ("<answer>1</answer> <answer>2", None),
        ("<answer>1</answer>2</answer>", None),
        ("</answer>1<answer>", None),
        ("<answer>1", None),
        ("1</answer>", None),
        ("1", None),
        ("<answers>1</answers>", None),
    ],
)
def test_xml_tag(text, expected):
    assert xml_tag(text, "answer") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48 + 24\n#### 72", "72"),
        ("#### 72\n", "72"),
        ("####72", "72"),
        ("####   1,234   \nthat is it", "1,234"),
        ("the answer is #### 72", "72"),
        ("#### 72\n#### 72", None),
        ("#### 72 #### 73", None),
        ("####", None),
        ("####\n72", None),
        ("##### 72", None),
        ("### 72", None),
        ("", None),
    ],
)
def test_hash_answer(text, expected):
    assert hash_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 72.", "72"),
        ("48 and 24 make 72", "72"),
        ("72, as said", "72"),
        ("It costs $1,234.50!", "$1,234.50"),
        ("-5", "-5"),
        ("x = -5", "-5"),
        ("10-3", "3"),
        ("(-5)", "-5"),
        ("3/4", "3/4"),
        ("3 / 4 of it", "3 / 4"),
        ("50%", "50%"),
        ("50 % of it", "50 %"),
        (r"50\% of it", r"50\%"),
        (".5", ".5"),
        ("1.5e3", "1.5e3"),
        (r"so \frac{3}{4}.", r"\frac{3}{4}"),
        (r"so \frac12", r"\frac12"),
        ("**72**", "72"),
        ("$72$", "$72"),
        (r"\(72\)", "72"),
        ("answer:72", "72"),
        ("７２", "72"),
        ("−72", "-72"),
        ("٧٢", "72"),
        ("72 or 73", None),
        ("either 72 or maybe 73", None),
        ("72 or not. It is 73", "73"),
        ("for 5 apples it is 73", "73"),
        ("2^10", None),
        ("2^{10}", None),
        ("10^-3", None),
        (r"\sqrt{2}", None),
        ("x3", None),
        ("72cm", None),
        ("72 cm", "72"),
        ("3 apples x2", None),
        ("5²", None),
        ("v1.2.3", None),
        ("1/2/3", None),
        ("1,2", "1,2"),
        (r"7\pi", None),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, expected):
    assert last_number(text) == expected


def test_plain_digits_changes_digits_and_signs_only():
    assert plain_digits("５ ٥ − ％ ５² ½ é") == "5 5 - % 5² ½ é"


LONG = {
    "digits": "1" * 50_000,
    "commas": "1," * 25_000,
    "slashes": "1/" * 25_000,
    "dots": "1." * 25_000,
    "opened boxes": r"\boxed{" * 7_000,
    "nested boxes": r"\boxed{" * 6_000 + "}" * 6_000,
    "braces": "{" * 50_000,
    "spaces after hashes": "#### a" + " " * 50_000 + "b",
    "spaces after a box": r"\boxed" + " " * 50_000,
    "spaces": "7" + " " * 50_000,
    "alternatives": "72 or " * 8_000,
    "tags": "<think>" * 6_000,
    "minus": "-" * 50_000,
    "fractions": r"\frac{1}{" * 5_000,
    "letters": "a" * 50_000 + "1",
}


@pytest.mark.parametrize("name", LONG)
def test_time_is_linear_in_the_text(name):
    """50,000 hostile characters: tens of milliseconds; anything quadratic takes minutes."""
    start = time.process_time()
    for extract in (boxed, hash_answer, last_number, after_think, lambda text: xml_tag(text, "answer")):
        extract(LONG[name])
    assert time.process_time() - start < 1.0
