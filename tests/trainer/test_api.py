"""The Python API as a notebook uses it."""

import json

import datasets
import peft
import pytest
import torch

import grpo
from grpo import GRPOConfig, GRPOTrainer, InputError
from tests.tiny import tiny_model, tokenizer

ROWS = [{"prompt": [{"role": "user", "content": f"sort {n}"}], "answer": str(n)} for n in (31, 42, 27, 995, 8, 70)]


def letters(completions, answer, **columns):
    assert isinstance(completions[0], list) and completions[0][0]["role"] == "assistant"
    return [float(len(c[0]["content"]) % 3) for c in completions]


def even(completion):
    return float(len(completion) % 2)


def trainer_for(tmp_path, **arguments):
    text = tokenizer()
    config = {
        "output_dir": str(tmp_path / "run"), "max_steps": 3, "num_generations": 4, "max_completion_length": 5,
        "per_device_train_batch_size": 8, "learning_rate": 1e-2, "reward_weights": [1.0, 0.5],
    }  # fmt: skip
    values = {
        "model": tiny_model(vocab_size=len(text)),
        "reward_funcs": [letters, even],
        "args": GRPOConfig(**config, **arguments.pop("config", {})),
        "train_dataset": datasets.Dataset.from_list(ROWS),
        "processing_class": text,
    }
    return GRPOTrainer(**{**values, **arguments})


def test_the_names_of_the_package():
    assert sorted(grpo.__all__) == sorted(set(grpo.__all__))
    assert all(getattr(grpo, name) is not None for name in grpo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'PPOTrainer'"):
        grpo.PPOTrainer  # noqa: B018


def test_a_notebook_session(tmp_path):
    trainer = trainer_for(
        tmp_path,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        eval_dataset=ROWS[:2],
    )
    assert trainer.config.prompts_per_step == 2
    before = trainer.evaluate()
    assert {"eval_reward", "eval_accuracy", "eval_mean@1"} <= set(before)
    for metrics in trainer.steps():
        assert metrics["reward"] == pytest.approx(metrics["rewards/letters/mean"] + 0.5 * metrics["rewards/even/mean"])
        if metrics["step"] == 2:
            break
    assert trainer.step == 2
    completions = trainer.generate(["sort 31", ROWS[0]["prompt"]], num_generations=3)
    assert [len(group) for group in completions] == [3, 3]
    greedy = trainer.generate(["sort 31"], temperature=0)[0][0]
    again = trainer.generate(["sort 31"], temperature=0, seed=5)[0][0]
    assert greedy.token_ids == again.token_ids
    assert trainer.train()["step"] == 3  # goes on where the loop was left
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    folder = trainer.save_model(tmp_path / "saved")
    assert (folder / "adapter_model.safetensors").is_file() and (folder / "tokenizer.json").is_file()


def test_looking_does_not_change_the_run(tmp_path):
    """evaluate() and generate() between steps leave the trajectory bit for bit."""
    plain = trainer_for(tmp_path / "a")
    plain.train()
    looked = trainer_for(tmp_path / "b", eval_dataset=ROWS[:3])
    for _ in looked.steps():
        looked.evaluate()
        looked.generate(["sort 9"], num_generations=2)
    a, b = plain.policy.trainable(), looked.policy.trainable()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_model_by_path_with_its_own_tokenizer(tmp_path):
    text = tokenizer()
    tiny_model(vocab_size=len(text)).save_pretrained(tmp_path / "model")
    text.save_pretrained(tmp_path / "model")
    trainer = trainer_for(tmp_path, model=str(tmp_path / "model"), processing_class=None, config={"bf16": False})
    assert next(trainer.policy.module.parameters()).dtype == torch.float32
    trainer.train()
    assert f"name_or_path: {tmp_path}/model" in (tmp_path / "run" / "config.yaml").read_text()


def test_what_the_notebook_is_told(tmp_path):
    text = tokenizer()
    for arguments, problem in (
        ({"processing_class": None}, "processing_class is None"),
        ({"reward_funcs": []}, "rewards is empty"),
        ({"train_dataset": None}, "data.train is null"),
        ({"train_dataset": []}, "train_dataset: has no rows|data.train: has no rows"),
        ({"train_dataset": [{"question": "x"}]}, "no column 'prompt'"),
        ({"reward_funcs": [letters]}, "2 values for 1 functions|2 weights"),
        ({"reward_funcs": [lambda solution_str: 1.0, even]}, "verl"),
        ({"model": tiny_model(vocab_size=len(text)).requires_grad_(False)}, "no parameter to train"),
    ):
        with pytest.raises(InputError, match=problem):
            trainer_for(tmp_path, **arguments)
    with pytest.raises(InputError, match="data.eval is null"):
        trainer_for(tmp_path).evaluate()
    with pytest.raises(InputError, match="prompts: row 2: is null"):
        trainer_for(tmp_path).generate(["a", None])


def test_translated_names_are_said_once(tmp_path, capsys):
    trainer_for(tmp_path, config={"loss_type": "grpo"}).train()
    out = capsys.readouterr().out
    assert out.count("loss_type is understood as recipe: grpo") == 1


def test_the_policy_learns_what_is_paid(tmp_path):
    """Reward = share of one token: after some steps it is drawn more often (and with the sign turned, less)."""
    text = tokenizer()
    token = "7"

    def share(completion):
        return completion.count(token) / 5

    means = {}
    for sign in (1.0, -1.0):
        trainer = trainer_for(
            tmp_path / str(sign), reward_funcs=[share], model=tiny_model(vocab_size=len(text), initializer_range=0.05),
            args=GRPOConfig(
                output_dir=str(tmp_path / str(sign)), max_steps=25, num_generations=8, prompts_per_step=6, reward_weights=[sign],
                max_completion_length=5, learning_rate=5e-3, save_steps=0,
            ),
        )  # fmt: skip
        rows = list(trainer.steps())
        means[sign] = rows[-1]["rewards/share/mean"], rows[0]["rewards/share/mean"]
    assert means[1.0][0] > means[1.0][1] + 0.3
    assert means[-1.0][0] < 0.02
