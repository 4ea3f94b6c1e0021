"""Masked places, fully masked rows, gradients that follow the upstream one, the fate of empty steps."""

from dataclasses import replace

import pytest
import torch

from grpo.algorithm import RECIPES, combine_metrics, entropy_quantile, policy_loss
from grpo.algorithm.shaping import soft_overlong
from grpo.batch import Totals
from tests import reference
from tests.algorithm.cases import make_case, run, worst

FULL = {"beta": 0.2, "kl": "k3_ratio", "kl_in": "loss", "entropy_coef": 0.1, "off_policy_mask_threshold": 0.5}


@pytest.mark.parametrize("junk", [1e30, -1e30, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("recipe", RECIPES)
def test_whatever_stands_at_masked_places(recipe, junk):
    """Loss, gradient and metrics do not move by a bit, and no gradient appears at a masked place."""
    for seed in range(4):
        case = make_case(seed, [3, 8, 1, 5])
        dirty = replace(
            case,
            **{
                name: torch.where(case.mask, getattr(case, name), junk)
                for name in ("logprobs", "advantages", "old", "reference", "sampler", "entropy")
            },
        )
        for knobs in (
            {},
            {"sampler_correction": "mask", "correction_level": "sequence_sum"},
            {"sampler_correction": "bypass"},
        ):
            clean_run = run(recipe, case, reference_logprobs=case.reference, **FULL, **knobs)
            dirty_run = run(recipe, dirty, reference_logprobs=dirty.reference, **FULL, **knobs)
            for a, b in zip(clean_run[:3], dirty_run[:3], strict=True):
                assert torch.equal(a, b)
            assert (dirty_run[1][~case.mask] == 0).all()
            assert combine_metrics([clean_run[3]]) == combine_metrics([dirty_run[3]])


@pytest.mark.parametrize("recipe", RECIPES)
def test_fully_masked_row_changes_nothing(recipe):
    case = make_case(1, [6, 3, 4], masked=False)
    keep = torch.cat([torch.ones(6), torch.zeros(3), torch.ones(4)]).bool()
    with_row = run(recipe, replace(case, mask=keep), reference_logprobs=case.reference, **FULL)
    without_case = case.select([0, 2])
    without = run(recipe, without_case, reference_logprobs=without_case.reference, **FULL)
    assert abs(float(with_row[0] - without[0])) < 1e-12  # a sum in another order
    assert torch.equal(with_row[1][keep], without[1]) and (with_row[1][~keep] == 0).all()
    one, other = combine_metrics([with_row[3]]), combine_metrics([without[3]])
    assert one.keys() == other.keys() and all(abs(one[name] - other[name]) < 1e-12 for name in one)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_with_nothing_in_it(recipe):
    """All masked, or no completion at all: the loss is 0 with gradient 0, never 0/0."""
    case = make_case(1, [2, 3])
    nothing = run(
        recipe, replace(case, mask=torch.zeros(5, dtype=torch.bool)), reference_logprobs=case.reference, **FULL
    )
    assert float(nothing[0]) == 0 and (nothing[1] == 0).all()
    assert not any(value != value for value in combine_metrics([nothing[3]]).values())
    empty = torch.zeros(0, requires_grad=True)
    for bounds, advantages in ((torch.tensor([0]), torch.zeros(0)), (torch.tensor([0, 0, 0]), torch.ones(2))):
        loss, metrics = policy_loss(
            recipe, empty, advantages, bounds, sampler_logprobs=torch.zeros(0), reference_logprobs=torch.zeros(0),
            max_completion_length=5,
        )  # fmt: skip
        loss.backward()
        assert float(loss.detach()) == 0
        combine_metrics([metrics])


@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_times_three_is_gradient_times_three(recipe):
    case = make_case(6)
    logprobs, entropy = case.logprobs.clone().requires_grad_(), case.entropy.clone().requires_grad_()
    loss, _ = policy_loss(
        recipe, logprobs, case.advantages, case.cu_seqlens, old_logprobs=case.old, reference_logprobs=case.reference,
        sampler_logprobs=case.sampler, entropy=entropy, loss_mask=case.mask, max_completion_length=17, **FULL,
    )  # fmt: skip
    once = torch.autograd.grad(loss, [logprobs, entropy], retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, [logprobs, entropy])
    for a, b in zip(once, thrice, strict=True):
        assert worst(b, 3 * a) < 1e-12 and float(a.abs().max()) > 0


def test_luspo_is_gspo_times_length():
    """luspo = Σ n_i·gspo term / N_seq, for lengths 1, 2 and 300."""
    case = make_case(0, [1, 2, 300], drift=0.001, masked=False)
    totals = Totals(303, 3, 1)
    parts = []
    for place in range(3):
        row = case.select([place])
        parts.append(row.lengths[0] * float(run("gspo", row, totals=totals, sampler_correction="none")[0]))
    assert abs(float(run("luspo", case, sampler_correction="none")[0]) - sum(parts)) < 1e-12


@pytest.mark.parametrize("quantile", [0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
def test_entropy_quantile(quantile):
    for count in (1, 2, 10, 11, 101, 1000):
        values = torch.rand(count, dtype=torch.float64)
        threshold = entropy_quantile([values[: count // 3], values[count // 3 :]], quantile)
        assert abs(float(threshold) - reference.quantile(values.tolist(), 1 - quantile)) < 1e-12
        if count > 1:
            assert abs(float(threshold) - float(torch.quantile(values, 1 - quantile))) < 1e-9


def test_bonus_divides_by_the_tokens_it_acts_on():
    """Also where (1 − q)·(N − 1) is a whole number that floats miss: 0.3 · 10 = 3 + 4e-16."""
    case = make_case(2, [6, 5], masked=False)
    for quantile in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        by_entropy = run("dapo", case, top_entropy_quantile=quantile, entropy_coef=1.0)[2]
        kept = by_entropy != 0
        assert int(kept.sum()) == round(quantile * 10) + 1
        assert (by_entropy[kept] + 1 / (round(quantile * 10) + 1)).abs().max() < 1e-12


def test_top_entropy_leaves_kl_and_divisors():
    case = make_case(2, [6, 5], masked=False)
    zero = replace(case, advantages=torch.zeros(11, dtype=torch.float64))
    extra = {"reference_logprobs": case.reference, "beta": 0.5}
    assert torch.equal(run("dapo", zero, top_entropy_quantile=0.2, **extra)[1], run("dapo", zero, **extra)[1])
    kept = case.entropy >= entropy_quantile(case.entropy, 0.2)
    expected = torch.where(kept, run("dapo", case)[1], 0)
    assert torch.equal(run("dapo", case, top_entropy_quantile=0.2)[1], expected)
    assert 0 < int(kept.sum()) < 11


@pytest.mark.parametrize(
    "n, expected", [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (999, -1.0)]
)
def test_soft_overlong(n, expected):
    assert abs(soft_overlong(n, 100, 20) - expected) < 1e-12


@pytest.mark.parametrize("cache", [0, -1, 101])
def test_soft_overlong_needs_a_cache_within_the_limit(cache):
    with pytest.raises(ValueError, match="cache is"):
        soft_overlong(5, 100, cache)
