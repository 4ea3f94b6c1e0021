"""Constants that multiply a token's policy loss: sampler mismatch, stale completions, low-entropy tokens → [T].

    ρ = exp(ℓ_old − ℓ_smp): from the engine's distribution to the anchor's (numerics, stale weights). r = exp(ℓ − ℓ_old)
    corrects our own updates. A missing (non-finite) ℓ_smp means ρ = 1, and is counted.

    level          quantity                 truncate (TIS)      mask (MIS)
    token          ρ_t                      min(ρ, C), C = 2    ρ·1[C_min ≤ ρ ≤ C_max]
    sequence_mean  exp(Σ m·log ρ / n_i)     min(·, C)           band [0.99, 1.01]
    sequence_sum   exp(Σ m·log ρ)           min(·, C)           C = 3

Truncation: https://fengyao.notion.site/off-policy-rl. Off-policy mask: arXiv 2512.02556. Top entropy: arXiv 2506.01939.
`bypass` has no weight: the sampler itself is the anchor (objective.py). These change numerators only, never divisors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.algorithm.recipes import LossKnobs, correction_band
from grpo.algorithm.segments import Segments


@dataclass(frozen=True)
class SamplerRatio:
    """log ρ [T], 0 where it is masked or missing; `missing` [T] bool: in the loss, but without a sampler log-prob."""

    log_rho: Tensor
    missing: Tensor


def sampler_ratio(anchor_logprobs: Tensor, sampler_logprobs: Tensor, segments: Segments) -> SamplerRatio:
    """ρ of each token, a constant. Both log-probs [T] at one temperature."""
    known = torch.isfinite(sampler_logprobs) & segments.loss_mask
    log_rho = torch.where(known, anchor_logprobs.detach() - torch.where(known, sampler_logprobs, 0), 0)
    return SamplerRatio(log_rho, segments.loss_mask & ~known)


LEVELS: Mapping[str, Callable[[Tensor, Segments], Tensor]] = {
    "token": lambda log_rho, segments: log_rho,
    "sequence_mean": lambda log_rho, segments: segments.spread(segments.mean(log_rho)),
    "sequence_sum": lambda log_rho, segments: segments.spread(segments.sum(log_rho)),
}


def correction_weight(ratio: SamplerRatio, segments: Segments, knobs: LossKnobs) -> tuple[Tensor, Tensor]:
    """The weight [T] of `knobs.sampler_correction`, and where [T] bool it was truncated or masked."""
    rho = LEVELS[knobs.correction_level](ratio.log_rho, segments).exp()
    low, high = correction_band(knobs.correction_level, knobs.correction_min, knobs.correction_max)
    outside = {"truncate": rho > high, "mask": (rho < low) | (rho > high)}.get(knobs.sampler_correction)
    if outside is None:
        return torch.ones_like(rho), torch.zeros_like(segments.loss_mask)
    cap = high if knobs.sampler_correction == "truncate" else 0.0
    return torch.where(outside, cap, rho), outside & segments.loss_mask


def on_policy_enough(
    logprobs: Tensor, sampler_logprobs: Tensor, advantages: Tensor, segments: Segments, threshold: float
) -> Tensor:
    """[T] bool: false for completions with A < 0 and mean(ℓ_smp − sg ℓ) > threshold; missing places count as 0."""
    drift = sampler_ratio(logprobs, sampler_logprobs, segments).log_rho
    return (advantages >= 0) | (segments.spread(segments.mean(-drift)) <= threshold)


def high_entropy(entropy: Tensor, threshold: Tensor | float) -> Tensor:
    """[T] bool: H_t ≥ threshold, the (1−q) quantile of the whole step (`shaping.entropy_quantile`)."""
    return entropy.detach() >= threshold
