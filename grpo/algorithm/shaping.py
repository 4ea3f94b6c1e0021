"""Quantities of the whole step that shape rewards, advantages and token masks before the first backward.

soft overlong   0 if n ≤ L_max − L_cache; (L_max − L_cache − n)/L_cache up to L_max; −1 beyond    arXiv 2503.14476
token returns   U_it = R_i − β·Σ_{s≥t} k1_is, whitened over the step's loss tokens               arXiv 2501.03262
top entropy     the (1−q) quantile of H over the step's loss tokens                              arXiv 2506.01939
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo.algorithm.advantages import WHITEN_EPSILON


def soft_overlong(num_tokens: int, max_completion_length: int, cache: int) -> float:
    """The penalty, in [−1, 0], to add to the reward of a completion of `num_tokens` tokens.

    Raises:
        ValueError: cache is not in 1 … max_completion_length.
    """
    if not 0 < cache <= max_completion_length:
        raise ValueError(f"cache is {cache} (want 1 to max_completion_length = {max_completion_length})")
    return min(0.0, max(-1.0, (max_completion_length - cache - num_tokens) / cache))


def token_returns(rewards: Tensor, k1: Tensor | None, cu_seqlens: Tensor, *, beta: float = 0.0) -> Tensor:
    """[T] float64 returns-to-go U_it = R_i − β·Σ_{s≥t} k1_is. rewards [S], k1 [T] = ℓ_old − ℓ_ref, cu_seqlens [S+1]."""
    lengths = cu_seqlens.diff().tolist()
    returns = rewards.double().repeat_interleave(cu_seqlens.diff().to(rewards.device).long())
    if k1 is None or beta == 0:
        return returns
    later = [row.flip(0).cumsum(0).flip(0) for row in k1.double().split(lengths)]
    return returns - beta * torch.cat(later)


def whitened_returns(
    rewards: Tensor,
    k1: Tensor | None,
    cu_seqlens: Tensor,
    *,
    beta: float = 0.0,
    loss_mask: Tensor | None = None,
) -> Tensor:
    """[T] float64 advantages (U − mean)/(std + 1e-8) over all loss tokens; 0 outside them, and where all U are equal.

    T must be the whole optimizer step. `rewards` [S] are R_i, or R_i − mean_g (`baselined_rewards`); std with n − 1.
    """
    inside = (
        torch.ones(int(cu_seqlens[-1]), dtype=torch.bool, device=rewards.device) if loss_mask is None else loss_mask
    )
    clean = None if k1 is None else torch.where(inside, k1, 0)
    returns = token_returns(rewards, clean, cu_seqlens, beta=beta)
    seen = returns[inside]
    if seen.numel() < 2 or bool(seen.max() == seen.min()):
        return torch.zeros_like(returns)
    return torch.where(inside, (returns - seen.mean()) / (seen.std() + WHITEN_EPSILON), 0)


def entropy_quantile(entropies: Tensor | Sequence[Tensor], top_entropy_quantile: float) -> Tensor:
    """The (1−q) quantile (linear interpolation) of H over all loss tokens of the step: a 0-d tensor.

    `entropies`: the loss tokens' entropies, [N] or one [N_b] per bin; none at all gives −inf, which keeps every token.
    """
    values = entropies if isinstance(entropies, Tensor) else torch.cat([part.flatten() for part in entropies])
    values = (
        values.detach().flatten().float()
        if values.dtype in (torch.bfloat16, torch.float16)
        else values.detach().flatten()
    )
    if values.numel() == 0:
        return torch.tensor(float("-inf"))
    # by sorting: torch.quantile refuses more than 2^24 values
    ordered = values.sort().values
    place = round((1 - top_entropy_quantile) * (ordered.numel() - 1), 9)  # 0.3 · 10 is a whole number
    below, share = int(place), place - int(place)
    above = min(below + 1, ordered.numel() - 1)
    return torch.lerp(ordered[below], ordered[above], share)
