"""Scored rollouts made by hand."""

from __future__ import annotations

from grpo.batch import Completion, Prompt, Rollouts, ScoredRollouts


def scored(rewards, *, parts=None, weights=None, lengths=None, truncated=()) -> ScoredRollouts:
    """`rewards` [P][G]; `lengths` [P][G] tokens (3 each by default); `truncated`: pairs (p, g)."""
    completions = [
        [
            Completion(
                [7] * (lengths[p][g] if lengths else 3),
                [-1.0] * (lengths[p][g] if lengths else 3),
                "length" if (p, g) in truncated else "stop",
                "",
            )
            for g in range(len(group))
        ]
        for p, group in enumerate(rewards)
    ]
    prompts = [Prompt(p, [1, 2], {}) for p in range(len(rewards))]
    return ScoredRollouts(
        Rollouts(prompts, completions, 0),
        rewards,
        parts or {"r": rewards},
        weights or {name: 1.0 for name in parts or "r"},
    )
