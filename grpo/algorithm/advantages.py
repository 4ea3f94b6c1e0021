"""Advantages of whole completions, in float64 Python lists before anything is packed. R is the weighted total.

    none               R − mean_g                                arXiv 2503.20783
    group              (R − mean_g)/(std_g + 1e-4)               arXiv 2402.03300
    batch              (R − mean_g)/(std of all R + 1e-4)        arXiv 2508.08221
    leave_one_out      R_i − mean of the others of its group     arXiv 2402.14740
    whitened           (R − mean)/(std + 1e-8) over tokens       arXiv 2501.03262 (each R counted once per token)
    whitened_baseline  the same with R − mean_g for R

std is taken with n − 1. None means outside: no valid reward, or cut off and masked; it leaves the loss *and* the
baseline. A group of zero variance is one with max == min of the totals (12 digits), never one with a small std.
Left out: token-wise returns with a KL penalty at each token (`shaping.whitened_returns`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import fsum, sqrt
from typing import Any, Literal, get_args

from grpo.algorithm.recipes import RECIPES, Scaling, check_objective
from grpo.batch import ScoredRollouts

Group = list[float | None]
Cause = Literal["all_truncated", "all_invalid", "all_right", "all_wrong", "other"]

EPSILON = 1e-4  # beside a std of rewards
WHITEN_EPSILON = 1e-8  # beside the std of token returns
DIGITS = 12  # totals are compared after rounding to these (0.1 + 0.2 ≠ 0.3)


def group_advantages(
    scored: ScoredRollouts,
    *,
    recipe: str,
    scale_rewards: Scaling | None = None,
    multi_objective_aggregation: str = "sum_then_normalize",
    mask_truncated_completions: bool = False,
    reward_penalty: Sequence[Sequence[float]] | None = None,
) -> list[Group]:
    """[P][G] advantages in float64; None for a completion that is outside loss and baseline.

    A group of zero variance gets exactly 0 (whitened: a step does), a group with fewer than two valid completions is
    all None.

    Args:
        recipe: its `advantage` is the kind.
        scale_rewards: overrides that kind where it is none | group | batch; None keeps the recipe's own.
            normalize_then_sum always divides, so it acts only on sum_then_normalize.
        multi_objective_aggregation: sum_then_normalize, or normalize_then_sum: each function
            (R − mean_g)/(std_g + 1e-4) over the completions it applies to, weighted sum, then
            (x − mean)/(std + 1e-4) over the step.
        mask_truncated_completions: finish_reason "length" is outside, like a missing reward. That is the gradient of
            E[R | finished]; leaving only the loss is not.
        reward_penalty: [P][G] subtracted from the totals first (KL in the reward: β·Σ_t k1).

    Raises:
        ValueError: unknown recipe or value, or normalize_then_sum with a penalty or a recipe of its own normalisation.
    """
    knobs: dict[str, Any] = {
        "multi_objective_aggregation": multi_objective_aggregation,
        "mask_truncated_completions": mask_truncated_completions,
    } | ({} if scale_rewards is None else {"scale_rewards": scale_rewards})
    if lines := check_objective(recipe, **knobs):
        raise ValueError("\n".join(lines))
    kind = RECIPES[recipe].advantage
    if scale_rewards is not None and kind in get_args(Scaling):
        kind = scale_rewards
    if multi_objective_aggregation == "normalize_then_sum":
        if reward_penalty is not None:
            raise ValueError("reward_penalty is given (want sum_then_normalize with it: it has no scale of its own)")
        summed = _normalized_sums(scored, mask_truncated_completions)
        spread = _std(_numbers(summed)) + EPSILON  # the mean over the step is 0: every function's values sum to 0
        return [_map(group, lambda x: x / spread) for group in summed]
    totals = _penalized(valid_totals(scored, mask_truncated_completions), reward_penalty)
    if kind in ("whitened", "whitened_baseline"):
        return _whitened(scored, [_centered(group) for group in totals] if kind == "whitened_baseline" else totals)
    spread = _std(_numbers(totals)) if kind == "batch" else 0.0
    return [_scaled(group, kind, spread) for group in totals]


def baselined_rewards(scored: ScoredRollouts, *, recipe: str, mask_truncated_completions: bool = False) -> list[Group]:
    """[P][G] rewards on their way into token returns: R, or R − mean_g for a `whitened_baseline` recipe."""
    totals = valid_totals(scored, mask_truncated_completions)
    return [_centered(group) for group in totals] if RECIPES[recipe].advantage == "whitened_baseline" else totals


def valid_totals(scored: ScoredRollouts, mask_truncated_completions: bool = False) -> list[Group]:
    """[P][G] totals with None wherever a completion is outside; a group with fewer than two left is all None."""
    totals: list[Group] = []
    for rewards, completions in zip(scored.rewards, scored.rollouts.completions, strict=True):
        group: Group = [
            None if mask_truncated_completions and completion.finish_reason == "length" else reward
            for reward, completion in zip(rewards, completions, strict=True)
        ]
        enough = sum(value is not None for value in group) >= 2
        totals.append(group if enough else [None for _ in group])
    return totals


def zero_variance_groups(
    scored: ScoredRollouts,
    *,
    multi_objective_aggregation: str = "sum_then_normalize",
    mask_truncated_completions: bool = False,
    scale_rewards: str | None = None,
    reward_range: tuple[float, float] | None = None,
) -> list[Cause | None]:
    """[P] why a group teaches nothing about its prompt (no two valid rewards differ), or None where they do.

    First match: all_truncated (every completion cut off), all_invalid (fewer than two valid), all_right (the common
    total is the top of the range), all_wrong (its bottom), other. The range of totals is `reward_range` (what the
    rewards declare), else that of this step's valid totals; a range of one value counts as right when it is
    positive. With normalize_then_sum the values compared are the sums of the normalised functions, so a group whose
    functions differ but cancel out in the total is not of zero variance. `scale_rewards` changes nothing here.
    """
    totals = valid_totals(scored, mask_truncated_completions)
    compared = totals
    if multi_objective_aggregation == "normalize_then_sum":
        compared = _normalized_sums(scored, mask_truncated_completions)
    low, high = reward_range or _range(totals)
    return [
        None if _differs(values) else _cause(group, [c.finish_reason == "length" for c in completions], low, high)
        for values, group, completions in zip(compared, totals, scored.rollouts.completions, strict=True)
    ]


def _cause(group: Group, truncated: Sequence[bool], low: float, high: float) -> Cause:
    values = _numbers([group])
    if truncated and all(truncated):
        return "all_truncated"
    if not values:
        return "all_invalid"
    value = round(fsum(values) / len(values), DIGITS)
    if round(low, DIGITS) == round(high, DIGITS) == value:
        return "all_right" if value > 0 else "all_wrong"
    if value >= round(high, DIGITS):
        return "all_right"
    return "all_wrong" if value <= round(low, DIGITS) else "other"


def _range(totals: Sequence[Group]) -> tuple[float, float]:
    values = _numbers(totals)
    return (min(values), max(values)) if values else (0.0, 0.0)


def _numbers(groups: Sequence[Sequence[float | None]]) -> list[float]:
    return [value for group in groups for value in group if value is not None]


def _map(group: Sequence[float | None], function: Callable[[float], float]) -> Group:
    return [None if value is None else function(value) for value in group]


def _differs(group: Sequence[float | None]) -> bool:
    values = _numbers([group])
    return bool(values) and round(max(values), DIGITS) != round(min(values), DIGITS)


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return sqrt(fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _centered(group: Group) -> Group:
    if not _differs(group):
        return _map(group, lambda value: 0.0)
    mean = _mean(_numbers([group]))
    return _map(group, lambda value: value - mean)


def _scaled(group: Group, kind: str, step_std: float) -> Group:
    """R − mean_g, divided as `kind` says; exactly 0 in a group of zero variance."""
    values = _numbers([group])
    if not _differs(group):
        return _map(group, lambda value: 0.0)
    scale = {
        "none": 1.0,
        "group": 1 / (_std(values) + EPSILON),
        "batch": 1 / (step_std + EPSILON),
        "leave_one_out": len(values) / (len(values) - 1),
    }[kind]
    return _map(_centered(group), lambda value: value * scale)


def _penalized(totals: list[Group], penalty: Sequence[Sequence[float]] | None) -> list[Group]:
    if penalty is None:
        return totals
    return [
        [None if value is None else value - cost for value, cost in zip(group, costs, strict=True)]
        for group, costs in zip(totals, penalty, strict=True)
    ]


def _normalized_sums(scored: ScoredRollouts, mask_truncated_completions: bool) -> list[Group]:
    """[P][G] Σ_k w_k·(reward_k − mean_g)/(std_g + 1e-4); a function that is constant or None there adds nothing."""
    sums: list[Group] = [_map(group, lambda value: 0.0) for group in valid_totals(scored, mask_truncated_completions)]
    for name, parts in scored.parts.items():
        weight = scored.weights.get(name, 1.0)
        for total, part in zip(sums, parts, strict=True):
            inside = [None if outside is None else value for outside, value in zip(total, part, strict=True)]
            for place, value in enumerate(_scaled(inside, "group", 0.0)):
                if value is not None:
                    total[place] = (total[place] or 0.0) + weight * value
    return [group if _differs(group) else _map(group, lambda value: 0.0) for group in sums]


def _whitened(scored: ScoredRollouts, rewards: list[Group]) -> list[Group]:
    """(R − mean)/(std + 1e-8) over all loss tokens of the step: each completion counts once per token."""
    if not _differs(_numbers(rewards)):
        return [_map(group, lambda value: 0.0) for group in rewards]
    counts = [[len(completion.token_ids) for completion in group] for group in scored.rollouts.completions]
    pairs = [
        (value, count)
        for group, lengths in zip(rewards, counts, strict=True)
        for value, count in zip(group, lengths, strict=True)
        if value is not None
    ]
    tokens = sum(count for _, count in pairs)
    mean = fsum(value * count for value, count in pairs) / max(1, tokens)
    variance = fsum((value - mean) ** 2 * count for value, count in pairs) / max(1, tokens - 1)
    return [_map(group, lambda value: (value - mean) / (sqrt(variance) + WHITEN_EPSILON)) for group in rewards]
