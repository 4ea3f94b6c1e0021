"""Advantages against loops, zero variance, several rewards with None, truncated completions by enumeration."""

import itertools
import math
import random

import pytest
import torch

from grpo.algorithm import group_advantages, whitened_returns, zero_variance_groups
from grpo.algorithm.shaping import token_returns
from tests import reference
from tests.algorithm.cases import flat
from tests.algorithm.groups import scored

OWN = {"grpo": "group", "bnpo": "group", "dr_grpo": "none", "dapo": "group", "rloo": "leave_one_out"}


def close(values, expected, tolerance=1e-12):
    assert len(values) == len(expected)
    for group, wanted in zip(values, expected, strict=True):
        assert [v is None for v in group] == [w is None for w in wanted]
        for v, w in zip(group, wanted, strict=True):
            assert v is None or abs(v - w) <= tolerance * max(1, abs(w))


def random_rewards(seed, none_share=0.2):
    pick = random.Random(seed)
    rewards = [[pick.uniform(-1, 2) if pick.random() > none_share else None for _ in range(5)] for _ in range(6)]
    rewards[1] = [None] * 4 + [0.7]  # fewer than two valid
    return rewards


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("recipe", OWN)
def test_recipe_advantage_equals_loop(recipe, seed):
    rewards = random_rewards(seed)
    close(group_advantages(scored(rewards), recipe=recipe), reference.advantages(OWN[recipe], rewards))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_scale_rewards_overrides_its_own_family_only(scale, seed):
    rewards = random_rewards(seed)
    for recipe in ("dapo", "dr_grpo", "sapo"):
        close(
            group_advantages(scored(rewards), recipe=recipe, scale_rewards=scale), reference.advantages(scale, rewards)
        )
    kept = group_advantages(scored(rewards), recipe="rloo", scale_rewards=scale)
    close(kept, reference.advantages("leave_one_out", rewards))


def test_leave_one_out_is_a_scaled_baseline():
    rewards = [[0.0, 1.0, 0.5, 0.25]]
    loo = group_advantages(scored(rewards), recipe="rloo")[0]
    none = group_advantages(scored(rewards), recipe="dr_grpo")[0]
    for a, b in zip(loo, none, strict=True):
        assert abs(a - 4 / 3 * b) < 1e-12


# --- zero variance -------------------------------------------------------------------------------------------


def equal_rewards():
    for value in (0.1, 0.3, 1 / 3, 0.1 + 0.2):
        yield [value] * 8
        yield torch.full((8,), value, dtype=torch.float32).tolist()  # what a float32 reward becomes
    yield [0.1 + 0.2, 0.3] * 4  # differ in the 17th digit


@pytest.mark.parametrize("recipe", [*OWN, "gspo", "reinforce_pp", "reinforce_pp_baseline"])
def test_equal_rewards_give_exactly_zero(recipe):
    for group in equal_rewards():
        rollouts = scored([group])
        assert group_advantages(rollouts, recipe=recipe) == [[0.0] * 8]
        assert zero_variance_groups(rollouts) == ["all_right"]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_equal_rewards_beside_others(scale, aggregation):
    rewards = [[0.1] * 4, [0.0, 1.0, 1.0, 0.0], [1 / 3] * 4]
    advantages = group_advantages(
        scored(rewards), recipe="dapo", scale_rewards=scale, multi_objective_aggregation=aggregation
    )
    assert advantages[0] == advantages[2] == [0.0] * 4
    assert all(advantages[1])


def test_nearly_equal_rewards_are_not_zero_variance():
    assert zero_variance_groups(scored([[0.5, 0.5 + 1e-9]])) == [None]
    assert all(group_advantages(scored([[0.5, 0.5 + 1e-9]]), recipe="dapo")[0])


def test_causes_in_order():
    rewards = [
        [1.0, 1.0],  # right
        [0.0, 0.0],  # wrong
        [0.5, 0.5],  # neither
        [0.0, 1.0],  # teaches
        [None, 1.0],  # one valid is too few
        [0.0, 0.0],  # cut off, both
        [0.2, 0.4],  # cut off, but differing: teaches
    ]
    truncated = [(5, 0), (5, 1), (6, 0), (6, 1)]
    causes = zero_variance_groups(scored(rewards, truncated=truncated))
    assert causes == ["all_right", "all_wrong", "other", None, "all_invalid", "all_truncated", None]
    masked = zero_variance_groups(scored(rewards, truncated=truncated), mask_truncated_completions=True)
    assert masked == ["all_right", "all_wrong", "other", None, "all_invalid", "all_truncated", "all_truncated"]


def test_range_is_the_steps_own_unless_given():
    assert zero_variance_groups(scored([[0.0, 0.0], [0.0, 0.0]])) == ["all_wrong"] * 2
    assert zero_variance_groups(scored([[1.0, 1.0]])) == ["all_right"]
    assert zero_variance_groups(scored([[0.2, 0.2]]), reward_range=(0.0, 1.0)) == ["other"]
    assert zero_variance_groups(scored([[-1.0, -1.0]]), reward_range=(-1.0, 1.0)) == ["all_wrong"]


def test_functions_that_cancel_out_still_teach_when_normalised_first():
    total = [0.0, 0.0, 0.0]
    parts = {"a": [[1.0, 2.0, 4.0]], "b": [[-1.0, -2.0, -4.0]]}
    same = scored([total], parts=parts)
    uneven = scored([total], parts={"a": [[1.0, 2.0, 4.0]], "b": [[-10.0, -20.0, -39.0]]}, weights={"a": 1.0, "b": 0.1})
    assert zero_variance_groups(same, multi_objective_aggregation="normalize_then_sum") == ["all_wrong"]
    assert zero_variance_groups(uneven, multi_objective_aggregation="normalize_then_sum") == [None]
    assert zero_variance_groups(uneven) == ["all_wrong"]


# --- several rewards -----------------------------------------------------------------------------------------

N = None
TABLES = {
    "two functions": ([[[1.0, 0.0, 2.0]], [[0.1, 0.5, 0.9]]], [1.0, 0.5]),
    "one constant": ([[[1.0, 0.0, 2.0]], [[0.3, 0.3, 0.3]]], [1.0, 2.0]),
    "None on some rows": ([[[1.0, 0.0, 2.0, 1.0]], [[0.1, N, 0.9, N]]], [1.0, 1.0]),
    "None on a group": ([[[1.0, 0.0], [0.0, 3.0]], [[N, N], [0.2, 0.7]]], [1.0, 3.0]),
    "one value left": ([[[1.0, 0.0, 0.5]], [[0.4, N, N]]], [1.0, 1.0]),
    "negative weight": ([[[1.0, 0.0, 0.5], [2.0, 0.0, 1.0]], [[5.0, 9.0, 4.0], [1.0, 1.0, 2.0]]], [1.0, -0.1]),
}


@pytest.mark.parametrize("table", TABLES)
def test_normalize_then_sum_equals_loop(table):
    parts, weights = TABLES[table]
    totals = [
        [
            sum(w * part[p][g] for part, w in zip(parts, weights, strict=True) if part[p][g] is not None)
            for g in range(len(parts[0][p]))
        ]
        for p in range(len(parts[0]))
    ]
    rollouts = scored(
        totals, parts={str(k): part for k, part in enumerate(parts)}, weights={str(k): w for k, w in enumerate(weights)}
    )
    close(
        group_advantages(rollouts, recipe="dapo", multi_objective_aggregation="normalize_then_sum"),
        reference.normalize_then_sum(parts, weights),
    )


def test_completion_without_any_reward_leaves_loss_and_baseline():
    with_hole = scored([[1.0, None, 0.0, 0.5]], parts={"a": [[1.0, None, 0.0, 0.5]]})
    without = scored([[1.0, 0.0, 0.5]], parts={"a": [[1.0, 0.0, 0.5]]})
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        for recipe in ("dapo", "dr_grpo"):
            holed = group_advantages(with_hole, recipe=recipe, multi_objective_aggregation=aggregation)[0]
            assert holed[1] is None
            close(
                [[holed[0], *holed[2:]]],
                group_advantages(without, recipe=recipe, multi_objective_aggregation=aggregation),
            )


def test_fault_of_one_function_invalidates_the_whole_completion():
    """`rewards` None means outside, whatever the other functions said."""
    rollouts = scored([[None, 1.0, 0.0]], parts={"a": [[5.0, 1.0, 0.0]]})
    advantages = group_advantages(rollouts, recipe="dapo", multi_objective_aggregation="normalize_then_sum")
    close(advantages, [[None, *reference.normalize_then_sum([[[1.0, 0.0]]], [1.0])[0]]])


# --- REINFORCE++ ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("recipe", ["reinforce_pp", "reinforce_pp_baseline"])
def test_whitening_counts_each_token(recipe, seed):
    pick = random.Random(seed)
    rewards = [[pick.uniform(0, 1) for _ in range(3)] for _ in range(4)]
    rewards[2][1] = None
    lengths = [[pick.randint(1, 9) for _ in range(3)] for _ in range(4)]
    start = rewards if recipe == "reinforce_pp" else reference.advantages("none", rewards)
    rows = [(r, n) for group, counts in zip(start, lengths, strict=True) for r, n in zip(group, counts, strict=True)]
    valid = [(r, n) for r, n in rows if r is not None]
    expected = reference.whitened_token_returns(
        [r for r, _ in valid], [[0.0] * n for _, n in valid], [[True] * n for _, n in valid], 0.0
    )
    values = [a for group in group_advantages(scored(rewards, lengths=lengths), recipe=recipe) for a in group]
    close([[a for a in values if a is not None]], [[row[0] for row in expected]])


@pytest.mark.parametrize("seed", range(10))
def test_whitened_returns_equal_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 2, 40, 5]
    rewards = torch.rand(4, dtype=torch.float64, generator=generator)
    k1 = torch.randn(48, dtype=torch.float64, generator=generator)
    mask = torch.rand(48, generator=generator) < 0.8
    bounds = torch.tensor([0, 1, 3, 43, 48])
    expected = reference.whitened_token_returns(
        rewards.tolist(), [v.tolist() for v in k1.split(lengths)], [v.tolist() for v in mask.split(lengths)], 0.3
    )
    dirty = torch.where(mask, k1, torch.tensor([1e30, float("nan")], dtype=torch.float64).repeat(24))
    values = whitened_returns(rewards, dirty, bounds, beta=0.3, loss_mask=mask)
    assert (values - flat(expected)).abs().max() < 1e-12


def test_return_to_go_charges_a_token_for_what_follows():
    returns = token_returns(torch.tensor([1.0]), torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 3]), beta=0.1)
    assert torch.allclose(returns, torch.tensor([0.3, 0.4, 0.6], dtype=torch.float64), atol=1e-12)


def test_reward_penalty_is_subtracted_before_the_baseline():
    rewards, penalty = [[1.0, 0.0, 1.0]], [[0.3, 0.0, 0.1]]
    close(
        group_advantages(scored(rewards), recipe="dapo", reward_penalty=penalty),
        reference.advantages("group", [[0.7, 0.0, 0.9]]),
    )
    with pytest.raises(ValueError, match="reward_penalty"):
        group_advantages(
            scored(rewards), recipe="dapo", reward_penalty=penalty, multi_objective_aggregation="normalize_then_sum"
        )


# --- truncated completions, by enumeration -------------------------------------------------------------------

PROBABILITY_LOGITS = [0.3, -0.4, 0.8, 0.1]
REWARDS = [1.0, 0.0, 0.4, 0.7]
CUT_OFF = 2  # this outcome never ends


def expected_gradient(mask_truncated, baseline_too):
    """Exact expectation over all groups of 3 of Σ_i A_i ∇ log π(x_i), by the policy's logits."""
    logits = torch.tensor(PROBABILITY_LOGITS, dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(0)
    total = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(range(4), repeat=3):
        rewards = [[REWARDS[x] for x in group]]
        truncated = [(0, g) for g, x in enumerate(group) if x == CUT_OFF]
        rollouts = scored(rewards, truncated=truncated)
        advantages = group_advantages(
            rollouts, recipe="dr_grpo", mask_truncated_completions=mask_truncated and baseline_too
        )[0]
        if mask_truncated and not baseline_too:
            advantages = [None if x == CUT_OFF else a for x, a in zip(group, advantages, strict=True)]
        probability = torch.stack([logp[x] for x in group]).sum().exp().detach()
        total = total + probability * sum(a * logp[x] for x, a in zip(group, advantages, strict=True) if a)
    return torch.autograd.grad(total, logits)[0]


def gradient_of_finished_reward():
    """∇ E[R | finished]."""
    logits = torch.tensor(PROBABILITY_LOGITS, dtype=torch.float64, requires_grad=True)
    p = logits.softmax(0)
    keep = torch.tensor([x != CUT_OFF for x in range(4)], dtype=torch.float64)
    value = (p * keep * torch.tensor(REWARDS, dtype=torch.float64)).sum() / (p * keep).sum()
    return torch.autograd.grad(value, logits)[0]


def test_masking_truncated_points_along_the_reward_of_finished_ones():
    cosine = lambda a, b: float(a @ b / a.norm() / b.norm())  # noqa: E731
    target = gradient_of_finished_reward()
    assert abs(cosine(expected_gradient(True, True), target) - 1) < 1e-12
    assert cosine(expected_gradient(True, False), target) < 0.999


def test_baseline_is_the_policy_gradient_up_to_its_known_factor():
    """leave-one-out is ∇E[R]; `none` is (G−1)/G of it."""
    logits = torch.tensor(PROBABILITY_LOGITS, dtype=torch.float64, requires_grad=True)
    exact = torch.autograd.grad((logits.softmax(0) * torch.tensor(REWARDS, dtype=torch.float64)).sum(), logits)[0]
    gradient = expected_gradient(False, False) / 3
    assert (gradient - 2 / 3 * exact).abs().max() < 1e-12


def test_advantages_are_python_floats():
    values = group_advantages(scored([[0.0, 1.0]]), recipe="dapo")[0]
    assert all(type(value) is float and math.isfinite(value) for value in values)
