"""Weights w_it [T] of token losses. Counts are those of the whole optimizer step, each at least 1.

    sequence_mean  1/(n_i·N_seq)               token_mean   1/N_tok
    sequence_sum   1/N_seq per token           constant     1/(N_seq·L_max)
    sequence       1/N_seq per completion      prompt_mean  1/(N_grp·tokens of the group)

`sequence` is for sequence-level ratios: the one term of a completion is carried by its n_i tokens, so a policy weight
is 1/(n_i·N_seq); what is one value per token (KL) is summed over the completion, so its weight is 1/N_seq.
Left out: counting. Counts come from `Totals`; masked tokens get weight 0 from the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from grpo.algorithm.segments import Segments


@dataclass(frozen=True)
class Divisors:
    """Counts of the optimizer step as float64 scalars, each at least 1, and what else a denominator may need."""

    tokens: Tensor
    sequences: Tensor
    groups: Tensor | None  # None: this call was not told
    max_completion_length: int | None
    group_tokens: Tensor | None  # [S] loss tokens of each completion's group in the step


def _token_mean(segments: Segments, divisors: Divisors) -> Tensor:
    return (1 / divisors.tokens).expand(segments.ids.shape)


def _sequence_mean(segments: Segments, divisors: Divisors) -> Tensor:
    return segments.spread(1 / (segments.num_tokens.clamp(min=1) * divisors.sequences))


def _sequence_sum(segments: Segments, divisors: Divisors) -> Tensor:
    return (1 / divisors.sequences).expand(segments.ids.shape)


def _constant(segments: Segments, divisors: Divisors) -> Tensor:
    if divisors.max_completion_length is None:
        raise ValueError("max_completion_length is missing (want it: the denominator is constant)")
    return (1 / (divisors.sequences * divisors.max_completion_length)).expand(segments.ids.shape)


def _prompt_mean(segments: Segments, divisors: Divisors) -> Tensor:
    if divisors.groups is None or divisors.group_tokens is None:
        raise ValueError(
            "group_tokens or totals is missing (want [S] loss tokens of each group, and the step's totals)"
        )
    return segments.spread(1 / (divisors.groups * divisors.group_tokens.double().clamp(min=1)))


DENOMINATORS: Mapping[str, Callable[[Segments, Divisors], Tensor]] = {
    "token_mean": _token_mean,
    "sequence_mean": _sequence_mean,
    "sequence_sum": _sequence_sum,
    "constant": _constant,
    "sequence": _sequence_mean,
    "prompt_mean": _prompt_mean,
}

TOKEN_TERMS: Mapping[str, Callable[[Segments, Divisors], Tensor]] = {**DENOMINATORS, "sequence": _sequence_sum}
"""The same for terms that have one value per token whatever the level of the ratio."""
