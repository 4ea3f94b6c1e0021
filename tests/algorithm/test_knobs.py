"""Contradictions, each in one line; unknown names; wrong tensors; and no torch for the table."""

import subprocess
import sys

import pytest
import torch

from grpo.algorithm import KNOBS, LOSS_KNOBS, RECIPES, check_objective, group_advantages, policy_loss
from tests.algorithm.groups import scored

DELTA = "objective.delta is 1.2 (want more than 1 + epsilon_high = 1.28, or null)"
CONTRADICTIONS = [
    ("dapo", {"delta": 1.2}, DELTA),
    ("dapo", {"delta": 1.28}, "objective.delta is 1.28 (want more than"),
    ("grpo", {"epsilon_high": 2.5}, "objective.delta is 3 (want more than 1 + epsilon_high = 3.5"),
    ("cispo", {"epsilon_high": 0.28}, "objective.epsilon_high is 0.28 (want at least 1"),
    ("dapo", {"beta": 0.1, "kl": "k1"}, "objective.kl is k1 (want k3_ratio or k2"),
    ("reinforce_pp", {"beta": 0.1, "kl_in": "loss"}, "objective.kl is k1 (want k3_ratio or k2"),
    ("dapo", {"beta": 0.1, "kl_in": "reward"}, "objective.kl is k3_ratio (want k1 with kl_in: reward"),
    ("dapo", {"entropy_coef": 0.1, "entropy_gradient": False}, "objective.entropy_coef is 0.1 (want entropies with a"),
    ("rloo", {"importance_sampling_level": "token"}, "objective.importance_sampling_level is token (want sequence"),
    ("dapo", {"denominator": "sequence"}, "objective.importance_sampling_level is token (want sequence"),
    ("dapo", {"correction_max": 0.5}, "objective.correction_max is 0.5 (want at least 1"),
    ("dapo", {"sampler_correction": "mask", "correction_min": 1.5}, "objective.correction_min is 1.5 (want at most 1"),
    ("dapo", {"correction_min": 0.5}, "objective.correction_min is 0.5 (want null or 0 with truncate"),
    (
        "rloo",
        {"multi_objective_aggregation": "normalize_then_sum"},
        "objective.multi_objective_aggregation is normalize_",
    ),
    ("dapo", {"kl": "k4"}, "objective.kl is k4 (want one of k1, k2, k3, k3_ratio)"),
    ("dapo", {"beta": -0.1}, "objective.beta is -0.1 (want at least 0)"),
    ("dapo", {"epsilon": 0}, "objective.epsilon is 0 (want more than 0, at most 1)"),
    ("dapo", {"epsilon": "0.2"}, "objective.epsilon is 0.2 (want a finite number)"),
    ("dapo", {"epsilon": float("nan")}, "objective.epsilon is nan (want a finite number)"),
    ("dapo", {"beta": None}, "objective.beta is null (want a finite number)"),
    ("dapo", {"top_entropy_quantile": 1.5}, "objective.top_entropy_quantile is 1.5 (want more than 0, at most 1)"),
    ("dapo", {"num_iterations": 0}, "objective.num_iterations is 0 (want at least 1)"),
    ("dapo", {"mask_truncated_completions": 1}, "objective.mask_truncated_completions is 1 (want one of False, True)"),
    ("dapo", {"epsilonhigh": 0.3}, "objective.epsilonhigh is unknown (did you mean epsilon_high?)"),
    ("dpao", {}, "objective.recipe is 'dpao' (did you mean dapo?)"),
    (None, {}, "objective.recipe is None (did you mean"),
]


@pytest.mark.parametrize("recipe, knobs, line", CONTRADICTIONS)
def test_contradiction_is_one_line(recipe, knobs, line):
    lines = check_objective(recipe, **knobs)
    assert len(lines) == 1 and lines[0].startswith(line) and "\n" not in lines[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_agree_with_the_defaults(recipe):
    assert check_objective(recipe) == []
    assert check_objective(recipe, **{**KNOBS, **RECIPES[recipe].defaults}) == []
    assert check_objective(recipe, delta=None) == []


def test_problems_are_collected():
    lines = check_objective("dapo", delta=1.2, beta=0.1, kl="k1", correction_max=0.5)
    assert [line.split()[0] for line in lines] == ["objective.delta", "objective.kl", "objective.correction_max"]


def test_recipe_defaults_and_shipped_defaults():
    assert (KNOBS["epsilon"], KNOBS["epsilon_high"], KNOBS["delta"]) == (0.2, 0.28, 3.0)
    assert (KNOBS["beta"], KNOBS["kl"], KNOBS["scale_rewards"], KNOBS["zero_variance"]) == (
        0.0,
        "k3_ratio",
        "none",
        "skip",
    )
    assert RECIPES["gspo"].defaults == RECIPES["luspo"].defaults == {"epsilon": 3e-4, "epsilon_high": 4e-4}
    assert RECIPES["cispo"].defaults == {"epsilon_high": 5.0}
    assert all(row.paper and row.formula for row in RECIPES.values())


def call(recipe="dapo", num_tokens=4, advantages=None, **extra):
    logprobs = extra.pop("logprobs", torch.full((num_tokens,), -1.0, requires_grad=True))
    advantages = torch.ones(2) if advantages is None else advantages
    return policy_loss(recipe, logprobs, advantages, extra.pop("cu_seqlens", torch.tensor([0, 1, 4])), **extra)


WRONG = [
    ({"recipe": "grpo2"}, "did you mean grpo"),
    ({"epsilon_hi": 0.3}, "epsilon_hi is no knob of policy_loss (did you mean epsilon_high?)"),
    ({"scale_rewards": "none"}, "scale_rewards is no knob of policy_loss"),
    ({"delta": 1.2}, DELTA),
    ({"recipe": "dr_grpo"}, "max_completion_length is missing"),
    ({"beta": 0.1}, "reference_logprobs is missing"),
    ({"entropy_coef": 0.1}, "entropy is missing"),
    ({"entropy_coef": 0.1, "entropy": torch.ones(4)}, "entropy has no gradient"),
    ({"top_entropy_quantile": 0.2}, "entropy is missing"),
    ({"sampler_correction": "bypass"}, "sampler_logprobs is missing"),
    ({"denominator": "prompt_mean"}, "group_tokens or totals is missing"),
    ({"cu_seqlens": torch.tensor([0, 1, 5])}, "cu_seqlens go from 0 to 5 (want 0 to T = 4)"),
    ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "want [S+1] int32 or int64"),
    ({"advantages": torch.ones(3)}, "want [S] = [2] or [T] = [4]"),
    ({"old_logprobs": torch.ones(3)}, "old are [3] float32 on cpu (want [4]"),
    ({"sampler_logprobs": torch.ones(1, 4)}, "sampler are [1, 4]"),
    ({"loss_mask": torch.ones(5, dtype=torch.bool)}, "loss_mask are [5] bool"),
    ({"logprobs": torch.ones(4, dtype=torch.int64)}, "logprobs are [4] int64"),
    ({"logprobs": torch.ones(2, 2)}, "logprobs are [2, 2] float32"),
]


@pytest.mark.parametrize("extra, message", WRONG)
def test_wrong_input_is_said_clearly(extra, message):
    with pytest.raises(ValueError) as error:
        call(**extra)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_entropy_threshold_of_the_step_is_asked_for():
    from grpo.batch import Totals

    with pytest.raises(ValueError, match="entropy_threshold is missing"):
        call(entropy=torch.ones(4), top_entropy_quantile=0.5, totals=Totals(9, 3, 1))


def test_bad_values_of_group_advantages():
    rollouts = scored([[0.0, 1.0]])
    for wrong in (
        {"recipe": "gpro"},
        {"recipe": "dapo", "scale_rewards": "std"},
        {"recipe": "dapo", "multi_objective_aggregation": "sum"},
    ):
        with pytest.raises(ValueError, match=r"objective\.\w+ is"):
            group_advantages(rollouts, **wrong)


def test_every_loss_knob_is_taken():
    call(**{name: KNOBS[name] for name in LOSS_KNOBS})


def test_table_needs_no_torch():
    code = "import sys, grpo.algorithm, grpo.algorithm.recipes as r; r.check_objective('dapo'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
