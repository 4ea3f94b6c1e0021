"""Each recipe and each choice against the float64 loop: loss, ∂loss/∂ℓ, ∂loss/∂H."""

from dataclasses import replace

import pytest
import torch

from grpo.algorithm import RECIPES
from grpo.algorithm.recipes import KNOBS
from tests import reference
from tests.algorithm.cases import flat, make_case, run, worst
from tests.tolerances import LOSS

SEEDS = range(30)
PLAIN = {"sampler_correction": "none"}
SETTINGS = {
    "plain": (PLAIN, {}),
    "dual clip": ({**PLAIN, "delta": 1.6, "epsilon_high": 0.28}, {"delta": 1.6, "epsilon_high": 0.28}),
    "wide clip": ({**PLAIN, "epsilon": 0.1, "epsilon_high": 2.0, "delta": None}, {"epsilon": 0.1, "epsilon_high": 2.0}),
    "on policy": (PLAIN, {}),
    "k2": ({**PLAIN, "beta": 0.3, "kl": "k2", "kl_in": "loss"}, {"beta": 0.3, "kl": "k2"}),
    "k3": ({**PLAIN, "beta": 0.3, "kl": "k3", "kl_in": "loss"}, {"beta": 0.3, "kl": "k3"}),
    "k3_ratio": ({**PLAIN, "beta": 0.3, "kl": "k3_ratio", "kl_in": "loss"}, {"beta": 0.3, "kl": "k3_ratio"}),
    "token truncate": ({"sampler_correction": "truncate"}, {"correction": "truncate"}),
    "token mask": (
        {"sampler_correction": "mask", "correction_min": 0.7, "correction_max": 1.4},
        {"correction": "mask", "low": 0.7, "high": 1.4},
    ),
    "mean truncate": (
        {"sampler_correction": "truncate", "correction_level": "sequence_mean", "correction_max": 1.05},
        {"correction": "truncate", "correction_level": "sequence_mean", "high": 1.05},
    ),
    "mean mask": (
        {"sampler_correction": "mask", "correction_level": "sequence_mean"},
        {"correction": "mask", "correction_level": "sequence_mean", "low": 0.99, "high": 1.01},
    ),
    "sum truncate": (
        {"sampler_correction": "truncate", "correction_level": "sequence_sum"},
        {"correction": "truncate", "correction_level": "sequence_sum", "high": 3.0},
    ),
    "sum mask": (
        {"sampler_correction": "mask", "correction_level": "sequence_sum"},
        {"correction": "mask", "correction_level": "sequence_sum", "high": 3.0},
    ),
    "bypass": ({"sampler_correction": "bypass"}, {"correction": "bypass"}),
    "off policy mask": ({**PLAIN, "off_policy_mask_threshold": 0.05}, {"off_policy": 0.05}),
    "everything": (
        {"beta": 0.1, "kl": "k3_ratio", "kl_in": "loss", "off_policy_mask_threshold": 0.1},
        {"beta": 0.1, "kl": "k3_ratio", "correction": "truncate", "off_policy": 0.1},
    ),
}


def compare(recipe, case, knobs, choices, dtype):
    name = str(dtype).removeprefix("torch.")
    expected = reference.objective(case.rows(), choices)
    loss, gradient, by_entropy, metrics = run(
        recipe, case.to(dtype), reference_logprobs=case.reference.to(dtype), **knobs
    )
    assert loss.dtype == gradient.dtype == dtype
    assert abs(float(loss) - expected.loss) <= LOSS[name] * max(1, abs(expected.loss))
    assert worst(gradient, flat(expected.gradient)) <= LOSS[name]
    assert worst(by_entropy, flat(expected.entropy_gradient)) <= LOSS[name]
    return expected, metrics


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_equals_loop(recipe, setting):
    knobs, changes = SETTINGS[setting]
    if recipe == "cispo" and "epsilon_high" in knobs:
        knobs, changes = {**knobs, "epsilon_high": 2.5}, {**changes, "epsilon_high": 2.5}
    shipped_delta = {"delta": KNOBS["delta"]}
    choices = replace(reference.RECIPES[recipe], **{**shipped_delta, "max_completion_length": 17, **changes})
    if "delta" in knobs:
        choices = replace(choices, delta=knobs["delta"])
    for seed in SEEDS:
        case = make_case(seed, drift=0.05 if choices.level != "token" and seed % 2 else 0.3, per_token=seed % 4 == 3)
        if setting == "on policy":
            case = replace(case, old=None)
        expected, metrics = compare(recipe, case, knobs, choices, torch.float64)
        assert abs(float(metrics["policy_loss"]) - expected.before_bonus) <= 1e-12 * max(1, abs(expected.before_bonus))
        assert abs(float(metrics["kl"]) - expected.kl) <= 1e-12 * max(1, expected.kl)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_equals_loop_in_float32(recipe):
    choices = replace(reference.RECIPES[recipe], delta=3.0, max_completion_length=17, beta=0.1, kl="k3_ratio")
    choices = replace(choices, correction="truncate")
    knobs = {"beta": 0.1, "kl": "k3_ratio", "kl_in": "loss"}
    for seed in SEEDS:
        # numbers that float32 holds exactly, so that only the arithmetic differs
        case = make_case(seed, drift=0.05 if choices.level != "token" else 0.3).to(torch.float32).to(torch.float64)
        compare(recipe, case, knobs, choices, torch.float32)


@pytest.mark.parametrize("denominator", ["token_mean", "sequence_mean", "sequence_sum", "constant", "prompt_mean"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("surrogate", ["dapo", "cispo", "sapo"])
def test_choices_are_independent(surrogate, level, denominator):
    choices = replace(
        reference.RECIPES[surrogate],
        level=level,
        denominator=denominator,
        delta=3.0,
        max_completion_length=17,
        beta=0.2,
    )
    for seed in range(4):
        case = make_case(seed, [3, 1, 6, 4], drift=0.1)
        counts = [int(part.sum()) for part in case.mask.split(case.lengths)]
        group_tokens = [counts[0] + counts[1] + 1000] * 2 + [counts[2] + counts[3]] * 2  # some of it in another bin
        rows = case.rows()
        for row, tokens in zip(rows, group_tokens, strict=True):
            row.group_tokens = tokens
        expected = reference.objective(rows, choices)
        totals = replace(case.totals, groups=2)
        loss, gradient, _, _ = run(
            surrogate, case, importance_sampling_level=level, denominator=denominator, sampler_correction="none", beta=0.2,
            reference_logprobs=case.reference, totals=totals, group_tokens=torch.tensor(group_tokens),
        )  # fmt: skip
        assert abs(float(loss) - expected.loss) <= 1e-12 * max(1, abs(expected.loss))
        assert worst(gradient, flat(expected.gradient)) <= 1e-12


@pytest.mark.parametrize("quantile", [0.2, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("recipe", ["dapo", "grpo", "gspo", "rloo"])
def test_top_entropy_and_bonus_equal_loop(recipe, quantile):
    """Policy term and bonus act on the kept tokens; KL and divisors stay; the bonus is their mean entropy."""
    for seed in range(6):
        case = make_case(seed, drift=0.05)
        inside = case.entropy[case.mask].tolist()
        threshold = reference.quantile(inside, 1 - quantile)
        kept = sum(value >= threshold for value in inside)
        choices = replace(
            reference.RECIPES[recipe], delta=3.0, max_completion_length=17, beta=0.2,
            entropy_threshold=threshold, entropy_coef=0.05, entropy_count=max(1, kept),
        )  # fmt: skip
        knobs = {"beta": 0.2, "top_entropy_quantile": quantile, "entropy_coef": 0.05, "sampler_correction": "none"}
        compare(recipe, case, knobs, choices, torch.float64)


def test_advantages_may_be_one_per_completion():
    case = make_case(3, [4, 9, 1, 6, 12], masked=False)
    first = torch.tensor([0, *case.cu_seqlens.tolist()[1:-1]]).long()
    per_completion = replace(case, advantages=case.advantages[first])
    for recipe in ("dapo", "gspo", "sapo"):
        assert torch.equal(run(recipe, case)[1], run(recipe, per_completion)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("recipe", RECIPES)
def test_first_ratio_is_exactly_one(recipe, dtype):
    """Without old log-probs r ≡ 1 bit for bit: nothing is clipped, and clip's value is −A whatever ℓ is."""
    case = replace(make_case(5, [4, 9, 1, 6, 12], masked=False), old=None).to(dtype)
    _, _, _, metrics = run(
        recipe, case, sampler_correction="none", epsilon=1e-30, epsilon_high=1e-30 if recipe != "cispo" else 1.0
    )
    for name in ("clip_ratio/region_mean", "cispo_clip_ratio"):
        assert float(metrics.get(name, torch.zeros(()))) == 0
    moved = run("dapo", case, sampler_correction="none")[0]
    assert torch.equal(moved, run("dapo", replace(case, logprobs=case.logprobs - 7.7), sampler_correction="none")[0])


def test_half_precision_is_raised():
    case = make_case(2, [4, 9], masked=False)
    loss, gradient, _, _ = run("dapo", case.to(torch.bfloat16))
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
