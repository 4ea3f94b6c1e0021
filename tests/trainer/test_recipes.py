"""Every recipe and every knob of the objective through the whole trainer: finite, moving, and the same for any bins."""

import math

import pytest
import torch

from grpo.algorithm import RECIPES
from tests.tiny import tiny_model, tokenizer
from tests.trainer.test_update import length_reward, make_trainer


def digits(completion):
    return float(sum(letter.isdigit() for letter in completion))


CASES = {recipe: {"recipe": recipe} for recipe in RECIPES}
CASES |= {
    "entropy bonus": {"entropy_coef": 0.05},
    "top-entropy tokens": {"top_entropy_quantile": 0.4},
    "both": {"top_entropy_quantile": 0.4, "entropy_coef": 0.05},
    "kl k2": {"beta": 0.1, "kl": "k2"},
    "kl k3": {"beta": 0.1, "kl": "k3"},
    "kl k3_ratio": {"beta": 0.1},
    "kl in the reward": {"beta": 0.1, "kl": "k1", "kl_in": "reward"},
    "rloo with kl": {"recipe": "rloo", "beta": 0.1},
    "reinforce_pp with kl": {"recipe": "reinforce_pp", "beta": 0.1},
    "no dual clip": {"delta": None},
    "batch scaling": {"scale_rewards": "batch"},
    "group scaling": {"scale_rewards": "group"},
    "normalise then sum": {"multi_objective_aggregation": "normalize_then_sum"},
    "truncated completions masked": {"mask_truncated_completions": True},
    "token correction": {"sampler_correction": "truncate"},
    "sequence mask": {"sampler_correction": "mask", "correction_level": "sequence_mean"},
    "bypass": {"sampler_correction": "bypass"},
    "off-policy mask": {"off_policy_mask_threshold": 0.5},
    "sequence ratio": {"importance_sampling_level": "sequence"},
    "sequence sums": {"denominator": "sequence_sum"},
    "overlong": {"soft_overlong_cache": 4},
    "temperature": {"temperature": 0.7},
    "drop": {"zero_variance": "drop"},
}


def run(folder, capacity, knobs):
    torch.manual_seed(0)
    model = tiny_model(vocab_size=len(tokenizer()), initializer_range=0.1)
    trainer = make_trainer(
        folder, model=model, rewards=[length_reward, digits], max_steps=2, num_iterations=2, max_tokens_per_batch=capacity,
        max_grad_norm=1e9, learning_rate=5e-2, reward_weights=[1.0, 0.3], **knobs,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.policy.trainable().items()}
    rows = list(trainer.steps())
    assert any(not torch.equal(before[name], p) for name, p in trainer.policy.trainable().items())
    return rows


@pytest.mark.parametrize("case", CASES)
def test_runs_and_does_not_depend_on_the_bins(tmp_path, case):
    few, many = run(tmp_path / "few", 10_000, CASES[case]), run(tmp_path / "many", 37, CASES[case])
    for a, b in zip(few, many, strict=True):
        assert math.isfinite(a["loss"]) and a["grad_norm"] > 0
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3, abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        for name in ("entropy", "kl", "clip_ratio/region_mean", "sampling/importance_sampling_ratio/mean"):
            if a.get(name) is not None:
                assert b[name] == pytest.approx(a[name], rel=1e-2, abs=2e-3), name
