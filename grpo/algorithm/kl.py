"""KL(policy ‖ reference) estimated at sampled tokens: d = ℓ_ref − ℓ, r = exp(ℓ − ℓ_old) in the graph → values [T].

    k1        −d             unbiased; as a loss its gradient is 0 on average: for the reward, or to look at
    k2        sg(r)·d²/2     biased value, exact gradient of the reverse KL (with r in the graph it would be wrong)
    k3        e^d − d − 1    unbiased and ≥ 0, gradient of the *forward* KL(reference ‖ policy)
    k3_ratio  r·(e^d − d − 1)  unbiased, exact gradient of the reverse KL, also for tokens of an older policy

Estimators: http://joschu.net/blog/kl-approx.html; k3_ratio: arXiv 2512.02556. r is the token ratio whatever the
surrogate uses, unclipped, and stays in the graph where its value is 1: detached, k3_ratio is k3 again.
Left out: clamps on d. Large |d| is counted (`kl/extreme_frac`), and a non-finite loss is the trainer's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor


def k1(difference: Tensor, ratio: Tensor) -> Tensor:
    """−d."""
    return -difference


def k2(difference: Tensor, ratio: Tensor) -> Tensor:
    """sg(r)·d²/2."""
    return ratio.detach() * difference.square() / 2


def k3(difference: Tensor, ratio: Tensor) -> Tensor:
    """e^d − d − 1."""
    return difference.exp() - difference - 1


def k3_ratio(difference: Tensor, ratio: Tensor) -> Tensor:
    """r·(e^d − d − 1)."""
    return ratio * k3(difference, ratio)


KL_ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "k3_ratio": k3_ratio}
EXTREME = 20.0  # nats
