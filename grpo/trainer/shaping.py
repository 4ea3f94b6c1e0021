"""What the trainer itself adds to rewards: the penalty of long completions, and the KL to the reference.

    soft overlong   R_i + penalty(n_i) in [−1, 0], from L_max − cache tokens on          arXiv 2503.14476
    KL in reward    R_i − β Σ_t k1_it, k1 = ℓ − ℓ^ref; for REINFORCE++ the return-to-go R_i − β Σ_{s≥t} k1_is

The KL costs two forward passes without gradient over every completion, through the same bins and scorer as the
update. Left out: the KL in the loss, which costs one (update.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo.algorithm import RECIPES, baselined_rewards, group_advantages, soft_overlong, whitened_returns
from grpo.batch import ScoredRollouts, TokenBatch
from grpo.config import GRPOConfig
from grpo.model.policy import Policy
from grpo.packing import pack
from grpo.trainer.update import add_reference_logprobs

Advantages = list[list[float | None]]


def with_overlong_penalty(scored: ScoredRollouts, max_completion_length: int, cache: int) -> ScoredRollouts:
    """The rewards with the soft overlong penalty added, kept apart as the part `soft_overlong` (weight 1)."""
    penalties: list[list[float | None]] = [
        [soft_overlong(len(completion.token_ids), max_completion_length, cache) for completion in group]
        for group in scored.rollouts.completions
    ]
    totals = [
        [None if total is None else total + (penalty or 0.0) for total, penalty in zip(*pair, strict=True)]
        for pair in zip(scored.rewards, penalties, strict=True)
    ]
    flat = [value for group in penalties for value in group if value is not None]
    present = [value for group in totals for value in group if value is not None]
    metrics = {**scored.metrics, "rewards/soft_overlong/mean": statistics.fmean(flat)}
    if present:
        metrics["reward"] = statistics.fmean(present)
        metrics["reward_std"] = statistics.stdev(present) if len(present) > 1 else 0.0
    return replace(
        scored,
        rewards=totals,
        parts={**scored.parts, "soft_overlong": penalties},
        weights={**scored.weights, "soft_overlong": 1.0},
        metrics=metrics,
    )


def measure_k1(policy: Policy, scored: ScoredRollouts, tokens_per_batch: int, temperature: float) -> dict[int, Tensor]:
    """Row (p · G + g) → [n] float32 k1 of its tokens, for every completion with a valid reward."""
    valid = [[None if value is None else 0.0 for value in group] for group in scored.rewards]
    batches, _ = pack(scored, valid, tokens_per_batch, skip_zero_advantage=False)
    found: dict[int, Tensor] = {}
    for batch in add_reference_logprobs(policy, batches, temperature):
        with policy.evaluating(), torch.no_grad():
            logprobs = policy.logprobs(batch.to(policy.device), temperature).logprobs.float().cpu()
        assert batch.reference_logprobs is not None
        k1 = logprobs - batch.reference_logprobs[batch.scored_index]
        bounds = batch.completion_cu_seqlens.tolist()
        for place, row in enumerate(batch.row_ids.tolist()):
            found[row] = k1[bounds[place] : bounds[place + 1]]
    return found


def penalized_advantages(
    scored: ScoredRollouts, k1: dict[int, Tensor], beta: float, recipe: str, knobs: dict[str, Any]
) -> Advantages:
    """`group_advantages` of R_i − β Σ_t k1_it."""
    num_generations = len(scored.rewards[0])
    penalty = [
        [
            beta * float(k1[row].double().sum()) if (row := p * num_generations + g) in k1 else 0.0
            for g in range(len(group))
        ]
        for p, group in enumerate(scored.rewards)
    ]
    return group_advantages(scored, recipe=recipe, reward_penalty=penalty, **knobs)


def is_token_wise(recipe: str) -> bool:
    """Whether the recipe's advantages are returns of each token."""
    return RECIPES[recipe].advantage.startswith("whitened")


def with_token_returns(
    batches: Sequence[TokenBatch], scored: ScoredRollouts, k1: dict[int, Tensor], config: GRPOConfig
) -> list[TokenBatch]:
    """The bins with whitened returns-to-go as advantages of their tokens (arXiv 2501.03262)."""
    objective = config.objective
    baselined = baselined_rewards(
        scored, recipe=objective.recipe, mask_truncated_completions=objective.mask_truncated_completions
    )
    rewards = [value for group in baselined for value in group]
    rows = [row for batch in batches for row in batch.row_ids.tolist()]
    lengths = torch.tensor([len(k1[row]) for row in rows])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    returns = whitened_returns(
        torch.tensor([rewards[row] for row in rows], dtype=torch.float64),
        torch.cat([k1[row] for row in rows]),
        bounds,
        beta=objective.beta,
    )
    done, filled = 0, []
    for batch in batches:
        num_scored = batch.scored_index.numel()
        advantages = torch.zeros_like(batch.advantages)
        advantages[batch.scored_index] = returns[done : done + num_scored].float()
        done += num_scored
        filled.append(replace(batch, advantages=advantages))
    return filled
