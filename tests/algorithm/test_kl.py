"""KL estimators by exact enumeration: every outcome of a small policy weighted by its probability, nothing sampled."""

import itertools

import pytest
import torch

from grpo.algorithm import policy_loss
from grpo.algorithm.kl import KL_ESTIMATORS
from grpo.batch import Totals

V = 6
ON_POLICY, OFF_POLICY = False, True


def policies(seed=0):
    generator = torch.Generator().manual_seed(seed)
    policy, reference, old = (torch.randn(V, dtype=torch.float64, generator=generator) for _ in range(3))
    return policy.requires_grad_(), reference.log_softmax(0), (policy.detach() + 0.4 * old).log_softmax(0)


def loss_gradient(estimator, off_policy, seed=0, **knobs):
    """Gradient by the policy's logits of E_{x ~ π or π_old}[policy_loss] with A = 0, β = 1, one token each."""
    logits, reference, old = policies(seed)
    logp = logits.log_softmax(0)
    weights = (old if off_policy else logp.detach()).exp()
    total = 0.0
    for x in range(V):
        loss, _ = policy_loss(
            "dapo", logp[x : x + 1], torch.zeros(1, dtype=torch.float64), torch.tensor([0, 1]),
            old_logprobs=old[x : x + 1] if off_policy else None, reference_logprobs=reference[x : x + 1],
            totals=Totals(1, 1, 1), beta=1.0, kl=estimator, **knobs,
        )  # fmt: skip
        total = total + weights[x] * loss
    return torch.autograd.grad(total, logits)[0], float(total.detach())


def exact(forward=False, seed=0):
    """Gradient and value of KL(π‖ref), or of KL(ref‖π)."""
    logits, reference, _ = policies(seed)
    logp = logits.log_softmax(0)
    value = (reference.exp() * (reference - logp)).sum() if forward else (logp.exp() * (logp - reference)).sum()
    return torch.autograd.grad(value, logits)[0], float(value.detach())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("off_policy", [ON_POLICY, OFF_POLICY])
@pytest.mark.parametrize("estimator", ["k2", "k3_ratio"])
def test_reverse_kl_gradient_is_exact(estimator, off_policy, seed):
    gradient, value = loss_gradient(estimator, off_policy, seed)
    expected, kl = exact(seed=seed)
    assert (gradient - expected).abs().max() < 1e-12
    if estimator == "k3_ratio":
        assert abs(value - kl) < 1e-12


def test_k3_gradient_is_that_of_the_forward_kl():
    gradient, value = loss_gradient("k3", ON_POLICY)
    assert (gradient - exact(forward=True)[0]).abs().max() < 1e-12
    assert abs(value - exact()[1]) < 1e-12  # its value is the reverse KL nevertheless
    assert (gradient - exact()[0]).norm() > 0.1 * exact()[0].norm()


@pytest.mark.parametrize("ratio_in_graph", [True, False])
def test_ratio_must_stay_in_the_graph(ratio_in_graph):
    """The estimator itself: with r detached k3_ratio is k3 again; k2 with r in the graph is wrong."""
    logits, reference, old = policies()
    logp = logits.log_softmax(0)
    ratio = (logp - old).exp()
    d = reference - logp
    k3_ratio = (old.exp() * KL_ESTIMATORS["k3_ratio"](d, ratio if ratio_in_graph else ratio.detach())).sum()
    error = (torch.autograd.grad(k3_ratio, logits, retain_graph=True)[0] - exact()[0]).abs().max()
    assert (error < 1e-12) if ratio_in_graph else (error > 1e-3)
    wrong_k2 = (old.exp() * ratio * d.square() / 2).sum()
    assert (torch.autograd.grad(wrong_k2, logits)[0] - exact()[0]).abs().max() > 1e-3


def test_k1_has_no_gradient_on_average_and_is_unbiased():
    logits, reference, _ = policies()
    logp = logits.log_softmax(0)
    d = reference - logp
    value = (logp.detach().exp() * KL_ESTIMATORS["k1"](d, torch.ones_like(d))).sum()
    assert torch.autograd.grad(value, logits)[0].abs().max() < 1e-12
    assert abs(float(value.detach()) - exact()[1]) < 1e-12


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_bias_and_sign_of_the_values(estimator):
    logits, reference, _ = policies()
    logp = logits.log_softmax(0).detach()
    values = KL_ESTIMATORS[estimator](reference - logp, torch.ones_like(logp))
    unbiased = abs(float((logp.exp() * values).sum()) - exact()[1]) < 1e-12
    assert unbiased == (estimator != "k2")
    assert bool((values < 0).any()) == (estimator == "k1")


def two_token_policy(seed=1, v=3):
    """Logits of a policy over sequences of two tokens: first [v], second given the first [v, v]; and a reference."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((v,), (v, v)))
    ref_first, ref_second = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((v,), (v, v)))
    return [first.requires_grad_(), second.requires_grad_()], ref_first.log_softmax(0), ref_second.log_softmax(1)


def two_token_expectation(whole_sequence, v=3):
    """(score-function gradient of k1 in the reward, gradient of the sequence KL), both exact."""
    parameters, ref_first, ref_second = two_token_policy(v=v)
    logp = [parameters[0].log_softmax(0), parameters[1].log_softmax(1)]
    surrogate, kl = 0.0, 0.0
    for a, b in itertools.product(range(v), range(v)):
        steps = [logp[0][a], logp[1][a, b]]
        k1 = [(steps[0] - ref_first[a]).detach(), (steps[1] - ref_second[a, b]).detach()]
        probability = (steps[0] + steps[1]).exp()
        later = [k1[0] + k1[1], k1[1]] if whole_sequence == "return-to-go" else [k1[0] + k1[1]] * 2
        later = k1 if whole_sequence == "own" else later
        surrogate = surrogate + probability.detach() * (steps[0] * later[0] + steps[1] * later[1])
        kl = kl + probability * (steps[0] - ref_first[a] + steps[1] - ref_second[a, b])
    flat = lambda value: torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])  # noqa: E731
    return flat(surrogate), flat(kl)


@pytest.mark.parametrize("form", ["sum", "return-to-go"])
def test_k1_in_the_reward_is_the_sequence_kl(form):
    gradient, expected = two_token_expectation(form)
    assert (gradient - expected).abs().max() < 1e-12


def test_own_k1_alone_is_not_the_sequence_kl():
    gradient, expected = two_token_expectation("own")
    assert (gradient - expected).norm() > 0.01 * expected.norm()


def test_kl_ratio_is_the_token_ratio_whatever_the_surrogate_uses():
    """gspo's ratio is a sequence's; the KL's stays each token's own and is not clipped."""
    generator = torch.Generator().manual_seed(0)
    old, noise, reference = (torch.randn(5, dtype=torch.float64, generator=generator) for _ in range(3))
    logprobs = (old + noise).requires_grad_()
    zero = torch.zeros(2, dtype=torch.float64)
    loss, _ = policy_loss(
        "gspo", logprobs, zero, torch.tensor([0, 2, 5]), old_logprobs=old, reference_logprobs=reference, beta=1.0
    )
    d = reference - logprobs
    token = (logprobs - old).exp() * (d.exp() - d - 1)
    expected = (token[:2].mean() + token[2:].mean()) / 2
    assert abs(float((loss - expected).detach())) < 1e-12


def test_extreme_differences_are_counted_not_clamped():
    logprobs = torch.tensor([-1.0, -30.0, -2.0], dtype=torch.float64)
    reference = torch.tensor([-1.5, -1.0, -50.0], dtype=torch.float64)
    _, metrics = policy_loss(
        "dapo", logprobs, torch.ones(1), torch.tensor([0, 3]), reference_logprobs=reference, kl="k3"
    )
    d = reference - logprobs
    assert abs(float(metrics["kl"]) / float((d.exp() - d - 1).mean()) - 1) < 1e-12
    assert abs(float(metrics["kl/extreme_frac"]) - 2 / 3) < 1e-12
