"""Rollouts → rewards: every function on every completion, faults kept apart from values, weighted totals, metrics.

    total_i = Σ_k w_k · r_ki    over the functions that apply (r_ki is not None), in float64

Three things never mix. None: the function does not apply, the sum runs over the others. A fault (exception, NaN, ±inf,
|r| > 1e6, a wrong type or length): with `on_error: raise` the run ends in one line; with `none` the whole completion
has no reward, whatever the other functions say, and it is never 0. A completion that the engine did not finish (abort,
error) is shown to no function and has no reward. A completion without a reward leaves loss and baseline.
A function may have its own `on_error`, and its own place to run (reward_placement.py).
Left out: sandboxes for code that a model wrote.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import fsum, sqrt
from typing import Any, Literal

from grpo.batch import Rollouts, ScoredRollouts
from grpo.reward_calls import Calls, Sample, TrainerState, Value
from grpo.reward_isolation import Fault, RewardWarning, preserved_generators, warn_once
from grpo.reward_loading import check_columns, load_reward_states, load_rewards, reward_states
from grpo.reward_placement import placement_lines
from grpo.reward_pool import close_pools
from grpo.reward_spec import Reward, RewardError, RewardSpec

__all__ = [
    "score",
    "Reward",
    "RewardSpec",
    "RewardError",
    "RewardWarning",
    "FaultBudget",
    "load_rewards",
    "check_columns",
    "reward_states",
    "load_reward_states",
    "placement_lines",
    "close_pools",
    "merge_scored",
    "select_groups",
]

FAULT_COLUMN = "fault"
Grid = list[list[float | None]]  # [P][G]


def score(
    rollouts: Rollouts,
    rewards: Sequence[Reward],
    *,
    step: int,
    max_steps: int,
    epoch: float = 0.0,
    on_error: Literal["raise", "none"] = "raise",
    seed: int = 0,
) -> ScoredRollouts:
    """Call every function on every completion and sum up.

    Functions run one after another (those in processes several calls at a time), async ones together at the end. Each
    call draws from global generators that start
    at a function of (seed, reward, step, prompt, generation) and are put back afterwards: a reward that draws or
    reseeds is repeatable and disturbs nothing. (Async calls share one start per step.)

    Args:
        rollouts: [P][G] completions.
        rewards: from `load_rewards`.
        step: the optimizer step that these rollouts are for, from 1; `trainer_state.global_step` is the number of
            steps done, step − 1, as in TRL.
        max_steps, epoch: for `trainer_state`.
        on_error: what a fault does, where the function says nothing itself.
        seed: of the run.

    Returns:
        rewards and parts [P][G] (float64 or None); in `columns` what functions logged, as `<reward>/<name>`, and
        `fault` with the cause where there was one; in `metrics` the keys of REWARDS.md section 10 as far as they have
        values: a mean over nothing, or a std (n − 1) over one value, is left out.

    Raises:
        RewardError: a fault under "raise"; one line with function, cause, step, prompt and generation.
    """
    flat = [
        Sample(prompt, completion, generation)
        for prompt, group in zip(rollouts.prompts, rollouts.completions, strict=True)
        for generation, completion in enumerate(group)
    ]
    finished = [place for place, sample in enumerate(flat) if sample.completion.finish_reason in ("stop", "length")]
    calls = Calls(
        [flat[place] for place in finished], step, TrainerState(max(step - 1, 0), max_steps, epoch), on_error, seed
    )
    if finished:
        with preserved_generators(), calls.closing():
            for reward in rewards:
                calls.call(reward)
            calls.await_all()
    return _assembled(rollouts, rewards, calls, finished)


# --- from outcomes to ScoredRollouts -------------------------------------------------------------------------


def _assembled(rollouts: Rollouts, rewards: Sequence[Reward], calls: Calls, finished: Sequence[int]) -> ScoredRollouts:
    sizes = [len(group) for group in rollouts.completions]

    def placed(values: Sequence[Any]) -> list[list[Any]]:
        """Values of the finished completions as [P][G], None for the others."""
        by_place = dict(zip(finished, values, strict=True))
        source = (by_place.get(place) for place in range(sum(sizes)))
        return [[next(source) for _ in range(size)] for size in sizes]

    rows = range(len(finished))
    totals = placed([None if row in calls.faults else _total(rewards, calls.values, row) for row in rows])
    parts = {
        name: placed([None if isinstance(value, Fault) else value for value in values])
        for name, values in calls.values.items()
    } or {reward.name: placed([]) for reward in rewards}
    columns = {
        f"{name}/{column}": placed(values) for name, log in calls.logs.items() for column, values in log.columns.items()
    }
    if calls.faults:
        columns[FAULT_COLUMN] = placed([calls.faults.get(row) for row in rows])
    metrics = _value_metrics(totals, parts) | _outcome_metrics(rewards, calls, sum(sizes))
    scored = ScoredRollouts(rollouts, totals, parts, {r.name: r.weight for r in rewards}, columns, metrics)
    metrics["rewards/none_mixed_frac"] = _none_mixed(rewards, scored, calls.step)
    return scored


def _total(rewards: Sequence[Reward], values: Mapping[str, Sequence[Value]], row: int) -> float | None:
    """Σ w·r over the functions with a number; None when no function with a weight has one."""
    terms = []
    for reward in rewards:
        value = values[reward.name][row]
        if isinstance(value, float) and reward.weight:
            terms.append(reward.weight * value)
    return fsum(terms) if terms else None


def range_of_totals(rewards: Sequence[Reward], soft_overlong: bool = False) -> tuple[float, float] | None:
    """(lowest, highest) total of one completion that has all values, by the ranges that the rewards declare; None where
    one with a weight declares none. `soft_overlong`: that penalty, −1 to 0, is added."""
    ends = []
    for reward in rewards:
        if not reward.weight:
            continue
        if reward.range is None:
            return None
        ends.append(sorted(reward.weight * value for value in reward.range))
    return fsum(low for low, _ in ends) - soft_overlong, fsum(high for _, high in ends)


def _outcome_metrics(rewards: Sequence[Reward], calls: Calls, num_completions: int) -> dict[str, float]:
    """Shares of None, faults and completions without a reward, and what the functions logged."""
    called = max(len(calls.samples), 1)
    unscored = [
        row not in calls.faults and _total(rewards, calls.values, row) is None for row in range(len(calls.samples))
    ]
    if any(unscored):
        sample = calls.samples[unscored.index(True)]
        warn_once(
            rewards[0],
            "unscored",
            f"no function applies to prompt {sample.prompt.id} (all returned None); such completions leave the loss",
            label="rewards",
        )
    aborted = num_completions - len(calls.samples)
    metrics = {
        "rewards/invalid_frac": (len(calls.faults) + aborted) / max(num_completions, 1),
        "rewards/unscored_frac": sum(unscored) / max(num_completions, 1),
    }
    for name, values in calls.values.items():
        log = calls.logs[name]
        metrics[f"rewards/{name}/none_frac"] = sum(value is None for value in values) / called
        faults = [value for value in values if isinstance(value, Fault)]
        metrics[f"rewards/{name}/error_frac"] = len(faults) / called  # timeouts among them
        metrics[f"rewards/{name}/timeout_frac"] = sum(fault.timed_out for fault in faults) / called
        if seconds := sorted(calls.seconds[name]):
            metrics[f"rewards/{name}/p50_s"] = _percentile(seconds, 50)
            metrics[f"rewards/{name}/p99_s"] = _percentile(seconds, 99)
        metrics |= {f"rewards/{name}/metric/{key}": fsum(logged) / len(logged) for key, logged in log.metrics.items()}
        if log.num_dropped:
            metrics[f"rewards/{name}/dropped_metrics"] = float(log.num_dropped)
    return metrics


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` % of the values do not exceed (nearest rank)."""
    return ordered[max(-(-percent * len(ordered) // 100), 1) - 1]


def _value_metrics(totals: Grid, parts: Mapping[str, Grid]) -> dict[str, float]:
    """Means and stds: of the totals, of each function over the step, and of each function inside the groups."""
    metrics = _described("reward", "reward_std", _numbers(chain.from_iterable(totals)))
    for name, part in parts.items():
        prefix = f"rewards/{name}/"
        metrics |= _described(prefix + "mean", prefix + "std", _numbers(chain.from_iterable(part)))
        inside = [_std(numbers) for group in part if len(numbers := _numbers(group)) > 1]
        if inside:
            metrics[prefix + "in_group_std"] = fsum(inside) / len(inside)
    return metrics


def _none_mixed(rewards: Sequence[Reward], scored: ScoredRollouts, step: int) -> float:
    """Share of groups in which a function gave None to some valid completions and numbers to others."""
    mixed = [False] * len(scored.rewards)
    for reward in rewards:
        for p, (part, totals) in enumerate(zip(scored.parts[reward.name], scored.rewards, strict=True)):
            kinds = {value is None for value, total in zip(part, totals, strict=True) if total is not None}
            if reward.weight and len(kinds) == 2:
                mixed[p] = True
                prompt = scored.rollouts.prompts[p].id
                warn_once(
                    reward,
                    "mixed",
                    f"None for some completions of prompt {prompt} and numbers for others: totals on different "
                    f"scales are compared (step {step})",
                )
    return sum(mixed) / max(len(mixed), 1)


def _numbers(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def _described(mean: str, std: str, values: Sequence[float]) -> dict[str, float]:
    found = {mean: fsum(values) / len(values)} if values else {}
    return found | ({std: _std(values)} if len(values) > 1 else {})


def _std(values: Sequence[float]) -> float:
    """Standard deviation with n − 1; exactly 0 for equal values, whose mean may be off by rounding."""
    if min(values) == max(values):
        return 0.0
    mean = fsum(values) / len(values)
    return sqrt(fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


# --- several batches of one step -----------------------------------------------------------------------------


def merge_scored(batches: Sequence[ScoredRollouts]) -> ScoredRollouts:
    """Batches of one step (refill rounds) as one: groups in order, statistics over all, shares weighted by size, of
    latencies the largest.

    `policy_version` is that of the first.
    """
    first = batches[0]
    sizes = [sum(len(group) for group in batch.rewards) for batch in batches]
    columns = {
        name: [
            row
            for batch in batches
            for row in batch.columns.get(name) or [[None] * len(group) for group in batch.rewards]
        ]
        for name in dict.fromkeys(chain.from_iterable(batch.columns for batch in batches))
    }
    totals = [group for batch in batches for group in batch.rewards]
    parts = {name: [group for batch in batches for group in batch.parts[name]] for name in first.parts}
    rollouts = replace(
        first.rollouts,
        prompts=[prompt for batch in batches for prompt in batch.rollouts.prompts],
        completions=[group for batch in batches for group in batch.rollouts.completions],
    )
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(chain.from_iterable(batch.metrics for batch in batches)):
        known = [
            (batch.metrics[name], size) for batch, size in zip(batches, sizes, strict=True) if name in batch.metrics
        ]
        total = fsum(value * size for value, size in known)
        if name.endswith("/dropped_metrics"):
            metrics[name] = fsum(value for value, _ in known)
        elif name.endswith(("/p50_s", "/p99_s")):  # a percentile of all is not to be had from those of parts
            metrics[name] = max(value for value, _ in known)
        else:
            metrics[name] = total / max(sum(size for _, size in known), 1)
    return ScoredRollouts(rollouts, totals, parts, first.weights, columns, metrics | _value_metrics(totals, parts))


def select_groups(scored: ScoredRollouts, groups: Sequence[int]) -> ScoredRollouts:
    """The groups at these places, in this order. `metrics` stay those of everything that was sampled."""

    def picked(grid: Sequence[Any]) -> list[Any]:
        return [grid[group] for group in groups]

    rollouts = replace(
        scored.rollouts, prompts=picked(scored.rollouts.prompts), completions=picked(scored.rollouts.completions)
    )
    return replace(
        scored,
        rollouts=rollouts,
        rewards=picked(scored.rewards),
        parts={name: picked(part) for name, part in scored.parts.items()},
        columns={name: picked(column) for name, column in scored.columns.items()},
    )


# --- when faults are too many --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Limits:
    window: int = 512
    invalid_share: float = 0.05
    steps_without_group: int = 10


class FaultBudget:
    """Ends a run whose rewards keep failing: more than 5 % of 512 completions (25) invalid among the last 512, or 10
    steps in a row without a group of two valid rewards. A completion to which no function applies is not a fault.
    """

    limits = _Limits()

    def __init__(self) -> None:
        self._invalid: deque[bool] = deque(maxlen=self.limits.window)
        self._steps_without_group = 0
        self._last = "every completion was without a reward"

    def check(self, scored: ScoredRollouts) -> None:
        """Count one step. Raises `RewardError` when it exceeds the budget, naming the last fault."""
        has_group = False
        for p, (prompt, group) in enumerate(zip(scored.rollouts.prompts, scored.rewards, strict=True)):
            has_group = has_group or len(_numbers(group)) >= 2
            for g, completion in enumerate(scored.rollouts.completions[p]):
                cause = self._cause(scored, p, g, completion.finish_reason)
                self._invalid.append(cause is not None)
                if cause is not None:
                    self._last = f"{cause} (prompt {prompt.id}, generation {g})"
        self._steps_without_group = 0 if has_group else self._steps_without_group + 1
        invalid = sum(self._invalid)
        if invalid > self.limits.invalid_share * self.limits.window:
            raise RewardError(
                f"rewards: {invalid} of the last {len(self._invalid)} completions are invalid "
                f"(want at most {self.limits.invalid_share:.0%} of {self.limits.window}); the last: {self._last}"
            )
        if self._steps_without_group >= self.limits.steps_without_group:
            raise RewardError(
                f"rewards: {self._steps_without_group} steps in a row had no group with two valid rewards; "
                f"the last: {self._last}"
            )

    @staticmethod
    def _cause(scored: ScoredRollouts, p: int, g: int, finish_reason: str) -> str | None:
        if finish_reason not in ("stop", "length"):
            return f"the engine ended it with {finish_reason!r}"
        column = scored.columns.get(FAULT_COLUMN)
        return None if column is None else column[p][g]

    def state_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {
            "invalid": "".join("1" if invalid else "0" for invalid in self._invalid),
            "steps_without_group": self._steps_without_group,
            "last": self._last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._invalid = deque((flag == "1" for flag in state["invalid"]), maxlen=self.limits.window)
        self._steps_without_group = state["steps_without_group"]
        self._last = state["last"]
