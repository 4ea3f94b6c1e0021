"""Held-out evaluation: mean reward, mean@1 and the unbiased pass@k.

A completion is right when its reward reaches `pass_threshold`. mean@1 is the share of right completions; pass@k with
n samples of which c are right is 1 − C(n−c, k)/C(n, k) (Chen et al. 2021, arXiv 2107.03374), averaged over prompts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from grpo.batch import Rollouts, ScoredRollouts
from grpo.scoring import Reward, score


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that k of `num_samples` drawn without replacement hold at least one of `num_right` right ones."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k} (want 1 … {num_samples}, the samples per prompt)")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def evaluate_rollouts(
    rollouts: Rollouts,
    rewards: Sequence[Reward],
    pass_threshold: float,
    *,
    seed: int = 0,
    step: int = 0,
    max_steps: int = 1,
) -> tuple[dict[str, float], ScoredRollouts]:
    """Score `rollouts` and summarise: reward, accuracy (= mean@1), pass@k for k = 1, 2, 4, … n, lengths.

    A completion without a valid reward counts as wrong in accuracy and is left out of the mean reward;
    `invalid_frac` says how many there were. `step` is the number of optimizer steps done.
    """
    scored = score(rollouts, rewards, step=step + 1, max_steps=max_steps, on_error="none", seed=seed)
    flat = [value for group in scored.rewards for value in group]
    valid = [value for value in flat if value is not None]
    right = [[value is not None and value >= pass_threshold for value in group] for group in scored.rewards]
    num_samples = len(right[0])
    completions = [completion for group in rollouts.completions for completion in group]
    metrics = {
        "reward": statistics.fmean(valid) if valid else math.nan,
        "accuracy": statistics.fmean(statistics.fmean(group) for group in right),
        "invalid_frac": 1.0 - len(valid) / len(flat),
        "completions/mean_length": statistics.fmean(len(c.token_ids) for c in completions),
        "completions/clipped_ratio": statistics.fmean(c.finish_reason == "length" for c in completions),
    }
    metrics["mean@1"] = metrics["accuracy"]
    k = 2
    while k <= num_samples:
        metrics[f"pass@{k}"] = statistics.fmean(pass_at_k(num_samples, sum(group), k) for group in right)
        k *= 2
    for name, values in scored.parts.items():
        numbers = [value for group in values for value in group if value is not None]
        if numbers:
            metrics[f"rewards/{name}/mean"] = statistics.fmean(numbers)
    return metrics, scored
