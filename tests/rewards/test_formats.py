"""Formats row by row: strict, partial, and with what the template has put in front."""

import pytest

from rewards.formats import partial_tags, strict_tags, think_format

T, A = "<think>a</think>", "<answer>b</answer>"


@pytest.mark.parametrize(
    ("completion", "prefill", "tags", "expected"),
    [
        (T + A, "", ("think", "answer"), 1.0),
        (f"\n{T}\n\n{A}\n", "", ("think", "answer"), 1.0),
        ("a</think>" + A, "<think>\n", ("think", "answer"), 1.0),
        ("a</think>" + A, "", ("think", "answer"), 0.0),
        (T + A, "<think>", ("think", "answer"), 0.0),
        (A, "", ("answer",), 1.0),
        ("<a>1</a> <b>2</b>\n<c>3</c>", "", ("a", "b", "c"), 1.0),
        ("<a>1</a><c>3</c><b>2</b>", "", ("a", "b", "c"), 0.0),
        ("<a>1<b>2</b></a>", "", ("a", "b"), 0.0),
        ("<a>1</a>x<b>2</b>", "", ("a", "b"), 0.0),
        ("<a></a><b>2</b>", "", ("a", "b"), 1.0),
        ("<a>1</a><b> </b>", "", ("a", "b"), 0.0),
        ("<a>1</a><b>2</b><b>3</b>", "", ("a", "b"), 0.0),
        ("<a>1</a><b>2</b> EOS", "", ("a", "b"), 0.0),
        ("", "", ("a",), 0.0),
        ("anything", "", (), 0.0),
    ],
)
def test_strict_tags(completion, prefill, tags, expected):
    assert strict_tags(completion, prefill, tags=tags) == expected


@pytest.mark.parametrize(
    ("completion", "prefill", "expected"),
    [
        (T + A, "", 1.0),
        ("", "", 0.0),
        ("<think>a", "", 0.25),
        (T, "", 0.5),
        (T + "<answer>b", "", 0.75),
        ("a</think>" + A, "", 0.75),
        ("a</think>" + A, "<think>", 1.0),
        (A + T, "", 0.5),
        (T + T + A, "", 0.5),  # what stands twice earns nothing
        (T + A + A, "", 0.5),
        ("</think><think>", "", 0.25),
        ("<think></think><answer></answer>" * 2, "", 0.0),
        ("text" + T + "text" + A + "text", "", 1.0),  # not looked at
    ],
)
def test_partial_tags(completion, prefill, expected):
    assert partial_tags(completion, prefill) == expected


def test_partial_tags_of_other_names():
    assert partial_tags("<plan>a</plan>", tags=("plan", "code", "test")) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("completion", "prefill", "expected"),
    [
        (T + "b", "", 1.0),
        (" \n" + T + "\nb", "", 1.0),
        ("a</think>b", "<think>\n", 1.0),
        ("a</think>b", "", 0.0),
        (T, "", 0.0),
        (T + " \n", "", 0.0),
        ("<think>a", "", 0.0),
        ("b" + T + "b", "", 0.0),
        (T + T + "b", "", 0.0),
        (T + "b</think>c", "", 0.0),
        ("</think><think>b", "", 0.0),
        ("b", "", 0.0),
    ],
)
def test_think_format(completion, prefill, expected):
    assert think_format(completion, prefill) == expected
