"""What README shows a new user is true: its configuration, its reward, its commands and its metric names."""

import json
import re
from pathlib import Path

import pytest

import grpo.cli
from grpo.config import GRPOConfig
from grpo.scoring import load_rewards

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_configuration_and_its_rewards_load(tmp_path, monkeypatch):
    (text,) = blocks("yaml")
    (tmp_path / "config.yaml").write_text(text)
    config = GRPOConfig.from_file(tmp_path / "config.yaml")
    reward = next(block for block in blocks("python") if block.startswith("# my_rewards.py"))
    (tmp_path / "my_rewards.py").write_text(reward)
    (row,) = (json.loads(block) for block in blocks("json"))
    monkeypatch.chdir(tmp_path)
    rewards = load_rewards([entry.function for entry in config.rewards.functions], None, set(row))
    assert rewards[0].function(completion="It is 42", answer=row["answer"]) == 1.0


def test_the_python_example_names_real_things(monkeypatch):
    example = next(block for block in blocks("python") if "GRPOTrainer(" in block)
    seen = {}

    class Recorder:
        def __init__(self, **arguments):
            seen.update(arguments)

        def steps(self):
            return [{"step": 1, "reward": 0.5}]

        def generate(self, prompts, num_generations):
            return []

        def save_model(self, path):
            return path

    import inspect

    from grpo.trainer.loop import GRPOTrainer

    real = inspect.signature(GRPOTrainer.__init__).parameters
    monkeypatch.setattr("grpo.GRPOTrainer", Recorder, raising=False)
    exec(compile(example, "README", "exec"), {})
    assert set(seen) <= set(real)
    assert seen["args"].rollout.num_generations == 8 and seen["args"].adapter.r == 16


def test_commands_and_targets_exist():
    for command in re.findall(r"^\| `grpo ([\w-]+)", README, re.MULTILINE):
        assert command in grpo.cli.COMMANDS
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
    assert "make lint test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("path", re.findall(r"`(tests/[\w/.]+\.py)`", README))
def test_the_tests_it_points_to_exist(path):
    assert (ROOT / path).is_file()
