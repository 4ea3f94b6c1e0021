"""What a step's loss says about itself: detached sums, made so that the bins of a step add up.

Every value of a part is divided by the step's totals, so values ADD over bins (names ending in `min` or `max` combine
by that). Means over other counts, the tokens that were forwarded or that had a sampler log-prob, are formed at the end
from the sums named `raw/…`, which are not public. Names are TRL's where it has one.
Left out: metrics of rewards, lengths and groups (grpo/trainer), which need no log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from grpo.algorithm.corrections import SamplerRatio
from grpo.algorithm.kl import EXTREME
from grpo.algorithm.recipes import LossKnobs, Recipe
from grpo.algorithm.segments import Segments
from grpo.algorithm.surrogates import clipped_high, clipped_low

PER_FORWARDED = ("kl", "kl/extreme_frac", "entropy", "sampling/frac_truncated", "sampling/frac_masked")
PER_SAMPLED = (
    "sampling/sampling_logp_difference/mean",
    "sampling/importance_sampling_ratio/mean",
    "sampling/k3",
)


def clip_metrics(
    row: Recipe,
    knobs: LossKnobs,
    ratio: Tensor,
    advantages: Tensor,
    segments: Segments,
    divisors: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """Shares without gradient: of tokens, or of completions when the ratio is a sequence's.

    `low_min` and `high_max` are over completions (over bins they would depend on the packing). divisors: N_tok, N_seq.
    """
    by_token = (knobs.importance_sampling_level or row.importance_sampling_level) == "token"

    def share(where: Tensor) -> Tensor:
        inside = (where & segments.loss_mask).double()
        return inside.sum() / divisors[0] if by_token else segments.mean(inside).sum() / divisors[1]

    high_of_cispo = (ratio > knobs.epsilon_high) & (advantages > 0)
    if row.surrogate == "cispo":
        return {"cispo_clip_ratio": share(high_of_cispo)}
    if row.surrogate != "clip":
        return {}
    low, high = clipped_low(ratio, advantages, knobs), clipped_high(ratio, advantages, knobs)
    present = segments.num_tokens > 0
    return {
        "clip_ratio/low_mean": share(low),
        "clip_ratio/high_mean": share(high),
        "clip_ratio/region_mean": share(low | high),
        "clip_ratio/low_min": torch.where(present, segments.mean(low.double()), torch.inf).amin(),
        "clip_ratio/high_max": torch.where(present, segments.mean(high.double()), -torch.inf).amax(),
    }


def sampler_metrics(
    ratio: SamplerRatio, corrected: Tensor, kind: str, segments: Segments, tokens: Tensor
) -> dict[str, Tensor]:
    """ρ of each token before any cap. `corrected` [T] bool: the weight was truncated or masked. tokens: N_tok."""
    known = segments.loss_mask & ~ratio.missing
    log_rho = ratio.log_rho.double()
    rho = torch.where(known, log_rho.exp(), 0)
    corrected_share = corrected.double().sum() / tokens
    nothing = torch.zeros_like(corrected_share)
    return {
        "sampling/sampling_logp_difference/mean": log_rho.abs().sum() / tokens,
        "sampling/sampling_logp_difference/max": log_rho.abs().amax(),
        "sampling/importance_sampling_ratio/mean": rho.sum() / tokens,
        "sampling/importance_sampling_ratio/min": torch.where(known, rho, torch.inf).amin(),
        "sampling/importance_sampling_ratio/max": torch.where(known, rho, -torch.inf).amax(),
        "sampling/k3": torch.where(known, rho - 1 - log_rho, 0).sum() / tokens,
        "sampling/frac_truncated": corrected_share if kind == "truncate" else nothing,
        "sampling/frac_masked": corrected_share if kind == "mask" else nothing,
        "sampling/missing": ratio.missing.double().sum(),
        "raw/sampled": known.double().sum() / tokens,
        "raw/rho_squared": rho.square().sum() / tokens,
    }


def kl_metrics(values: Tensor, difference: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """The estimator's values [T] (0 outside the loss mask) and how many |ℓ_ref − ℓ| are extreme."""
    return {
        "kl": values.double().sum() / tokens,
        "kl/extreme_frac": (difference.abs() > EXTREME).double().sum() / tokens,
    }


def add_metrics(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Bins of a step → the step, on the device. Ranks: all-reduce the result by sum, `…min` and `…max` by those."""
    columns: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, value in part.items():
            columns.setdefault(name, []).append(value.double())
    return {name: _reduction(name)(torch.stack(values)) for name, values in columns.items()}


def public_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The public names of a step, with one transfer to the host. What was not measured is absent."""
    if not sums:
        return {}
    values = dict(zip(sums, torch.stack([value.double() for value in sums.values()]).tolist(), strict=True))
    raw = {name: values.pop(name) for name in list(values) if name.startswith("raw/")}
    for names, count in ((PER_FORWARDED, raw.get("raw/tokens", 0.0)), (PER_SAMPLED, raw.get("raw/sampled", 0.0))):
        for name in names:
            if name in values and count > 0:
                values[name] /= count
            else:
                values.pop(name, None)
    if (squares := raw.get("raw/rho_squared", 0.0)) > 0:
        values["sampling/ess"] = (values["sampling/importance_sampling_ratio/mean"] ** 2) * raw["raw/sampled"] / squares
    empty = {"min": float("inf"), "max": float("-inf")}
    return {name: value for name, value in values.items() if value != empty.get(name[-3:])}


def combine_metrics(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """The step's metrics from those of its bins: `public_metrics(add_metrics(parts))`."""
    return public_metrics(add_metrics(parts))


def _reduction(name: str) -> Callable[[Tensor], Tensor]:
    return {"min": torch.amin, "max": torch.amax}.get(name[-3:], torch.sum)
