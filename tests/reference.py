"""Slow, obvious float64 loops that the tests compare with: objectives with gradients by hand, advantages, quantiles.

Plain Python floats and `math`; nothing here is shared with `grpo`, and no gradient comes from autograd.
A completion is a dict of lists, one entry per token; see `Row`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Row:
    """One completion. `old` None: the policy's own log-probs, held constant. Masked places may hold anything."""

    logprobs: list[float]
    advantages: list[float]
    mask: list[bool]
    old: list[float] | None = None
    reference: list[float] | None = None
    sampler: list[float] | None = None
    entropy: list[float] | None = None
    group_tokens: int = 0

    @property
    def inside(self) -> list[int]:
        return [t for t, m in enumerate(self.mask) if m]


@dataclass
class Choices:
    """An objective, spelled out."""

    surrogate: str
    denominator: str
    level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    delta: float | None = None
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    beta: float = 0.0
    kl: str = "k3_ratio"
    correction: str = "none"
    correction_level: str = "token"
    low: float = 0.0
    high: float = 2.0
    off_policy: float | None = None
    entropy_threshold: float | None = None
    entropy_coef: float = 0.0
    entropy_count: int = 1
    max_completion_length: int = 1


# the rows of the table in the papers, written down once more
RECIPES = {
    "grpo": Choices("clip", "sequence_mean"),
    "bnpo": Choices("clip", "token_mean"),
    "dr_grpo": Choices("clip", "constant"),
    "dapo": Choices("clip", "token_mean"),
    "gspo": Choices("clip", "sequence_mean", "sequence", 3e-4, 4e-4),
    "luspo": Choices("clip", "sequence_sum", "sequence", 3e-4, 4e-4),
    "cispo": Choices("cispo", "token_mean", epsilon_high=5.0),
    "sapo": Choices("sapo", "sequence_mean"),
    "rloo": Choices("clip", "sequence", "sequence_sum"),
    "reinforce_pp": Choices("clip", "token_mean", kl="k1"),
    "reinforce_pp_baseline": Choices("clip", "token_mean", kl="k1"),
}


@dataclass
class Result:
    """The loss, ∂loss/∂ℓ and ∂loss/∂H per row and token, and what the step counts about itself."""

    loss: float
    gradient: list[list[float]]
    entropy_gradient: list[list[float]]
    before_bonus: float
    kl: float = 0.0
    clipped_low: int = 0
    clipped_high: int = 0
    rho: list[float] = field(default_factory=list)


def objective(rows: list[Row], choices: Choices) -> Result:  # noqa: C901, PLR0912 (one loop, to be read downwards)
    """Σ w ρ surrogate + β Σ w KL − c·mean H over one step, token by token."""
    counts = [len(row.inside) for row in rows]
    num_tokens, num_sequences = max(1, sum(counts)), max(1, sum(n > 0 for n in counts))
    gradient = [[0.0] * len(row.mask) for row in rows]
    entropy_gradient = [[0.0] * len(row.mask) for row in rows]
    result = Result(0.0, gradient, entropy_gradient, 0.0)
    for i, row in enumerate(rows):
        n = counts[i]
        if n == 0:
            continue
        anchor = _anchor(row, choices)
        ratios = {t: math.exp(row.logprobs[t] - anchor[t]) for t in row.inside}
        mean_ratio = math.exp(sum(row.logprobs[t] - anchor[t] for t in row.inside) / n)
        sum_ratio = (
            math.exp(sum(row.logprobs[t] - anchor[t] for t in row.inside)) if choices.level == "sequence_sum" else 0.0
        )
        rho = _correction(row, choices)
        result.rho += [rho[t] for t in row.inside]
        for t in row.inside:
            a = row.advantages[t]
            w, w_token = _weights(choices, n, num_tokens, num_sequences, rows, row)
            keep = rho[t]
            if choices.entropy_threshold is not None and row.entropy[t] < choices.entropy_threshold:
                keep = 0.0
            if choices.off_policy is not None and a < 0 and _drift(row) > choices.off_policy:
                keep = 0.0
            r = {"token": ratios[t], "sequence": mean_ratio, "sequence_sum": sum_ratio}[choices.level]
            value, by_ratio, by_logprob = surrogate(choices, r, a, row.logprobs[t])
            result.loss += w * keep * value
            gradient[i][t] += w * keep * by_logprob
            if choices.level == "token":
                gradient[i][t] += w * keep * by_ratio * r
            else:  # the ratio of the completion moves with each of its tokens
                for s in row.inside:
                    gradient[i][s] += w * keep * by_ratio * r / (n if choices.level == "sequence" else 1)
            if choices.surrogate == "clip":
                result.clipped_low += r < 1 - choices.epsilon and a < 0
                result.clipped_high += r > 1 + choices.epsilon_high and a > 0
            if row.reference is not None:
                value, slope = kl(choices.kl, row.reference[t] - row.logprobs[t], ratios[t])
                result.kl += value / num_tokens
                result.loss += choices.beta * w_token * value
                gradient[i][t] += choices.beta * w_token * slope
    result.before_bonus = result.loss
    if choices.entropy_coef:
        for i, row in enumerate(rows):
            for t in row.inside:
                if choices.entropy_threshold is None or row.entropy[t] >= choices.entropy_threshold:
                    result.loss -= choices.entropy_coef * row.entropy[t] / choices.entropy_count
                    entropy_gradient[i][t] -= choices.entropy_coef / choices.entropy_count
    return result


def surrogate(choices: Choices, r: float, a: float, logprob: float) -> tuple[float, float, float]:
    """Value, derivative by the ratio, derivative by the log-prob itself."""
    if choices.surrogate == "clip":
        low, high, delta = 1 - choices.epsilon, 1 + choices.epsilon_high, choices.delta
        if a > 0:
            return (-high * a, 0.0, 0.0) if r > high else (-r * a, -a, 0.0)
        if r < low:
            return -low * a, 0.0, 0.0
        if delta is not None and r > delta:
            return -delta * a, 0.0, 0.0
        return -r * a, -a, 0.0
    if choices.surrogate == "cispo":
        weight = min(r, choices.epsilon_high)
        return -weight * a * logprob, 0.0, -weight * a
    if choices.surrogate == "sapo":
        tau = choices.tau_pos if a > 0 else choices.tau_neg
        gate = 1 / (1 + math.exp(-tau * (r - 1)))
        return -4 / tau * gate * a, -4 * gate * (1 - gate) * a, 0.0
    raise ValueError(choices.surrogate)


def kl(name: str, d: float, r: float) -> tuple[float, float]:
    """Value and derivative by the policy's log-prob (dd/dℓ = −1, dr/dℓ = r where r is in the graph)."""
    if name == "k1":
        return -d, 1.0
    if name == "k2":
        return r * d * d / 2, -r * d
    k3, slope = math.exp(d) - d - 1, -(math.exp(d) - 1)
    return (k3, slope) if name == "k3" else (r * k3, r * k3 + r * slope)


def _anchor(row: Row, choices: Choices) -> list[float]:
    old = row.logprobs if row.old is None else row.old
    if choices.correction != "bypass":
        return old
    return [s if math.isfinite(s) else o for s, o in zip(row.sampler, old, strict=True)]


def _weights(choices, n, num_tokens, num_sequences, rows, row):
    """(weight of the policy term at a token, weight of a term that has a value at each token)."""
    groups = len({id_ for id_ in (other.group_tokens for other in rows)})
    per_token = {
        "sequence_mean": 1 / (n * num_sequences),
        "token_mean": 1 / num_tokens,
        "constant": 1 / (num_sequences * choices.max_completion_length),
        "sequence_sum": 1 / num_sequences,
        "sequence": 1 / num_sequences,
        "prompt_mean": 1 / (groups * max(1, row.group_tokens)),
    }[choices.denominator]
    return (per_token / n if choices.denominator == "sequence" else per_token), per_token


def _correction(row: Row, choices: Choices) -> dict[int, float]:
    """Weight ρ of each loss token after truncation or masking."""
    if row.sampler is None or choices.correction in ("none", "bypass"):
        return dict.fromkeys(row.inside, 1.0)
    old = row.logprobs if row.old is None else row.old
    log_rho = {t: old[t] - row.sampler[t] if math.isfinite(row.sampler[t]) else 0.0 for t in row.inside}
    total = sum(log_rho.values())
    quantity = {
        "token": log_rho,
        "sequence_mean": dict.fromkeys(row.inside, total / len(row.inside)),
        "sequence_sum": dict.fromkeys(row.inside, total),
    }[choices.correction_level]
    weights = {}
    for t in row.inside:
        rho = math.exp(quantity[t])
        if choices.correction == "truncate":
            weights[t] = min(rho, choices.high)
        else:
            weights[t] = rho if choices.low <= rho <= choices.high else 0.0
    return weights


def _drift(row: Row) -> float:
    sampler = row.sampler or row.old or row.logprobs
    known = {t: sampler[t] - row.logprobs[t] for t in row.inside if math.isfinite(sampler[t])}
    return sum(known.values()) / len(row.inside)


# --- advantages ----------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def std(values: list[float]) -> float:
    center = mean(values)
    return math.sqrt(sum((value - center) ** 2 for value in values) / (len(values) - 1))


def advantages(kind: str, rewards: list[list[float | None]]) -> list[list[float | None]]:
    """none | group | batch | leave_one_out, for groups whose valid rewards differ."""
    groups = [[r for r in group if r is not None] for group in rewards]
    groups = [group if len(group) > 1 else [] for group in groups]
    everything = [r for group in groups for r in group]
    out = []
    for group, valid in zip(rewards, groups, strict=True):
        row: list[float | None] = []
        for place, r in enumerate(group):
            if r is None or not valid:
                row.append(None)
            elif kind == "none":
                row.append(r - mean(valid))
            elif kind == "group":
                row.append((r - mean(valid)) / (std(valid) + 1e-4))
            elif kind == "batch":
                row.append((r - mean(valid)) / (std(everything) + 1e-4))
            else:
                others = [v for j, v in enumerate(group) if v is not None and j != place]
                row.append(r - mean(others))
        out.append(row)
    return out


def normalize_then_sum(parts: list[list[list[float | None]]], weights: list[float]) -> list[list[float]]:
    """Every completion is valid here; a function's None is left out of its group's mean and std and of the sum."""
    sums = [[0.0] * len(group) for group in parts[0]]
    for part, weight in zip(parts, weights, strict=True):
        for g, group in enumerate(part):
            valid = [v for v in group if v is not None]
            for place, v in enumerate(group):
                if v is not None and len(valid) > 1 and max(valid) != min(valid):
                    sums[g][place] += weight * (v - mean(valid)) / (std(valid) + 1e-4)
    everything = [x for group in sums for x in group]
    return [[(x - mean(everything)) / (std(everything) + 1e-4) for x in group] for group in sums]


def whitened_token_returns(
    rewards: list[float], k1: list[list[float]], masks: list[list[bool]], beta: float
) -> list[list[float]]:
    """(U − mean)/(std + 1e-8), U_it = R_i − β·Σ_{s ≥ t} k1_is over loss tokens."""
    returns = [
        [reward - beta * sum(row[s] for s in range(t, len(row)) if mask[s]) for t in range(len(row))]
        for reward, row, mask in zip(rewards, k1, masks, strict=True)
    ]
    seen = [u for row, mask in zip(returns, masks, strict=True) for u, m in zip(row, mask, strict=True) if m]
    return [
        [(u - mean(seen)) / (std(seen) + 1e-8) if m else 0.0 for u, m in zip(row, mask, strict=True)]
        for row, mask in zip(returns, masks, strict=True)
    ]


def quantile(values: list[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place + 1e-9)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + max(0.0, place - below) * (ordered[above] - ordered[below])
