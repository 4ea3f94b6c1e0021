"""`rewards.check`: every mistake it must find, by function, row and column, and silence on rewards that have none."""

import itertools
import random
import re
import time

import pytest

from rewards import exact_match, math_accuracy, numeric, think_answer_format
from rewards.check import check
from rewards.probes import around, fill, golds, spellings, wrong_answer
from rewards.score import Score

MATH = [{"prompt": f"What is {n} + {n + 1}?", "answer": str(2 * n + 1)} for n in (3, 11, 40, 523, 77)]
FRACTIONS = [{"prompt": f"1 / {n}?", "answer": rf"\frac{{1}}{{{n}}}"} for n in (3, 4)]
MIXED = [
    {"prompt": f"{task} {n}", "answer": str(n), "task": task} for n, task in enumerate(["math", "code"] * 3, start=20)
]


# The three mistakes of a widely copied guide (REWARDS.md section 5).


def format_without_dotall(completions, **columns):  # A
    return [1.0 if re.match(r"^<think>.*?</think><answer>.*?</answer>$", text) else 0.0 for text in completions]


def format_with_dotall(completions, **columns):  # A, mended half-way
    return [float(bool(re.match(r"^<think>.*?</think><answer>.*?</answer>$", t, re.DOTALL))) for t in completions]


def box_until_the_first_brace(completion, answer):  # B
    found = re.search(r"\\boxed\{(.*?)\}", completion[:5000])
    return float(found is not None and found.group(1) == answer)


def label_that_no_row_has(completions, answer, task, **columns):  # C
    return [
        float(gold in text) if kind == "coding" else math_accuracy(text, gold) if kind == "math" else None
        for text, gold, kind in zip(completions, answer, task, strict=True)
    ]


def errors(function, rows, **setting):
    return check(function, rows, **setting).errors


def only(function, rows, kind, **setting):
    """The errors of one kind, of which there must be some, and none of another kind."""
    found = errors(function, rows, **setting)
    assert {each.kind for each in found} == {kind}, [str(each) for each in found]
    return found


def test_mistake_a():
    texts = [each.text for each in only(format_without_dotall, MATH, "gold")]
    assert any("line breaks inside the blocks" in text for text in texts)
    assert any("line breaks between the blocks" in text for text in texts)
    texts = [each.text for each in only(format_with_dotall, MATH, "gold")]
    assert any("line breaks between the blocks" in text for text in texts)
    assert not any("inside" in text for text in texts)


def test_mistake_b_where_answers_have_braces():
    (found,) = [e for e in only(box_until_the_first_brace, FRACTIONS + MATH, "gold") if "at most 0" in e.text]
    assert found.rows == (1, 2) and found.column == "answer"


def test_mistake_b_where_no_answer_has_braces():
    found = errors(box_until_the_first_brace, MATH, skip=["written as 72.", "written as 1,234.00"])
    assert [each.kind for each in found] == ["gold"] and "box in a box" in found[0].text
    assert found[0].rows == (1, 2, 3, 4, 5)


def test_mistake_c():
    (found,) = only(label_that_no_row_has, MIXED, "none", skip=["prompt copied back"])
    assert found.column == "task" and "task = 'code'" in found.text and found.rows == (2, 4, 6)


def math_part(completion, answer, task):
    return math_accuracy(completion, answer) if task == "math" else None


def code_part(completion, answer, task):
    return math_accuracy(completion, answer) if task == "code" else None


def coding_part(completion, answer, task):
    return math_accuracy(completion, answer) if task == "coding" else None


def test_a_label_that_another_function_takes_over_is_no_mistake():
    report = check([math_part, code_part, think_answer_format], MIXED, skip=["wrong"])
    assert report.ok, str(report)
    assert [each.text for each in report.findings if each.kind == "none"] == [
        "returns None for every row with task = 'code', which another function takes over",
        "returns None for every row with task = 'math', which another function takes over",
    ]
    found = errors([math_part, coding_part, think_answer_format], MIXED, skip=["wrong"])
    assert {each.function: each.text for each in found} == {
        "math_part": "returns None for every row with task = 'code': is that label spelled as the function has it?",
        "coding_part": "returns None for every row: it applies to none of them",
    }


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (math_accuracy, MATH),
        (math_accuracy, [{"prompt": "x", "answer": a} for a in ("-3", "0.75", "3/4", "1,234", "40%", r"\frac{2}{7}")]),
        (numeric, MATH),
        (think_answer_format, MATH),
        (exact_match, [{"prompt": f"spell {n}", "answer": word} for n, word in enumerate(["ab", "abc", "b"])]),
        (lambda completion: -len(completion) / 1e5, MATH),
        (lambda completion: -min(len(completion) / 30, 1.0), MATH),  # line breaks cost it something
        (lambda completion_ids, completions: [min(1.0, len(ids) / 100) for ids in completion_ids], MATH),
        (lambda completion, answer: Score(0.1 + 0.9 * math_accuracy(completion, answer), note="x"), MATH),
    ],
)
def test_rewards_without_mistakes(function, rows):
    report = check(function, rows)
    assert report.ok, str(report)


def test_async_and_chat():
    async def accuracy(completions, answer, **columns):
        return [math_accuracy(one[0]["content"], gold) for one, gold in zip(completions, answer, strict=True)]

    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in MATH]
    report = check(accuracy, rows)
    assert report.ok, str(report)
    assert report.summary["accuracy"]["gold"] == 1.0 and report.summary["accuracy"]["bottom"] == 0.0


# --- one mistake a function ----------------------------------------------------------------------------------


def test_constant():
    (found,) = only(lambda completion: 1.0, MATH, "constant")
    assert "scores 1" in found.text


def test_never_applies():
    (found,) = only(lambda completion: None, MATH, "none")
    assert found.rows == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        (lambda text, gold: 1.0 if not text.strip() else math_accuracy(text, gold), "empty scores 1"),
        (lambda text, gold: float(gold in text), "all answers listed scores 1"),
        (lambda text, gold: float(any(c.isdigit() for c in text)), "right and wrong answers score the same"),
        (lambda text, gold: float(text.strip().rstrip(".")[-1:] == gold[-1]), "another row's answer scores 1"),
        (lambda text, gold: 1.0 if len(text) > 10_000 else math_accuracy(text, gold), "50,000 characters scores 1"),
    ],
)
def test_undeserved_points(rule, what):
    rows = [{"prompt": "n", "answer": str(n)} for n in (13, 43, 27, 55, 81)]

    def reward(completion, answer):
        return rule(completion, answer)

    found = errors(reward, rows)
    assert any(what in each.text for each in found), [str(each) for each in found]
    assert all(each.rows for each in found)


def test_the_answer_in_the_prompt():
    rows = [{"prompt": f"Say the number {n}", "answer": str(n)} for n in (4, 9, 16, 25)]
    (found,) = only(math_accuracy, rows, "wrong")
    assert found.text.startswith("prompt copied back scores 1 of 1") and found.rows == (1, 2, 3, 4)


def test_strict_numbers():
    """Pitfall 5: where all answers are numbers, `72.` must count; among words it is only noted."""

    def strict(completion, answer):
        return float(completion.strip() == answer)

    texts = " ".join(each.text for each in only(strict, MATH, "gold"))
    assert "with written as 72." in texts and "with written as 1,234.00" in texts
    report = check(strict, [*MATH, {"prompt": "w", "answer": "word"}])
    assert report.ok and any("written as 72." in each.text for each in report.findings)


def test_prefill():
    """Pitfall 4: an error when the template opens the reasoning itself, else a note; a prefill-aware reward is fine."""

    def strict(completion):
        return think_answer_format(completion)

    assert check(strict, MATH).ok
    assert any("pre-filled think" in each.text for each in check(strict, MATH).findings)
    (found,) = only(strict, MATH, "gold", prefill="<think>\n")
    assert "pre-filled think" in found.text
    assert check(think_answer_format, MATH, prefill="<think>\n").ok
    (found,) = only(think_answer_format, MATH, "gold", prefill="<think>\n", without=["prefill"])


def test_scores_that_change():
    generator = random.Random(0)
    calls = itertools.count()
    for function in (
        lambda completion: generator.random(),
        lambda completion: float(next(calls) // 400),
        lambda completions: [float(place) for place in range(len(completions))],
    ):
        found = [each for each in errors(function, MATH) if each.kind == "changing"]
        assert len(found) == 1 and found[0].rows


def test_order_of_calls():
    before = []

    def remembers(completion):
        before.append(completion)
        return float(len(before) > 1 and before[-2] == "")

    assert any(each.kind == "changing" for each in errors(remembers, MATH))


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda completions: [1.0] * (len(completions) + 1), "values for"),
        (lambda completions: [1.0] * max(len(completions), 2), "returned 2 values for 1 completions"),
        (lambda completions: 1.0, "returned float (want a list of"),
        (lambda completions: {"a": 1}, "returned dict (want a list of"),
        (lambda completion: "1.0", "returned str '1.0' (want a number or None)"),
        (lambda completion: float("nan") if not completion else 1.0, "returned nan (want a finite number), on 'empty'"),
        (lambda completion: 1e30, "over 1e+06 in size"),
        (lambda completion: 1.0 / len(completion), "raised ZeroDivisionError: float division by zero, on 'empty'"),
        (
            lambda completions: [1.0 / len(text) for text in completions],
            "raised ZeroDivisionError: float division by zero, on 'empty'",
        ),
        (lambda completion: exit(0) if not completion else 1.0, "raised SystemExit: 0, on 'empty'"),
    ],
)
def test_faults(function, text):
    found = [each for each in errors(function, MATH[:1]) if each.kind == "fault"]
    assert len(found) == 1 and text in found[0].text and found[0].rows == (1,)


def test_one_completion_alone():
    """Length 1 is tried too: a function that squeezes a single result fails in training with one completion left."""

    def squeezes(completions):
        return [0.5 + (len(text) > 5) for text in completions] if len(completions) > 1 else 0.5

    assert any("returned float" in each.text for each in errors(squeezes, MATH))


def test_slow():
    def slow(completion, answer):
        time.sleep(0.02)
        return math_accuracy(completion, answer)

    (found,) = only(slow, MATH[:1], "slow", p99_s=0.01, presentations={"mine": "{answer}"})
    assert 0.02 <= float(re.search(r"p99 is ([\d.]+) s", found.text).group(1)) < 0.2
    assert check(slow, MATH[:1], p99_s=0.5, presentations={"mine": "{answer}"}).ok


def test_changed_inputs():
    def sorts(completions, answer, **columns):
        answer.sort()
        return [math_accuracy(text, gold) for text, gold in zip(completions, answer, strict=True)]

    def pops(prompt, completion, answer):
        prompt.pop()
        return math_accuracy(completion, answer)

    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in MATH]
    (found,) = only(pops, rows, "mutation")
    assert "'prompt'" in found.text
    assert check(sorts, MATH).ok  # a row's completions all have the same answer: nothing has changed


def test_a_weight_that_drowns_the_others():
    report = check([math_accuracy, think_answer_format], MATH, weights=[1.0, 50.0])
    (found,) = report.errors
    assert found.kind == "weight" and found.function == "think_answer_format" and "range is 50, theirs 1" in found.text
    assert check([math_accuracy, think_answer_format], MATH, weights=[1.0, 0.2]).ok


# --- settings and the report -----------------------------------------------------------------------------------


def test_gold_from_a_function_or_another_column():
    def upper(completion, word):
        return float(completion.strip().endswith(": " + word.upper()))

    rows = [{"prompt": "shout", "word": word} for word in ("ab", "cd", "xyz")]
    report = check(upper, rows, gold=lambda row: "I shout: " + row["word"].upper())
    assert report.ok and report.summary["upper"]["gold"] == 1.0
    lower = [dict(row, gold=": " + (row["word"] if row["word"] == "cd" else row["word"].upper())) for row in rows]
    (found,) = errors(upper, lower, gold=lambda row: row["gold"])
    assert found.kind == "gold" and found.rows == (2,)
    with pytest.raises(ValueError, match="no column 'gold_answer'"):
        check(upper, rows, gold="gold_answer")


def test_maximum():
    assert check(math_accuracy, MATH, maximum=1.0).ok
    found = errors(lambda completion, answer: 0.5 * math_accuracy(completion, answer), MATH, maximum=1.0)
    assert {each.kind for each in found} == {"gold"} and "at most 0.5 of 1" in found[0].text


def test_parameters_that_nothing_provides():
    with pytest.raises(ValueError, match="parameter 'solution' is provided by nothing"):
        check(lambda completion, solution: 1.0, MATH)
    with pytest.raises(ValueError, match="one of the parameters"):
        check(lambda text: 1.0, MATH)
    with pytest.raises(ValueError, match="no rows"):
        check(math_accuracy, [])


def test_the_report_reads_as_a_table():
    report = check([box_until_the_first_brace, math_accuracy], MATH + FRACTIONS)
    text = str(report)
    assert "box_until_the_first_brace: tries" in text and "math_accuracy: tries" in text
    assert text.endswith(f"{len(report.errors)} errors") and not report.ok
    assert "(row 6, 7, column 'answer')" in text


def test_tries():
    assert [each.text for each in golds(0, "7", {"a": "{answer}", "b": r"\boxed{{answer}}"})] == ["7", r"\boxed{7}"]
    tries = {each.name: each for each in around(0, {0: "72", 1: "9"}, "box", r"so \boxed{{answer}}", "")}
    assert tries["box in a box"].text == r"so \boxed{\boxed{72}}"
    assert (
        tries["written as 72."].text == r"so \boxed{72.}" and tries["written as 1,234.00"].text == r"so \boxed{72.00}"
    )
    assert tries["wrong answer"].text == r"so \boxed{73}" and tries["another row's answer"].text == r"so \boxed{9}"
    assert tries["all answers listed"].text == r"so \boxed{72, 9}"
    assert tries["with NUL"].text == "so \\boxed{72\0}" and tries["cut half-way"].text == r"so \bo"
    assert spellings("-0.5") == ["-1/2", r"-\frac{1}{2}"] and spellings("1e-2") == ["1/100", r"\frac{1}{100}", "0.01"]
    assert wrong_answer("-1") == "-2" and fill("a{answer}b{answer}", "x") == "axbx"
