"""Surrogate losses, token by token: ratio r [T] (in the graph), log-probs ℓ [T], advantages A [T] → losses [T].

    clip   −min(r·A, clip(r, 1−ε, 1+ε_high)·A)                        arXiv 1707.06347; clip-higher 2503.14476
           with δ > 1+ε_high: −min(min(r, δ)·A, clip(r)·A), which for A < 0 is dual clipping, arXiv 1912.09729
    cispo  −sg(min(r, ε_high))·A·ℓ, ε_high the cap itself             arXiv 2506.13585
    sapo   −(4/τ)·σ(τ(r−1))·A, τ by the sign of A, slope A at r = 1   arXiv 2511.20347

Left out: where r comes from (token or sequence level, objective.py). A sequence-level r has one value per completion,
carried by all its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from grpo.algorithm.recipes import LossKnobs

SurrogateLoss = Callable[[Tensor, Tensor, Tensor, LossKnobs], Tensor]


def clip(ratio: Tensor, logprobs: Tensor, advantages: Tensor, knobs: LossKnobs) -> Tensor:
    """No gradient where (r > 1+ε_high, A > 0) or (r < 1−ε, A < 0) or, with δ, where (r > δ, A < 0)."""
    clipped = ratio.clamp(1 - knobs.epsilon, 1 + knobs.epsilon_high)
    bounded = ratio if knobs.delta is None else ratio.clamp(max=knobs.delta)
    return -torch.minimum(bounded * advantages, clipped * advantages)


def cispo(ratio: Tensor, logprobs: Tensor, advantages: Tensor, knobs: LossKnobs) -> Tensor:
    """REINFORCE with a capped, constant weight: every token keeps a gradient."""
    return -ratio.detach().clamp(max=knobs.epsilon_high) * advantages * logprobs


def sapo(ratio: Tensor, logprobs: Tensor, advantages: Tensor, knobs: LossKnobs) -> Tensor:
    """A smooth gate for a hard clip."""
    tau = torch.full_like(ratio, knobs.sapo_temperature_neg)  # where() of two numbers would round them to float32
    tau = tau.masked_fill(advantages > 0, knobs.sapo_temperature_pos)
    return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantages


SURROGATES: Mapping[str, SurrogateLoss] = {"clip": clip, "cispo": cispo, "sapo": sapo}


def clipped_low(ratio: Tensor, advantages: Tensor, knobs: LossKnobs) -> Tensor:
    """[T] bool: places where `clip` has no gradient on the low side."""
    return (ratio < 1 - knobs.epsilon) & (advantages < 0)


def clipped_high(ratio: Tensor, advantages: Tensor, knobs: LossKnobs) -> Tensor:
    """[T] bool: … on the high side."""
    return (ratio > 1 + knobs.epsilon_high) & (advantages > 0)
