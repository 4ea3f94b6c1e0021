"""Sampler mismatch: ρ once and only once, its levels and thresholds, missing log-probs, what is logged."""

import math
from dataclasses import replace

import pytest
import torch

from grpo.algorithm import RECIPES, combine_metrics, policy_loss
from tests.algorithm.cases import make_case, run, worst

ONE = torch.tensor([0, 3])


def on_policy(seed=0, lengths=(3, 5), noise=0.2):
    return replace(make_case(seed, list(lengths), noise=noise, masked=False), old=None)


def test_gradient_is_rho_times_the_policy_gradient():
    """One update per rollout: ∂loss/∂ℓ = −ρ·A/N_tok, by hand (ρ dropped or applied twice would show)."""
    case = on_policy()
    _, gradient, _, _ = run("dapo", case)
    rho = (case.logprobs - case.sampler).exp().clamp(max=2.0)
    assert worst(gradient, -rho * case.advantages / 8) < 1e-12
    assert worst(run("dapo", case, sampler_correction="none")[1], -case.advantages / 8) < 1e-12
    assert float((rho - 1).abs().max()) > 0.1


@pytest.mark.parametrize("recipe", RECIPES)
def test_bypass_equals_decoupled_when_old_is_the_sampler(recipe):
    case = make_case(4, [4, 9, 1, 6, 12])
    case = replace(case, old=case.sampler)
    extra = {"reference_logprobs": case.reference, "beta": 0.2, "kl": "k3_ratio", "kl_in": "loss"}
    bypass = run(recipe, case, sampler_correction="bypass", **extra)
    decoupled = run(recipe, case, sampler_correction="truncate", **extra)
    assert abs(float(bypass[0] - decoupled[0])) < 1e-12 and worst(bypass[1], decoupled[1]) < 1e-12


def test_bypass_takes_the_ratio_against_the_sampler():
    case = make_case(4, [4, 9], masked=False)
    bypass = run("dapo", case, sampler_correction="bypass")
    expected = run("dapo", replace(case, old=case.sampler), sampler_correction="none")
    assert torch.equal(bypass[1], expected[1])
    assert worst(bypass[1], run("dapo", case, sampler_correction="none")[1]) > 1e-3


@pytest.mark.parametrize("level", ["token", "sequence_mean", "sequence_sum"])
@pytest.mark.parametrize("kind", ["truncate", "mask", "bypass"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_missing_sampler_logprob_has_weight_one_and_is_counted(bad, kind, level):
    """The same as a sampler that agrees there."""
    case = on_policy(1, [3, 5], noise=0.002)
    broken, agreeing = case.sampler.clone(), case.sampler.clone()
    broken[[1, 6]] = bad
    agreeing[[1, 6]] = case.logprobs[[1, 6]]
    knobs = {"sampler_correction": kind, "correction_level": level, "reference_logprobs": case.reference}
    value = run("dapo", replace(case, sampler=broken), **knobs)
    expected = run("dapo", replace(case, sampler=agreeing), **knobs)
    assert abs(float(value[0] - expected[0])) < 1e-12 and worst(value[1], expected[1]) < 1e-12
    metrics = combine_metrics([value[3]])
    assert metrics["sampling/missing"] == 2
    assert all(math.isfinite(metric) for metric in metrics.values())
    known = torch.ones(8, dtype=torch.bool)
    known[[1, 6]] = False
    difference = (case.logprobs - case.sampler)[known].abs()
    assert abs(metrics["sampling/sampling_logp_difference/mean"] - float(difference.mean())) < 1e-12
    rho = (case.logprobs - case.sampler)[known].exp()
    assert abs(metrics["sampling/ess"] - float(rho.sum() ** 2 / (6 * rho.square().sum()))) < 1e-12


def test_sum_and_mean_thresholds_differ_by_length():
    """A drift of 1e-4 nats per token: the sum of 20,000 tokens passes ln 3 and drops the row, the mean keeps it."""
    long = torch.full((20_000,), -1.0, dtype=torch.float64)
    bounds, advantage = torch.tensor([0, 20_000]), torch.ones(1, dtype=torch.float64)

    def gradient(level):
        logprobs = long.clone().requires_grad_()
        loss, metrics = policy_loss(
            "grpo",
            logprobs,
            advantage,
            bounds,
            sampler_logprobs=long - 1e-4,
            sampler_correction="mask",
            correction_level=level,
        )
        loss.backward()
        return logprobs.grad, combine_metrics([metrics])

    assert gradient("sequence_sum")[0].abs().max() == 0
    assert gradient("sequence_sum")[1]["sampling/frac_masked"] == 1
    assert torch.allclose(gradient("sequence_mean")[0], torch.full_like(long, -math.exp(1e-4) / 20_000), rtol=1e-12)
    assert gradient("sequence_mean")[1]["sampling/frac_masked"] == 0


def test_sequence_level_ratio_of_a_longer_row():
    """A row repeated 100 times: the mean ratio stays, the summed one goes to the 100th power."""
    short = torch.tensor([0.001, -0.003, 0.004], dtype=torch.float64)

    def ratio(level, delta):
        advantage = torch.ones(1, dtype=torch.float64)
        bounds = torch.tensor([0, len(delta)])
        loss, _ = policy_loss(
            "grpo", delta, advantage, bounds, old_logprobs=torch.zeros_like(delta), importance_sampling_level=level,
            epsilon=0.9, epsilon_high=1.5, delta=None,
        )  # fmt: skip
        return -float(loss)

    assert abs(ratio("sequence", short.repeat(100)) - ratio("sequence", short)) < 1e-12
    assert abs(ratio("sequence_sum", short.repeat(100)) - ratio("sequence_sum", short) ** 100) < 1e-12


def test_masking_changes_numerators_only():
    """Divisors count the masked completion."""
    case = on_policy(2, [4, 4])
    far = case.sampler.clone()
    far[:4] = case.logprobs[:4] - 9.0
    masked = run("dapo", replace(case, sampler=far), sampler_correction="mask")[1]
    assert torch.equal(masked[:4], torch.zeros(4, dtype=torch.float64))
    rho = (case.logprobs[4:] - case.sampler[4:]).exp()
    assert worst(masked[4:], -torch.where(rho <= 2, rho, 0) * case.advantages[4:] / 8) < 1e-12


def test_overflowing_sequence_ratio_stays_finite():
    logprobs = torch.full((3,), -1.0, requires_grad=True)
    sampler = torch.full((3,), -1000.0)
    for kind in ("truncate", "mask"):
        loss, _ = policy_loss(
            "dapo",
            logprobs,
            torch.ones(1),
            ONE,
            sampler_logprobs=sampler,
            sampler_correction=kind,
            correction_level="sequence_sum",
        )
        assert float(loss.detach()) == (-3.0 if kind == "truncate" else 0.0)
        assert torch.isfinite(torch.autograd.grad(loss, logprobs)[0]).all()


def test_kl_is_not_weighted_by_rho():
    case = replace(on_policy(3), advantages=torch.zeros(8, dtype=torch.float64))
    extra = {"reference_logprobs": case.reference, "beta": 1.0}
    assert torch.equal(run("dapo", case, **extra)[1], run("dapo", case, sampler_correction="none", **extra)[1])


def test_off_policy_mask_uses_the_old_policy_without_a_sampler():
    """[4 tokens drifted down by 1, A < 0] goes; the same with A > 0 stays; a small drift stays."""
    old = torch.full((9,), -1.0, dtype=torch.float64)
    logprobs = torch.cat([old[:6] - 1.0, old[6:] - 0.01]).requires_grad_()
    loss, _ = policy_loss(
        "dapo", logprobs, torch.tensor([-1.0, 1.0, -1.0]), torch.tensor([0, 3, 6, 9]), old_logprobs=old,
        off_policy_mask_threshold=0.5, epsilon=0.99,
    )  # fmt: skip
    loss.backward()
    assert (logprobs.grad[:3] == 0).all() and (logprobs.grad[3:] != 0).all()


def test_logged_quantities_by_hand():
    case = on_policy(5, [3, 5], noise=0.8)
    metrics = combine_metrics([run("dapo", case)[3]])
    log_rho = case.logprobs - case.sampler
    rho = log_rho.exp()
    expected = {
        "sampling/sampling_logp_difference/mean": log_rho.abs().mean(),
        "sampling/sampling_logp_difference/max": log_rho.abs().max(),
        "sampling/importance_sampling_ratio/min": rho.min(),
        "sampling/importance_sampling_ratio/mean": rho.mean(),
        "sampling/importance_sampling_ratio/max": rho.max(),
        "sampling/k3": (rho - 1 - log_rho).mean(),
        "sampling/ess": rho.sum() ** 2 / (8 * rho.square().sum()),
        "sampling/frac_truncated": (rho > 2).double().mean(),
        "sampling/frac_masked": torch.zeros(()),
        "sampling/missing": torch.zeros(()),
        "entropy": case.entropy.mean(),
    }
    assert float(expected["sampling/frac_truncated"]) > 0
    for name, value in expected.items():
        assert abs(metrics[name] - float(value)) < 1e-12, name


def test_kept_mass_of_truncated_sampling():
    """With top-p the sampler renormalises what it keeps, so the mean of ρ over its tokens is the kept mass, not 1."""
    p = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04], dtype=torch.float64)
    kept = torch.tensor([0, 1])
    sampler = p[kept] / p[kept].sum()
    mean_rho = float((sampler * (p[kept].log() - sampler.log()).exp()).sum())
    assert abs(mean_rho - 0.8) < 1e-12
    _, metrics = policy_loss(
        "dapo", p[kept].log(), torch.ones(2), torch.tensor([0, 1, 2]), sampler_logprobs=sampler.log()
    )
    assert abs(combine_metrics([metrics])["sampling/importance_sampling_ratio/mean"] - 0.8) < 1e-12
