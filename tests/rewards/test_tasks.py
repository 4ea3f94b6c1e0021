"""Generated tasks: the same rows everywhere, solved by their oracle, and by nothing that does not read the prompt."""

import collections
import doctest
import hashlib
import importlib
import itertools
import json
import re
import subprocess
import sys
from fractions import Fraction

import pytest

import rewards.tasks as tasks
from rewards.check import check
from rewards.tasks.answers import final_answer

CASES = [(name, difficulty) for name in tasks.NAMES for difficulty in (1, 2, 4, 7, 10)]


def scored(name, row, completion):
    columns = {key: row[key] for key in ("answer", "target", "numbers") if key in row}
    if name == "countdown":
        columns.pop("answer")
    return tasks.scorer(name)(completion, **columns)


def digest(rows):
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@pytest.mark.parametrize("name", [*tasks.NAMES, "answers"])
def test_worked_examples(name):
    failures, tried = doctest.testmod(importlib.import_module(f"rewards.tasks.{name}"))
    assert failures == 0 and tried > 0


@pytest.mark.parametrize(("name", "difficulty"), CASES)
def test_the_stored_answer_and_the_oracle_are_right(name, difficulty):
    rows = tasks.make(name, 40, seed=1, difficulty=difficulty)
    marks = "#### {}" if name == "words" else "<answer>{}</answer>"
    assert [scored(name, row, marks.format(row["answer"])) for row in rows] == [1.0] * 40
    few = 1 if name == "countdown" and difficulty > 2 else 40  # its oracle tries everything
    assert [scored(name, row, tasks.oracle(name)(row["prompt"])) for row in rows[:few]] == [1.0] * few


@pytest.mark.parametrize(("name", "difficulty"), CASES)
def test_nothing_scores_without_reading_the_prompt(name, difficulty):
    """A constant, the prompt itself, its first, last or largest number, its numbers as they stand: < 20 %."""
    rows = tasks.make(name, 200, seed=2, difficulty=difficulty)
    marks = "#### {}" if name == "words" else "<answer>{}</answer>"
    constant = collections.Counter(row["answer"] for row in rows).most_common(1)[0][0]
    guesses = {
        "constant": lambda row: constant,
        "prompt": lambda row: row["prompt"],
        "first": lambda row: numbers(row)[0],
        "last": lambda row: numbers(row)[-1],
        "largest": lambda row: max(numbers(row), key=int),
        "all": lambda row: " ".join(numbers(row)),
        "sum": lambda row: "+".join(numbers(row)),
        "word": lambda row: re.findall(r'"(\w+)"|$', row["prompt"])[0],
    }
    for guess, make in guesses.items():
        share = sum(scored(name, row, marks.format(make(row))) for row in rows) / len(rows)
        assert share < 0.2, (guess, share)
        wrong = sum(scored(name, row, make(row)) for row in rows) / len(rows)
        assert wrong < 0.2, (guess, wrong)


def numbers(row):
    return re.findall(r"\d+", row["prompt"].replace("+ - * /", "")) or ["0"]


@pytest.mark.parametrize("name", tasks.NAMES)
def test_another_rows_answer_scores_only_where_it_is_equal(name):
    rows = tasks.make(name, 60, seed=4, difficulty=3)
    marks = "#### {}" if name == "words" else "<answer>{}</answer>"
    for row, other in itertools.pairwise(rows):
        assert scored(name, row, marks.format(other["answer"])) == float(row["answer"] == other["answer"])


@pytest.mark.parametrize("name", tasks.NAMES)
def test_the_check_finds_no_mistake(name):
    rows = tasks.make(name, 8, seed=5, difficulty=2)
    forms = {"words": {"hashes": "so\n#### {answer}"}}.get(name, {"tag": "<think>so</think><answer>{answer}</answer>"})
    skip = ["written as 72.", "written as 1,234.00"] if name in ("bases", "sorting") else []
    report = check(tasks.scorer(name), rows, presentations=forms, skip=skip)
    assert report.ok and not next(iter(report.summary.values()))["bottom"], str(report)


def test_rows_depend_on_name_seed_difficulty_and_place_alone():
    for name in tasks.NAMES:
        rows = tasks.make(name, 20, seed=7, difficulty=3)
        assert rows[:5] == tasks.make(name, 5, seed=7, difficulty=3)
        assert rows != tasks.make(name, 20, seed=8, difficulty=3)
        assert rows != tasks.make(name, 20, seed=7, difficulty=4)
        assert len({row["prompt"] for row in rows}) == 20


def test_rows_are_equal_in_another_process():
    code = (
        "import hashlib, json, rewards.tasks as t; "
        "print(hashlib.sha256(json.dumps([t.make(n, 30, seed=3, difficulty=4) for n in t.NAMES]).encode()).hexdigest())"
    )
    there = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": s}
        )
        for s in ("1", "2")
    ]
    here = digest([tasks.make(name, 30, seed=3, difficulty=4) for name in tasks.NAMES])
    assert [each.stdout.strip() for each in there] == [here, here]


@pytest.mark.parametrize("name", tasks.NAMES)
def test_difficulty_makes_prompts_longer(name):
    lengths = [sum(len(row["prompt"]) for row in tasks.make(name, 50, difficulty=d)) / 50 for d in (1, 4, 10)]
    assert lengths[0] < lengths[1] < lengths[2]


def test_answers_by_another_way():
    """Not by the task's own code: Python's arithmetic on prompts that we made."""
    for row in tasks.make("arithmetic", 50, difficulty=6):
        assert int(row["answer"]) == eval(row["prompt"].removeprefix("What is ").removesuffix("?"))
    for row in tasks.make("bases", 50, difficulty=6):
        given, source, target = re.search(r"number (\w+) \(base (\d+)\) in base (\d+)", row["prompt"]).groups()
        assert int(given, int(source)) == int(row["answer"], int(target))
    for row in tasks.make("countdown", 50, difficulty=3):
        fractions = re.sub(r"\d+", r"Fraction(\g<0>)", row["answer"])
        assert eval(fractions, {"Fraction": Fraction}) == row["target"]
        assert sorted(map(int, re.findall(r"\d+", row["answer"]))) == sorted(row["numbers"])


def test_names_and_numbers_are_checked():
    for call, text in [
        (lambda: tasks.make("sort", 1), "no task 'sort' .there are arithmetic, countdown"),
        (lambda: tasks.make("sorting", 0), "count 0"),
        (lambda: tasks.make("sorting", 1, difficulty=11), "difficulty 11"),
        (lambda: tasks.from_uri("tasks:sorting?size=3"), "is no generated task"),
        (lambda: tasks.from_uri("sorting"), "is no generated task"),
        (lambda: tasks.from_uri("tasks:sorting?count=many"), "whole numbers"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()
    assert tasks.from_uri("tasks:sorting?count=3&seed=2&difficulty=4") == tasks.make("sorting", 3, seed=2, difficulty=4)
    assert len(tasks.from_uri("tasks:sorting")) == 1000


def test_countdown_wants_every_number():
    assert tasks.scorer("countdown")("<answer>5 + 5</answer>", 10, [5, 5, 3]) == 0.0


def test_one_final_answer():
    assert final_answer("<think>a") is None and final_answer("") is None and final_answer("a\0") is None
    assert final_answer("<answer> a </answer> b") == "a" and final_answer("#### a\n#### b") is None


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    from rewards.adapters import from_reasoning_gym

    rows = tasks.from_reasoning_gym("basic_arithmetic", 5, seed=3)
    assert rows == tasks.from_reasoning_gym("basic_arithmetic", 5, seed=3)
    reward = from_reasoning_gym("basic_arithmetic")
    values = [reward(completion=f"<answer>{row['answer']}</answer>", **row) for row in rows]
    assert values == [1.0] * 5
    assert all(reward(completion="no idea", **row) < 0.5 for row in rows)
