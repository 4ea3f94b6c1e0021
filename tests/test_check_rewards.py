"""`grpo check-rewards`: findings as a user sees them, exit codes, no weights without --difficulty, and difficulty."""

import json
import re
from pathlib import Path

import pytest
import yaml

from grpo.check_rewards import group_statistics
from grpo.cli import main
from grpo.reward_prefill import prefill_in, prefill_of
from tests.tiny import tiny_model, tokenizer

REWARDS = r"""
import re
def a(completions, **columns):
    return [float(bool(re.match(r"^<think>.*?</think><answer>.*?</answer>$", text))) for text in completions]
def b(completion, answer):
    found = re.search(r"\\boxed\{(.*?)\}", completion[:5000])
    return float(found is not None and found.group(1) == answer)
def c(completion, answer, task):
    return (1.0 if answer in completion else 0.0) if task == "coding" else None if task == "code" else 0.5 * (
        completion.strip() in (answer, answer + "."))
def digit(completion):
    return float(completion.strip()[:1].isdigit())
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    rows = [
        {"prompt": f"add {n} 1", "answer": str(n + 1), "task": t}
        for n, t in zip(range(41, 49), ["math", "code"] * 4, strict=True)
    ]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("mine.py").write_text(REWARDS)
    config = {
        "output_dir": "run",
        "model": {"name_or_path": "", "dtype": "float32", "device": "cpu"},
        "data": {"train": "train.jsonl"},
        "rewards": [{"function": "rewards:math_accuracy"}],
        "rollout": {"num_generations": 4, "max_completion_length": 4},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["check-rewards", "config.yaml", *arguments])
    output = capsys.readouterr()
    return stop.value.code, " ".join(output.out.split()), output.err


def using(*names):
    config = yaml.safe_load(Path("config.yaml").read_text())
    config["rewards"] = [{"function": name} for name in names]
    Path("config.yaml").write_text(yaml.safe_dump(config))


def test_no_error_is_exit_code_0(home, capsys):
    code, out, err = run(capsys)
    assert code == 0 and "0 errors" in out and "math_accuracy" in out and not err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [("a", "line breaks inside the blocks"), ("b", "box in a box"), ("c", "task = 'code'")],
)
def test_the_three_mistakes_are_exit_code_1(home, capsys, name, text):
    using(f"mine.py:{name}")
    code, out, _ = run(capsys, "--samples", "6")
    assert code == 1 and text in re.sub(r"\s+", " ", out) and " 0 errors" not in out


def test_bad_input_is_exit_code_2(home, capsys):
    code, _, err = run(capsys, "--samples", "0")
    assert code == 2 and err == "samples is 0 (want at least 1)\n"
    using("mine.py:d")
    code, _, err = run(capsys)
    assert code == 2 and "has no 'd'" in err


def test_skip(home, capsys):
    using("mine.py:digit")
    code, out, _ = run(capsys)
    noted = "does not look at the answer"
    assert code == 0 and noted in out
    assert noted not in run(capsys, "--skip", "blind")[1]


def test_difficulty(home, capsys):
    text = tokenizer()
    tiny_model(vocab_size=len(text)).save_pretrained("model")
    text.save_pretrained("model")
    using("mine.py:digit")
    code, out, _ = run(capsys, "--difficulty", "6", "--model", "model", "--samples", "2")
    assert code == 0
    shown = {name: float(value) for name, value in re.findall(r"(pass@\d|accuracy|zero_variance_frac) ([\d.]+)", out)}
    assert set(shown) == {"pass@2", "pass@4", "accuracy", "zero_variance_frac"}
    assert shown["accuracy"] <= shown["pass@2"] <= shown["pass@4"]
    bars = list(map(int, re.search(r"between, 1 ([\d ]+)$", out).group(1).split()))
    assert sum(bars) == 6 and (bars[0] + bars[-1]) / 6 == pytest.approx(shown["zero_variance_frac"], abs=1e-4)
    assert not Path("run").exists()


def test_groups_by_hand():
    groups = [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0.1 + 0.2, 0.3, 0.3, 0.3], [None, None, 1, 1], [None] * 4]
    found = group_statistics(groups, 1.0)
    assert found["zero_variance_frac"] == pytest.approx(5 / 6)
    assert found["all_right_frac"] == pytest.approx(2 / 6) and found["all_wrong_frac"] == pytest.approx(2 / 6)
    assert found["histogram"] == [3, 0, 0, 1, 0, 1, 0, 0, 0, 1]


def test_prefill_of_a_template():
    class Template:
        chat_template = "x"

        def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
            return "user: hi\n" + ("assistant: <think>\n" if add_generation_prompt else "")

    messages = [{"role": "user", "content": "hi"}]
    assert prefill_of(Template(), messages) == "<think>\n"
    assert prefill_of(Template(), "hi") == "" and prefill_of(None, messages) == ""


@pytest.mark.parametrize(
    ("prompt", "of_template", "expected"),
    [
        ("1 + 1?", "", ""),
        ("1 + 1?", "<think>\n", ""),  # the template is not applied to text
        ("1 + 1? <think>\n", "", "<think>\n"),
        ("1 + 1? <think>", "", "<think>"),
        ("in <think> you think", "", ""),
        ("x" * 5000 + "<think> \n", "", "<think> \n"),
        ([{"role": "user", "content": "hi <think>"}], "<think>\n", "<think>\n"),
        ([{"role": "user", "content": "hi <think>"}], "", ""),
    ],
)
def test_prefill_of_one_prompt(prompt, of_template, expected):
    assert prefill_in(prompt, of_template) == expected


def changed(**fields):
    config = yaml.safe_load(Path("config.yaml").read_text())
    config["rewards"][0] |= fields
    Path("config.yaml").write_text(yaml.safe_dump(config))


def test_gold_maximum_and_presentations(home, capsys):
    """Each option changes the verdict on a reward: on what is right, how high that is, how it is written."""
    rows = [{"prompt": f"add {n} 1", "answer": "0", "sum": str(n + 1)} for n in range(41, 49)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("mine.py").write_text(
        "def half(completion, sum):\n"
        "    return 0.5 * (completion.strip().startswith('=> ') and completion.strip()[3:].strip() == sum)\n"
    )
    using("mine.py:half")
    skipped = ("--skip", "spelling", "gold")
    assert run(capsys, *skipped)[0] == 1  # `answer` is not right, and no usual presentation is
    form = ("--gold", "sum", "--presentations", "arrow==> {answer}")
    code, out, _ = run(capsys, *form, *skipped)
    assert code == 0 and " 0.5 " in out
    code, out, _ = run(capsys, *form, "--maximum", "1.0")
    assert code == 1 and "gets at most 0.5 of 1 in every presentation" in out
    changed(range=[0.0, 1.0])  # the configuration says it too
    assert "gets at most 0.5 of 1 in every presentation" in run(capsys, *form)[1]
    code, _, err = run(capsys, "--presentations", "no place")
    assert code == 2 and "'no place' has no place for the answer" in err
    code, _, err = run(capsys, "--gold", "nothing")
    assert code == 2 and "no column 'nothing'" in err
    assert run(capsys, "--timeout", "0")[2] == "timeout is 0.0 (want more than 0)\n"


def test_a_reward_that_never_returns(home, capsys):
    Path("mine.py").write_text(
        "def loops(completion, answer):\n    while not completion: pass\n    return completion == answer\n"
    )
    using("mine.py:loops")
    code, out, _ = run(capsys, "--samples", "2", "--timeout", "0.3")
    assert code == 1 and "gave no answer within 0.3 s (killed)" in out


def test_arguments_and_name(home, capsys):
    using("rewards:code_tests")
    code, _, err = run(capsys)
    assert code == 2 and "give it arguments: {…} (it takes tier, mode, limits," in err
    changed(arguments={"teir": "process"})
    code, _, err = run(capsys)
    assert code == 2 and "arguments: takes no 'teir' (did you mean 'tier'? it takes tier, mode, limits," in err
    using("rewards:soft_overlong")
    changed(name="overlong", arguments={"max_length": 64, "buffer": 16})
    code, out, err = run(capsys, "--samples", "2")
    assert "overlong" in out and "bottom" in out and not err
