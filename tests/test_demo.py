"""The embedded default. The three seeds and the control run for minutes and are marked slow."""

import random

import pytest

from grpo.demo import (
    DIGITS,
    NUM_EVAL,
    free_folder,
    make_demonstrations,
    make_model,
    make_problems,
    make_tokenizer,
    run_demo,
    sort_reward,
)
from grpo.errors import InputError


def test_problems_are_different_and_the_answers_right():
    problems = make_problems(NUM_EVAL + 500, seed=3)
    digits = [problem["prompt"][0]["content"].removeprefix("sort ") for problem in problems]
    assert len(set(digits)) == len(digits)
    assert all(len(d) == DIGITS and sorted(d) == list(p["answer"]) for d, p in zip(digits, problems, strict=True))
    assert make_problems(5, seed=3) == problems[:5] != make_problems(5, seed=4)


def test_about_two_thirds_of_the_demonstrations_are_wrong():
    problems = make_problems(4000, seed=0)
    rows = make_demonstrations(problems, seed=0)
    wrong = sum(row["completion"] != problem["answer"] for row, problem in zip(rows, problems, strict=True)) / len(rows)
    assert 0.55 < wrong < 0.65  # some "duplicates dropped" of numbers without duplicates happen to be right


def test_the_reward_is_exact_and_wants_the_end():
    assert sort_reward("012", "012", truncated=False) == 1.0
    assert sort_reward("012", "012", truncated=True) == 0.0
    assert sort_reward("0123", "012", truncated=False) == sort_reward("", "012", truncated=False) == 0.0


def test_the_tokenizer_survives_a_round_trip_through_disk(tmp_path):
    from transformers import AutoTokenizer

    text = make_tokenizer()
    text.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "sort 402917"}]
    for one in (text, again):
        ids = one.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert one.decode(ids) == "<|user|>sort 402917<|end|><|assistant|>"
        assert one.decode(ids, skip_special_tokens=True) == "sort 402917"
        assert one.eos_token == "<|end|>"


def test_the_model_has_no_download_and_depends_on_the_seed():
    text = make_tokenizer()
    first, again, other = make_model(text, 0), make_model(text, 0), make_model(text, 1)
    assert first.lm_head.weight.equal(again.lm_head.weight)
    assert not first.lm_head.weight.equal(other.lm_head.weight)
    assert first.lm_head.weight is first.model.embed_tokens.weight


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(InputError, match="holds a run"):
        run_demo(0, tmp_path)


def test_running_it_again_takes_the_next_free_name(tmp_path):
    for name in ("demo", "demo-2"):
        assert free_folder(tmp_path / "demo") == tmp_path / name
        (tmp_path / name / "warm_start").mkdir(parents=True)
    assert free_folder(tmp_path / "demo") == tmp_path / "demo-3"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_accuracy_rises(tmp_path, seed):
    summary = run_demo(seed, tmp_path / "demo")
    assert summary["num_problems"] >= 500
    assert summary["accuracy_before"] <= 0.6
    assert summary["accuracy_after"] >= 0.9


@pytest.mark.slow
def test_random_rewards_teach_nothing(tmp_path):
    """The control: the same run, with rewards that know nothing of the answer."""
    source = random.Random(0)

    def coin(completion, answer):
        return float(source.random() < 0.5)

    summary = run_demo(0, tmp_path / "demo", coin)
    assert 0.2 < summary["accuracy_before"] <= 0.6
    assert summary["accuracy_after"] <= summary["accuracy_before"] + 0.05
