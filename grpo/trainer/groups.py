"""Groups of scored rollouts put together and picked out: what refilling of groups without variance needs.

Left out: deciding which groups teach nothing (grpo/algorithm), and sampling others (loop.py).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from grpo.batch import Rollouts, ScoredRollouts


def merge_scored(rounds: Sequence[ScoredRollouts]) -> ScoredRollouts:
    """All groups of several samplings, in order. Metrics are those of the whole: recomputed, or means over groups."""
    first = rounds[0]
    rollouts = Rollouts(
        [prompt for r in rounds for prompt in r.rollouts.prompts],
        [group for r in rounds for group in r.rollouts.completions],
        max(r.rollouts.policy_version for r in rounds),
    )
    rewards = [group for r in rounds for group in r.rewards]
    parts = {name: [group for r in rounds for group in r.parts[name]] for name in first.parts}
    columns: dict[str, list[list[Any]]] = {}
    for name in dict.fromkeys(name for r in rounds for name in r.columns):
        columns[name] = [
            group for r in rounds for group in r.columns.get(name, [[None] * len(one) for one in r.rewards])
        ]
    metrics = _means_over_groups(rounds) | _spread("reward", "reward_std", rewards)
    for name, values in parts.items():
        metrics |= _spread(f"rewards/{name}/mean", f"rewards/{name}/std", values)
    return ScoredRollouts(rollouts, rewards, parts, first.weights, columns, metrics)


def select_groups(scored: ScoredRollouts, places: Sequence[int]) -> ScoredRollouts:
    """The groups at `places`, with the metrics of all."""
    rollouts = scored.rollouts
    return ScoredRollouts(
        Rollouts(
            [rollouts.prompts[p] for p in places], [rollouts.completions[p] for p in places], rollouts.policy_version
        ),
        [scored.rewards[p] for p in places],
        {name: [values[p] for p in places] for name, values in scored.parts.items()},
        scored.weights,
        {name: [values[p] for p in places] for name, values in scored.columns.items()},
        scored.metrics,
    )


def _means_over_groups(rounds: Sequence[ScoredRollouts]) -> dict[str, float]:
    metrics = {}
    for name in dict.fromkeys(name for r in rounds for name in r.metrics):
        known = [(len(r.rewards), r.metrics[name]) for r in rounds if name in r.metrics]
        metrics[name] = math.fsum(count * value for count, value in known) / sum(count for count, _ in known)
    return metrics


def _spread(mean: str, std: str, groups: Sequence[Sequence[float | None]]) -> dict[str, float]:
    values = [value for group in groups for value in group if value is not None]
    return {
        mean: statistics.fmean(values) if values else math.nan,
        std: statistics.stdev(values) if len(values) > 1 else 0.0,
    }
