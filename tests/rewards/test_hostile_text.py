"""50,000 hostile characters: every extractor and scorer in under 50 ms of CPU time, and without a point."""

import time

import pytest

from rewards import extract, math_accuracy, math_equality, numeric, think_answer_format
from rewards.blocks import fenced_code, json_text
from rewards.countdown import countdown
from rewards.extract import after_think, boxed, hash_answer, last_number, xml_tag
from rewards.formats import partial_tags, strict_tags, think_format
from rewards.json_schema import json_schema
from rewards.language import language_share
from rewards.math_equality import find_expression, math_verify_accuracy, refusal
from rewards.repetition import token_repetition, word_repetition
from rewards.text import f1, multiple_choice, regex_match, squad_exact
from rewards.tools import tool_call

LIMIT = 0.05  # s
SIZE = 50_000
PIECES = {
    "digits": "1",
    "commas": "1,",
    "dots": "1.",
    "slashes": "1/",
    "minus": "-",
    "spaces": " ",
    "line breaks": "\n",
    "letters": "a",
    "words": "a b ",
    "sentences": "the answer is A or B. ",
    "options": "answer: B ",
    "open boxes": r"\boxed{",
    "fractions": r"\frac{1}{",
    "open braces": "{",
    "open brackets": "[",
    "objects": '{"a":',
    "flat objects": '{"a":1}',
    "sets": "{x}",
    "quotes": '"',
    "escaped quotes": '\\"',
    "open strings": '{"',
    "backslashes": "\\",
    "fences": "```\n",
    "fenced": "```json\n{}\n```\n",
    "long fence": "`",
    "tildes": "~~~\n",
    "dollars": "$",
    "formulas": "$a$",
    "open formulas": r"\(",
    "parentheses": "(",
    "closed parentheses": ")",
    "powers": "9^",
    "power groups": "9^{",
    "stars": "9**",
    "sums": "1+",
    "equations": "x=",
    "or": "72 or ",
    "think": "<think>",
    "end of think": "</think>",
    "answers": "<answer>72</answer>",
    "tool calls": "<tool_call>{}</tool_call>",
    "open tool calls": "<tool_call>",
    "hashes": "#",
    "hash answers": "#### 72\n",
    "percent": "%",
    "text spaces": r"1\text{ }",
    "factorials": "9!",
    "combining": "a\u0301",
    "Han": "漢",
    "scripts": "aд漢",
    "NUL": "\0",
    "surrogates": "\ud800",
}
TEXTS = {name: (piece * (SIZE // len(piece) + 1))[:SIZE] for name, piece in PIECES.items()}
TEXTS |= {
    "nested boxes": r"\boxed{" * 6_000 + "}" * 6_000,
    "nested lists": "[" * 25_000 + "]" * 25_000,
    "a box of digits": rf"\boxed{{{'1' * 49_000}}}",
    "a number at the end": "a" * 49_999 + "1",
    "spaces in a box": r"\boxed" + " " * 49_000 + "{1}",
}
TOOLS = [{"name": "f", "parameters": {"required": ["a"]}}]
IDS = {name: list(text.encode("utf-8", "surrogatepass"))[: SIZE // 4] for name, text in TEXTS.items()}

EXTRACTORS = {
    "boxed": boxed,
    "hash_answer": hash_answer,
    "last_number": last_number,
    "after_think": after_think,
    "answer_part": extract.answer_part,
    "xml_tag": lambda text: xml_tag(text, "answer"),
    "fenced_code": fenced_code,
    "json_text": json_text,
    "find_expression": lambda text: find_expression(text, "5"),
    "refusal": refusal,
    "partial_tags": partial_tags,
    "language_share": lambda text: language_share(text, "en"),
    "word_repetition": word_repetition,
}
SCORERS = {  # each with a right answer that none of the texts gives
    "numeric": lambda text: numeric(text, "5"),
    "math_accuracy": lambda text: math_accuracy(text, "5"),
    "math_verify_accuracy": lambda text: math_verify_accuracy(text, "x+5"),
    "f1": lambda text: f1(text, "unseen"),
    "squad_exact": lambda text: squad_exact(text, "unseen"),
    "multiple_choice": lambda text: multiple_choice(text, "D", ["Rome", "Paris", "Bern", "Oslo"]),
    "regex_match": lambda text: regex_match(text, "[x-z]+"),
    "json_schema": lambda text: json_schema(text, {"type": "object", "required": ["unseen"]}),
    "tool_call": lambda text: tool_call(text, TOOLS),
    "countdown": lambda text: countdown(text, 24, [3, 8]),
    "think_answer_format": think_answer_format,
    "think_format": think_format,
    "strict_tags": lambda text: strict_tags(text, tags=("a", "b", "c")),
}


@pytest.fixture(autouse=True)
def no_worker(monkeypatch):
    monkeypatch.setattr(math_equality, "_ask", lambda gold, prediction, timeout: False)


def seconds(call):
    """The quicker of two runs, as another process may have stopped the first."""
    spent = []
    for _ in range(2):
        start = time.process_time()
        call()
        spent.append(time.process_time() - start)
        if spent[-1] < LIMIT:
            break
    return min(spent)


@pytest.mark.parametrize("text", TEXTS)
def test_every_extractor_and_scorer_is_quick(text):
    slow = {}
    for name, function in (EXTRACTORS | SCORERS).items():
        if (spent := seconds(lambda function=function: function(TEXTS[text]))) >= LIMIT:
            slow[name] = spent
    if (spent := seconds(lambda: token_repetition(TEXTS[text], IDS[text]))) >= LIMIT:
        slow["token_repetition"] = spent
    assert not slow


@pytest.mark.parametrize("wrapped", ["{}", "<think>hm</think>{}", "<answer>{}</answer>", "</think>\\boxed{{{}}}"])
@pytest.mark.parametrize("text", TEXTS)
def test_hostile_text_earns_nothing(text, wrapped):
    completion = wrapped.format(TEXTS[text])
    earned = {name: value for name, scorer in SCORERS.items() if (value := scorer(completion)) != 0.0}
    if "think_format" in earned and wrapped.startswith("<think>"):  # it is of that format
        del earned["think_format"]
    assert not earned
