"""F1, normalised exact match, multiple choice and regular expressions, row by row."""

import pytest

from rewards.text import f1, multiple_choice, regex_match, squad_exact, squad_words

CITIES = ["Rome", "Paris", "New York", "Bern"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat, a dog and AN owl.", "cat dog and owl"),
        ("theatre another", "theatre another"),
        ("it's 3.5", "its 35"),
        ("  \n", ""),
        ("the", ""),
        ("Straße É", "straße é"),
    ],
)
def test_squad_words(text, expected):
    assert " ".join(squad_words(text)) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("Paris", "Paris", 1.0),
        ("the Paris!", "paris", 1.0),
        ("in Paris", "Paris", 2 / 3),
        ("Paris Paris", "Paris", 2 / 3),  # common words are counted, not marked
        ("Paris", "Paris Paris", 2 / 3),
        ("a b c d", "b c x y", 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),  # `a` is an article
        ("Rome", "Paris", 0.0),
        ("", "Paris", 0.0),
        (None, "Paris", 0.0),
        ("<think>Paris</think> Rome", "Paris", 0.0),
        ("<think>Paris", "Paris", 0.0),
        ("<think>hm</think><answer>Paris</answer> and more", "Paris", 1.0),
        ("<answer>Paris</answer><answer>Rome</answer>", "Paris", 0.0),
        ("Paris", ["London", "Paris"], 1.0),
        ("Paris\0", "Paris", 0.0),
        ("Paris", "", None),
        ("Paris", None, None),
        ("Paris", [], None),
        ("the", "the", None),
        ("7", 7, 1.0),
    ],
)
def test_f1(completion, answer, expected):
    assert f1(completion, answer) == (expected if expected is None else pytest.approx(expected, abs=1e-12))


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("The Eiffel tower.", "eiffel tower", 1.0),
        ("tower Eiffel", "eiffel tower", 0.0),
        ("Eiffel", "eiffel tower", 0.0),
        ("hm</think> PARIS", ["rome", "Paris"], 1.0),
        ("", "Paris", 0.0),
        (None, "Paris", 0.0),
        ("Paris", None, None),
    ],
)
def test_squad_exact(completion, answer, expected):
    assert squad_exact(completion, answer) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "choices", "expected"),
    [
        ("B", "B", None, 1.0),
        ("(B)", "B", None, 1.0),
        ("**B**", "B", None, 1.0),
        ("B.", "B", None, 1.0),
        ("b", "B", None, 1.0),
        ("B", "b", None, 1.0),
        ("B", 1, None, 1.0),
        ("B", "A", None, 0.0),
        ("BC", "B", None, 0.0),
        (r"\boxed{B}", "B", None, 1.0),
        (r"A? \boxed{(B)}", "B", None, 1.0),
        (r"</think> \boxed{A} \boxed{B}", "B", None, 0.0),
        (r"\boxed{A} no, \boxed{B}", "B", None, 1.0),
        (r"\boxed{A or B}", "B", None, 0.0),
        ("The answer is B.", "B", None, 1.0),
        ("The answer is (B).", "B", None, 1.0),
        ("Answer: B", "B", None, 1.0),
        ("answer: **B**", "B", None, 1.0),
        ("the correct option is B", "B", None, 1.0),
        ("The answer is A or B", "B", None, 0.0),
        ("The answer is B or A", "B", None, 0.0),
        ("the answer is B; rather, the answer is A or B", "B", None, 0.0),
        ("the answer is A; no, the answer is B", "B", None, 1.0),
        ("</think> the answer is A; the answer is B", "B", None, 0.0),
        ("</think> the answer is B; the answer is B", "B", None, 1.0),
        ("<think>the answer is B</think> the answer is A", "B", None, 0.0),
        ("<think>B", "B", None, 0.0),
        ("The answer is Bern", "B", None, 0.0),
        ("A B C D", "B", None, 0.0),
        ("<answer>B</answer>", "B", None, 1.0),
        ("<answer>A</answer><answer>B</answer>", "B", None, 0.0),
        ("Paris", "B", CITIES, 1.0),
        ("paris.", "B", CITIES, 1.0),
        ("B) Paris", "B", CITIES, 1.0),
        ("B. Paris", "Paris", CITIES, 1.0),
        ("B) Rome", "B", CITIES, 0.0),  # letter and text disagree
        ("new  york", "New York", CITIES, 1.0),
        ("E", "B", CITIES, 0.0),
        ("Rome Paris", "B", CITIES, 0.0),
        ("", "B", CITIES, 0.0),
        (None, "B", CITIES, 0.0),
        ("B\0", "B", None, 0.0),
        ("B", None, None, None),
        ("B", "", None, None),
        ("B", True, None, None),
        ("B", 4, CITIES, None),
        ("B", -1, CITIES, None),
        ("B", "London", CITIES, None),
    ],
)
def test_multiple_choice(completion, answer, choices, expected):
    assert multiple_choice(completion, answer, choices) == expected


@pytest.mark.parametrize(
    ("completion", "pattern", "expected"),
    [
        ("2024-05-01", r"\d{4}-\d\d-\d\d", 1.0),
        ("<think>x</think>\n2024-05-01\n", r"\d{4}-\d\d-\d\d", 1.0),
        ("on 2024-05-01", r"\d{4}-\d\d-\d\d", 0.0),
        ("2024-05-01 or so", r"\d{4}-\d\d-\d\d", 0.0),
        ("a\nb", "a.b", 1.0),
        ("", ".*", 0.0),
        (None, ".*", 0.0),
        ("<think>a", ".*", 0.0),
        ("a" * 10_001, "a*", 0.0),
        ("a" * 10_000, "a*", 1.0),
    ],
)
def test_regex_match(completion, pattern, expected):
    assert regex_match(completion, pattern) == expected


def test_a_broken_pattern_is_named():
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        regex_match("a", "(")
