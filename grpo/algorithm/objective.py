"""The policy loss: independent choices, looked up in tables and multiplied. Nothing here asks for a recipe's name.

    loss = Σ_it w_it · ρ_it · surrogate(r_it, A_it)  +  β · Σ_it w_it · KL_it  −  c · mean H

T completion tokens of S completions lie end to end. Divisors come from `totals`, the counts of the whole optimizer
step, so the losses of its bins add up to the step's loss whatever the split.
Left out: where log-probs come from (grpo/kernels), how rewards become advantages (advantages.py), and what to do with
a non-finite loss (grpo/trainer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo.algorithm import metrics as measure
from grpo.algorithm.corrections import correction_weight, high_entropy, on_policy_enough, sampler_ratio
from grpo.algorithm.denominators import DENOMINATORS, TOKEN_TERMS, Divisors
from grpo.algorithm.kl import KL_ESTIMATORS
from grpo.algorithm.recipes import LOSS_KNOBS, LossKnobs, Recipe, nearest, resolve
from grpo.algorithm.segments import Segments
from grpo.algorithm.shaping import entropy_quantile
from grpo.algorithm.surrogates import SURROGATES
from grpo.batch import Totals

STEP_VALUES = ("entropy_threshold", "group_tokens")
"""Values of the step that some knobs need, given beside the knobs."""


def policy_loss(  # noqa: PLR0913 (one argument for each tensor that an objective may use)
    recipe: str,
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    loss_mask: Tensor | None = None,
    totals: Totals | None = None,
    max_completion_length: int | None = None,
    **knobs: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of some completions of an optimizer step, and their share of its metrics.

    Args:
        recipe: a row of `RECIPES`.
        logprobs: [T] of the policy at the sampler's temperature, in the graph. Half precision is raised to float32.
        advantages: [S], one per completion, or [T], one per token (read as [S] where S == T).
        cu_seqlens: [S+1] int32 or int64, the bounds of the completions within T, from 0 to T.
        old_logprobs: [T] of the anchor of the ratio; None: the policy's own, detached, so that the ratio is exactly 1.
        reference_logprobs: [T], needed where β acts in the loss; without β they only give the `kl` metric.
        sampler_logprobs: [T]; they bring the knob `sampler_correction` into force. Non-finite: weight 1, counted.
        entropy: [T] in nats; in the graph where `entropy_coef` is not 0.
        loss_mask: [T] bool, false for tokens outside the loss; None: all are in it. Whatever stands at a masked place
            (±1e30, NaN) reaches neither the loss nor the gradient.
        totals: counts of the whole optimizer step; None: those of this call.
        max_completion_length: L_max of the denominator `constant`.
        knobs: `LOSS_KNOBS` by name (`delta=None` switches the dual clip off), and values of the step:
            entropy_threshold, for top_entropy_quantile < 1: `entropy_quantile` of the step (of this call when `totals`
            is None); group_tokens [S], for the denominator prompt_mean: loss tokens of each completion's group.

    Returns:
        The loss, a scalar in the graph, and detached scalars for `combine_metrics`.

    Raises:
        ValueError: unknown recipe or knob (names the nearest), contradictory knobs, a missing input, a wrong shape,
            dtype or device.
    """
    step = {name: knobs.pop(name, None) for name in STEP_VALUES}
    row, k = _resolve(recipe, knobs)
    x = _gate(
        logprobs,
        {"old": old_logprobs, "reference": reference_logprobs, "sampler": sampler_logprobs, "entropy": entropy},
        advantages,
        cu_seqlens,
        loss_mask,
    )
    _require(x, k)
    if x.logprobs.numel() == 0:
        return x.logprobs.sum(), {}
    divisors = _divisors(x, totals, max_completion_length, step["group_tokens"])
    kept = _kept(x, k, step["entropy_threshold"], totals)
    denominator = k.denominator or row.denominator
    old = x.logprobs.detach() if x.old is None else x.old

    policy, metrics = _policy_term(row, k, x, old, kept, divisors)
    penalty, kl = _kl_term(k, x, old, TOKEN_TERMS[denominator](x.segments, divisors), divisors.tokens)
    bonus, entropy_share = _entropy_term(k, x, kept, divisors)
    before_bonus = policy + penalty
    metrics |= kl | entropy_share
    metrics["policy_loss"] = before_bonus.detach()
    metrics["raw/tokens"] = x.segments.num_tokens.sum() / divisors.tokens
    return before_bonus - bonus, metrics


@dataclass(frozen=True)
class _Inputs:
    """Tensors [T] of one floating dtype with 0 at every masked place; only log-probs and entropy carry gradients."""

    logprobs: Tensor
    advantages: Tensor
    segments: Segments
    old: Tensor | None
    reference: Tensor | None
    sampler: Tensor | None
    entropy: Tensor | None


def _resolve(recipe: str, knobs: dict[str, Any]) -> tuple[Recipe, LossKnobs]:
    known = (*LOSS_KNOBS, *STEP_VALUES)
    if lines := [
        f"{name} is no knob of policy_loss (did you mean {nearest(name, known)}?)"
        for name in knobs
        if name not in known
    ]:
        raise ValueError("\n".join(lines))
    return resolve(recipe, knobs)


def _gate(
    logprobs: Tensor,
    companions: dict[str, Tensor | None],
    advantages: Tensor,
    cu_seqlens: Tensor,
    loss_mask: Tensor | None,
) -> _Inputs:
    """Checks shapes, dtypes and devices, and puts 0 at masked places before anything is computed from them."""
    if logprobs.dim() != 1 or not logprobs.is_floating_point():
        raise ValueError(f"logprobs are {_described(logprobs)} (want [T] floats)")
    num_tokens = logprobs.shape[0]
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens are {_described(cu_seqlens)} (want [S+1] int32 or int64)")
    if cu_seqlens.device.type == "cpu" and (int(cu_seqlens[0]), int(cu_seqlens[-1])) != (0, num_tokens):
        raise ValueError(
            f"cu_seqlens go from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])} (want 0 to T = {num_tokens})"
        )
    num_completions = cu_seqlens.shape[0] - 1
    if advantages.shape not in ((num_completions,), (num_tokens,)):
        raise ValueError(
            f"advantages are {_described(advantages)} (want [S] = [{num_completions}] or [T] = [{num_tokens}])"
        )
    for name, value in {**companions, "loss_mask": loss_mask}.items():
        if value is not None and (value.shape != logprobs.shape or value.device != logprobs.device):
            raise ValueError(f"{name} are {_described(value)} (want [{num_tokens}] on {logprobs.device}, as logprobs)")
    dtype = torch.float32 if logprobs.dtype in (torch.bfloat16, torch.float16) else logprobs.dtype
    mask = torch.ones_like(logprobs, dtype=torch.bool) if loss_mask is None else loss_mask.bool()
    segments = Segments.from_bounds(cu_seqlens.to(logprobs.device), mask)
    advantages = advantages.detach().to(logprobs.device, dtype)
    per_token = segments.spread(advantages) if advantages.shape[0] == num_completions else advantages

    def clean(value: Tensor | None, keep_graph: bool = False) -> Tensor | None:
        if value is None:
            return None
        return torch.where(mask, (value if keep_graph else value.detach()).to(dtype), 0)

    inside = {name: clean(value, keep_graph=name == "entropy") for name, value in companions.items()}
    return _Inputs(torch.where(mask, logprobs.to(dtype), 0), torch.where(mask, per_token, 0), segments, **inside)


def _described(value: Tensor) -> str:
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"


def _require(x: _Inputs, k: LossKnobs) -> None:
    """Inputs that the knobs need."""
    if k.beta > 0 and k.kl_in == "loss" and x.reference is None:
        raise ValueError(f"reference_logprobs is missing (want it with objective.beta = {k.beta:g})")
    if k.sampler_correction == "bypass" and x.sampler is None:
        raise ValueError("sampler_logprobs is missing (want it with objective.sampler_correction = bypass)")
    if (k.entropy_coef != 0 or k.top_entropy_quantile < 1) and x.entropy is None:
        raise ValueError("entropy is missing (want it with objective.entropy_coef or objective.top_entropy_quantile)")
    if k.entropy_coef != 0 and torch.is_grad_enabled() and x.logprobs.requires_grad and not _in_graph(x.entropy):
        raise ValueError(f"entropy has no gradient (want one with objective.entropy_coef = {k.entropy_coef:g})")


def _in_graph(value: Tensor | None) -> bool:
    return value is not None and value.requires_grad


def _divisors(x: _Inputs, totals: Totals | None, limit: int | None, group_tokens: Tensor | None) -> Divisors:
    counts = x.segments.num_tokens
    if totals is None:
        tokens, sequences, groups = counts.sum(), (counts > 0).sum().double(), None
    else:
        tokens, sequences, groups = (
            counts.new_full((), float(count)) for count in (totals.tokens, totals.sequences, totals.groups)
        )
    return Divisors(
        tokens.clamp(min=1),
        sequences.clamp(min=1),
        None if groups is None else groups.clamp(min=1),
        limit,
        None if group_tokens is None else group_tokens.to(counts.device),
    )


def _kept(x: _Inputs, k: LossKnobs, threshold: Tensor | float | None, totals: Totals | None) -> Tensor:
    """[T] bool: loss tokens that top-entropy masking leaves in the policy term and the entropy bonus."""
    mask = x.segments.loss_mask
    if k.top_entropy_quantile >= 1 or x.entropy is None:
        return mask
    if threshold is None and totals is not None:
        raise ValueError("entropy_threshold is missing (want entropy_quantile over the whole step, as totals are)")
    if threshold is None:
        threshold = entropy_quantile(x.entropy[mask], k.top_entropy_quantile)
    if isinstance(threshold, Tensor):
        threshold = threshold.to(x.entropy.device)
    return mask & high_entropy(x.entropy, threshold)


def _policy_term(
    row: Recipe, k: LossKnobs, x: _Inputs, old: Tensor, kept: Tensor, divisors: Divisors
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ w · ρ · surrogate(r, A), and the metrics of r and ρ."""
    segments = x.segments
    ratio = _ratio(
        k.importance_sampling_level or row.importance_sampling_level, x.logprobs - _anchor(k, x, old), segments
    )
    weight = DENOMINATORS[k.denominator or row.denominator](segments, divisors).to(x.logprobs.dtype) * kept
    with torch.no_grad():
        metrics = measure.clip_metrics(row, k, ratio, x.advantages, segments, (divisors.tokens, divisors.sequences))
    if x.sampler is not None:
        rho = sampler_ratio(old, x.sampler, segments)
        correction, corrected = correction_weight(rho, segments, k)
        weight = weight * correction
        metrics |= measure.sampler_metrics(rho, corrected, k.sampler_correction, segments, divisors.tokens)
    if k.off_policy_mask_threshold is not None:
        sampler = old if x.sampler is None else x.sampler
        weight = weight * on_policy_enough(x.logprobs, sampler, x.advantages, segments, k.off_policy_mask_threshold)
    return (weight * SURROGATES[row.surrogate](ratio, x.logprobs, x.advantages, k)).sum(), metrics


def _anchor(k: LossKnobs, x: _Inputs, old: Tensor) -> Tensor:
    """What the ratio is taken against: the old policy, or with `bypass` the sampler where it is known."""
    if k.sampler_correction != "bypass" or x.sampler is None:
        return old
    return torch.where(torch.isfinite(x.sampler), x.sampler, old)


LEVELS = {
    "token": lambda log_ratio, segments: log_ratio,
    "sequence": lambda log_ratio, segments: segments.spread(segments.mean(log_ratio)),
    "sequence_sum": lambda log_ratio, segments: segments.spread(segments.sum(log_ratio)),
}


def _ratio(level: str, log_ratio: Tensor, segments: Segments) -> Tensor:
    """r [T], in the graph also where it is 1."""
    return LEVELS[level](log_ratio, segments).exp()


def _kl_term(k: LossKnobs, x: _Inputs, old: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """β · Σ w · KL where it acts in the loss; measured wherever there is a reference."""
    nothing = x.logprobs.new_zeros(())
    if x.reference is None:
        return nothing, {}
    difference = x.reference - x.logprobs
    values = KL_ESTIMATORS[k.kl](difference, (x.logprobs - _anchor(k, x, old)).exp())
    metrics = measure.kl_metrics(values.detach(), difference.detach(), tokens)
    acts = k.beta > 0 and k.kl_in == "loss"
    return (k.beta * (weight.to(values.dtype) * values).sum() if acts else nothing), metrics


def _entropy_term(k: LossKnobs, x: _Inputs, kept: Tensor, divisors: Divisors) -> tuple[Tensor, dict[str, Tensor]]:
    """c · mean H over the tokens of the policy term; the metric is over all loss tokens.

    The divisor is the number of tokens at or above the step's quantile, which follows from N_tok alone (ties aside):
    so it needs no further count, and splits do not change it.
    """
    nothing = x.logprobs.new_zeros(())
    if x.entropy is None:
        return nothing, {}
    metrics = {"entropy": x.entropy.detach().double().sum() / divisors.tokens}
    if k.entropy_coef == 0:
        return nothing, metrics
    below = ((1 - k.top_entropy_quantile) * (divisors.tokens - 1) - 1e-9).ceil()
    count = (divisors.tokens - below).to(x.entropy.dtype)
    return k.entropy_coef * (x.entropy * kept).sum() / count, metrics
