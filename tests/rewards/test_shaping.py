"""Lengths, repetition and language share against slow, obvious counts."""

import math
import random

import pytest

from rewards.language import indistinguishable, language_share, scripts_of
from rewards.length import length_cosine, length_linear, shorter_correct, soft_overlong
from rewards.repetition import token_repetition, word_repetition


def ids(num):
    return [5] * num


def right(completion, answer):
    return None if answer is None else float(completion == answer)


@pytest.mark.parametrize(
    ("num", "expected"), [(0, 1.0), (1, 0.99), (50, 0.5), (99, 0.01), (100, 0.0), (101, 0.0), (999, 0.0)]
)
def test_linear(num, expected):
    assert length_linear("", ids(num), max_length=100) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("num", "expected"),
    [(0, 0.0), (79, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (101, -1.0), (500, -1.0)],
)
def test_soft_overlong(num, expected):
    assert soft_overlong("", ids(num), max_length=100, buffer=20) == pytest.approx(expected)


@pytest.mark.parametrize(
    "knobs", [{"max_length": 0, "buffer": 1}, {"max_length": 10, "buffer": 0}, {"max_length": 10, "buffer": 11}]
)
def test_soft_overlong_refuses_limits_that_make_no_sense(knobs):
    with pytest.raises(ValueError, match="want"):
        soft_overlong("", ids(3), **knobs)


@pytest.mark.parametrize("num", [0, 1, 25, 50, 99])
@pytest.mark.parametrize("completion", ["7", "8"])
def test_cosine(num, completion):
    start, end = (3.0, 1.0) if completion == "7" else (-4.0, -1.0)
    shaped = length_cosine(right, max_length=100, right=(3.0, 1.0), wrong=(-4.0, -1.0), exceed=-9.0)
    slow = (start + end) / 2 + (start - end) / 2 * math.cos(num / 100 * math.pi)
    assert shaped(completion=completion, answer="7", completion_ids=ids(num)) == pytest.approx(slow)


def test_cosine_at_the_limit_and_where_it_does_not_apply():
    shaped = length_cosine(right, max_length=100, exceed=-3.0)
    assert [shaped(completion="7", answer="7", completion_ids=ids(num)) for num in (100, 101)] == [-3.0, -3.0]
    assert shaped(completion="7", answer=None, completion_ids=ids(200)) is None


def test_cosine_of_a_batch_takes_each_completion_s_own_length():
    def batch(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    shaped = length_cosine(batch, max_length=100, right=(1.0, 0.0), wrong=(0.0, 0.0))
    values = shaped(completions=["7", "7", "8"], answer=["7"] * 3, completion_ids=[ids(0), ids(50), ids(50)])
    assert values == pytest.approx([1.0, 0.5, 0.0])


def test_shorter_among_correct():
    """Two groups, interleaved; one of them has one length only."""
    lengths = [10, 30, 20, 30, 15, 30]
    values = shorter_correct(right)(
        prompts=["a", "b", "a", "b", "a", "a"],
        completions=["7", "7", "7", "8", "8", "8"],
        answer=["7"] * 6,
        completion_ids=[ids(num) for num in lengths],
    )
    assert values == pytest.approx([0.5, 0.0, 0.0, 0.0, 0.0, -0.5])
    assert shorter_correct(right).__name__ == "right_shorter"


def test_shorter_among_correct_keeps_none():
    given = {"prompts": ["a"] * 2, "completions": ["7"] * 2, "completion_ids": [ids(1), ids(2)]}
    assert shorter_correct(right)(**given, answer=[None, "7"]) == [None, -0.5]


def slow_share(units, size):
    grams = [tuple(units[i : i + size]) for i in range(len(units)) if i + size <= len(units)]
    repeated = sum(gram in grams[:place] for place, gram in enumerate(grams))
    return repeated / len(grams) if grams else 0.0


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_repetition_against_a_slow_count(size):
    draw = random.Random(size)
    for _ in range(30):
        tokens = [draw.randint(0, 3) for _ in range(draw.randint(0, 40))]
        expected = -2 * slow_share(tokens, size)
        assert token_repetition("", tokens, size=size, penalty=2.0) == pytest.approx(expected)
        assert word_repetition(" ".join(f"W{t}" for t in tokens), size=size, penalty=2.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        ("", 3, 0.0),
        ("a b", 3, 0.0),
        ("a b c", 3, 0.0),
        ("a a a a", 1, -0.75),
        ("A a", 1, -0.5),
        ("a b c a b c", 3, -0.25),
        ("one two three four", 1, 0.0),
        ("x " * 1000, 20, -(1 - 1 / 981)),
    ],
)
def test_word_repetition(text, size, expected):
    assert word_repetition(text, size=size) == pytest.approx(expected)


def test_a_size_below_one_is_an_error():
    with pytest.raises(ValueError, match="size is 0"):
        token_repetition("", [1], size=0)


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("two plus two", "en", 1.0),
        ("zwei plus zwei", "en", 1.0),  # what it cannot tell
        ("два плюс два", "en", 0.0),
        ("два plus два", "ru", 2 / 3),
        ("二加二", "zh", 1.0),
        ("二加二 is four", "zh", 3 / 5),
        ("ひらがな", "zh", 0.0),
        ("ひらがなカタカナ漢字", "ja", 1.0),
        ("漢字", "ja", 1.0),  # nor this
        ("한국어 문장", "ko", 1.0),
        ("한국어 sentence", "ko", 0.5),
        ("ＦＵＬＬ width", "en", 1.0),
        ("नमस्ते दुनिया", "hi", 1.0),
        ("γειά σου", "el", 1.0),
        ("don't well-known", "latin", 1.0),
        ("дon't", "ru", 0.5),  # one run a script
        ("", "en", 0.0),
        ("2 + 2 = 4", "en", 0.0),
        (r"二加二 \frac{1}{2} $x = abc$ \(def\) \[ghi\] `jkl`", "zh", 1.0),
        ("二\n```python\nprint(abc)\n```\n二", "zh", 1.0),
        ("二 ```unclosed abc", "zh", 0.3333333333333333),
        ("<think>二</think>", "zh", 1.0),
        ("𝑥𝑦𝑧 二", "zh", 1.0),
        ("二\0", "zh", 0.0),
        ("mot été naïve", "pt-BR", 1.0),
        ("cafe\u0301 au lait", "fr", 1.0),
    ],
)
def test_language_share(text, language, expected):
    assert language_share(text, language) == pytest.approx(expected)


def test_what_language_share_cannot_tell_is_listed():
    assert {"de", "fr", "es"} <= set(indistinguishable("en"))
    assert indistinguishable("th") == [] and indistinguishable("ja") == ["zh"] and indistinguishable("zh") == []
    assert scripts_of("LATIN") == scripts_of("de")


def test_an_unknown_language_is_an_error():
    with pytest.raises(ValueError, match="language 'klingon' is not known"):
        language_share("x", "klingon")
