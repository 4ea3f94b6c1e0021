"""The table of recipes and the table of knobs. A recipe is a row of choices; nothing branches on its name.

    loss = Σ_it w_it · ρ_it · surrogate(r_it, A_it)  +  β · Σ_it w_it · KL_it  −  c · mean H

The choices name functions of advantages.py, surrogates.py, denominators.py, kl.py and corrections.py.
Left out: torch, so that a configuration can be checked before it is imported; and checks that need tensors, which
`policy_loss` makes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, get_args

Advantage = Literal["group", "batch", "none", "leave_one_out", "whitened", "whitened_baseline"]
Surrogate = Literal["clip", "cispo", "sapo"]
Denominator = Literal["sequence_mean", "token_mean", "constant", "sequence_sum", "sequence", "prompt_mean"]
RatioLevel = Literal["token", "sequence", "sequence_sum"]
KLEstimator = Literal["k1", "k2", "k3", "k3_ratio"]
Correction = Literal["none", "truncate", "mask", "bypass"]
CorrectionLevel = Literal["token", "sequence_mean", "sequence_sum"]
Scaling = Literal["none", "group", "batch"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
ZeroVariance = Literal["skip", "drop", "refill", "keep"]


@dataclass(frozen=True)
class Recipe:
    """One row: advantage, surrogate, denominator, level of the ratio; own defaults of knobs, paper, formula."""

    advantage: Advantage
    surrogate: Surrogate
    denominator: Denominator
    importance_sampling_level: RatioLevel
    paper: str
    formula: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


_CLIP = "−min(r·A, clip(r, 1−ε, 1+ε_high)·A)"
_GSPO = "s_i = exp(Σ_t (ℓ−ℓ_old)/n_i); −min(s_i·A_i, clip(s_i, 1−ε, 1+ε_high)·A_i)"
_WHITE = "U_it = R_i − β·Σ_{s≥t} k1_is; A = (U − mean)/(std + 1e-8) over the step's tokens"
_GSPO_CLIP = {"epsilon": 3e-4, "epsilon_high": 4e-4}
_KL_IN_REWARD = {"kl": "k1", "kl_in": "reward"}

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "grpo": Recipe(
            "group", "clip", "sequence_mean", "token",
            "arXiv 2402.03300", f"A = (R − mean_g)/(std_g + 1e-4); Σ_i 1/(N_seq·n_i) Σ_t {_CLIP}",
        ),
        "bnpo": Recipe(
            "group", "clip", "token_mean", "token",
            "TRL", f"as grpo, over 1/N_tok of the whole step: 1/N_tok Σ_it {_CLIP}",
        ),
        "dr_grpo": Recipe(
            "none", "clip", "constant", "token",
            "arXiv 2503.20783", f"A = R − mean_g; 1/(N_seq·L_max) Σ_it {_CLIP}",
        ),
        "dapo": Recipe(
            "group", "clip", "token_mean", "token",
            "arXiv 2503.14476", f"1/N_tok Σ_it {_CLIP}, ε_high > ε (clip-higher)",
        ),
        "gspo": Recipe(
            "group", "clip", "sequence_mean", "sequence",
            "arXiv 2507.18071", f"{_GSPO}, Σ_i 1/N_seq", _GSPO_CLIP,
        ),
        "luspo": Recipe(
            "group", "clip", "sequence_sum", "sequence",
            "arXiv 2602.05261", f"{_GSPO}, Σ_i n_i/N_seq", _GSPO_CLIP,
        ),
        "cispo": Recipe(
            "group", "cispo", "token_mean", "token",
            "arXiv 2506.13585, 2510.13786", "1/N_tok Σ_it −sg(min(r, ε_high))·A·ℓ", {"epsilon_high": 5.0},
        ),
        "sapo": Recipe(
            "group", "sapo", "sequence_mean", "token",
            "arXiv 2511.20347", "Σ_i 1/(N_seq·n_i) Σ_t −(4/τ)·σ(τ(r−1))·A, τ by the sign of A",
        ),
        "rloo": Recipe(
            "leave_one_out", "clip", "sequence", "sequence_sum",
            "arXiv 2402.14740", "A_i = R_i − mean of the others; s_i = exp(Σ_t (ℓ−ℓ_old)); 1/N_seq Σ_i clipped s_i·A_i",
        ),
        "reinforce_pp": Recipe(
            "whitened", "clip", "token_mean", "token",
            "arXiv 2501.03262", f"{_WHITE}; 1/N_tok Σ_it {_CLIP}", _KL_IN_REWARD,
        ),
        "reinforce_pp_baseline": Recipe(
            "whitened_baseline", "clip", "token_mean", "token",
            "arXiv 2501.03262", f"as reinforce_pp with R_i − mean_g for R_i; {_WHITE}", _KL_IN_REWARD,
        ),
    }
)  # fmt: skip


@dataclass(frozen=True)
class AdvantageKnobs:
    """Knobs of `group_advantages` and `zero_variance_groups`."""

    scale_rewards: Scaling = "none"  # what R − mean_g is divided by; acts on group | batch | none recipes
    multi_objective_aggregation: Aggregation = "sum_then_normalize"
    mask_truncated_completions: bool = False  # finish_reason "length" leaves loss and baseline


@dataclass(frozen=True)
class LossKnobs:
    """Knobs of `policy_loss`. None: off, or (where said) the recipe's own."""

    beta: float = 0.0  # weight of the KL to the reference
    kl: KLEstimator = "k3_ratio"
    kl_in: Literal["loss", "reward"] = "loss"
    epsilon: float = 0.2  # the ratio is clipped below 1 − epsilon
    epsilon_high: float = 0.28  # … above 1 + epsilon_high; cispo: the cap itself
    delta: float | None = 3.0  # dual clip: bound of the ratio where A < 0; None = off
    importance_sampling_level: RatioLevel | None = None  # None = the recipe's own
    denominator: Denominator | None = None  # None = the recipe's own
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    sampler_correction: Correction = "truncate"  # acts only where sampler log-probs are given
    correction_level: CorrectionLevel = "token"
    correction_max: float | None = None  # None = CORRECTION_BANDS by level
    correction_min: float | None = None  # mask only; None = CORRECTION_BANDS by level
    off_policy_mask_threshold: float | None = None  # drop A < 0 with mean(ℓ_smp − ℓ) above this
    top_entropy_quantile: float = 1.0  # train on this share of tokens, the highest in entropy
    entropy_coef: float = 0.0  # weight of the entropy bonus


@dataclass(frozen=True)
class LoopKnobs:
    """Knobs of the objective that the trainer's loop carries out."""

    num_iterations: int = 1
    zero_variance: ZeroVariance = "skip"
    max_refill_rounds: int = 3


CORRECTION_BANDS: Mapping[str, tuple[float, float]] = {
    "token": (0.0, 2.0),
    "sequence_mean": (0.99, 1.01),
    "sequence_sum": (0.0, 3.0),
}  # level: (correction_min, correction_max). Sum and mean need different thresholds.


def _defaults(*groups: type) -> dict[str, Any]:
    return {entry.name: entry.default for group in groups for entry in fields(group)}


ADVANTAGE_KNOBS = tuple(_defaults(AdvantageKnobs))
LOSS_KNOBS = tuple(_defaults(LossKnobs))
KNOBS: Mapping[str, Any] = MappingProxyType(_defaults(AdvantageKnobs, LossKnobs, LoopKnobs))
"""Every objective knob with its shipped default (a recipe's `defaults` come before these)."""

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "scale_rewards": get_args(Scaling),
    "multi_objective_aggregation": get_args(Aggregation),
    "mask_truncated_completions": (False, True),
    "kl": get_args(KLEstimator),
    "kl_in": ("loss", "reward"),
    "importance_sampling_level": (None, *get_args(RatioLevel)),
    "denominator": (None, *get_args(Denominator)),
    "sampler_correction": get_args(Correction),
    "correction_level": get_args(CorrectionLevel),
    "zero_variance": get_args(ZeroVariance),
}

_NUMBERS: Mapping[str, tuple[float, bool, float]] = {  # name: (low, low allowed, high)
    "beta": (0, True, float("inf")),
    "epsilon": (0, False, 1),
    "epsilon_high": (0, False, float("inf")),
    "delta": (0, False, float("inf")),
    "sapo_temperature_pos": (0, False, float("inf")),
    "sapo_temperature_neg": (0, False, float("inf")),
    "correction_max": (0, False, float("inf")),
    "correction_min": (0, True, float("inf")),
    "off_policy_mask_threshold": (0, True, float("inf")),
    "top_entropy_quantile": (0, False, 1),
    "entropy_coef": (float("-inf"), False, float("inf")),
    "num_iterations": (1, True, float("inf")),
    "max_refill_rounds": (1, True, float("inf")),
}


def nearest(name: object, known: Iterable[str]) -> str:
    """The known name that is spelled most like `name`."""
    return difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)[0]


def resolve(recipe: str, knobs: Mapping[str, Any]) -> tuple[Recipe, LossKnobs]:
    """The recipe's row and the loss knobs in force: given ones, else the recipe's own, else the shipped defaults.

    Raises:
        ValueError: an unknown recipe or knob (names the nearest), a value out of range, a contradiction; one line each.
    """
    if lines := check_objective(recipe, **knobs):
        raise ValueError("\n".join(lines))
    row = RECIPES[recipe]
    given = {**row.defaults, **knobs}
    return row, LossKnobs(**{name: value for name, value in given.items() if name in LOSS_KNOBS})


def check_objective(recipe: str, *, entropy_gradient: bool = True, **knobs: Any) -> list[str]:
    """Everything that is wrong with a recipe and its knobs, one line each; empty when they agree.

    `entropy_gradient`: whether the entropies that will reach the loss carry a gradient.
    """
    if not isinstance(recipe, str) or recipe not in RECIPES:
        return [f"objective.recipe is {recipe!r} (did you mean {nearest(recipe, RECIPES)}?)"]
    lines = [
        f"objective.{name} is unknown (did you mean {nearest(name, KNOBS)}?)" for name in knobs if name not in KNOBS
    ]
    for name, value in knobs.items():
        if name in KNOBS and (want := _wanted(name, value)):
            lines.append(f"objective.{name} is {_shown(value)} (want {want})")
    if lines:
        return lines
    row = RECIPES[recipe]
    values = {**KNOBS, **row.defaults, **knobs}
    return [
        line for check in (_ratio_lines, _kl_lines, _correction_lines, _advantage_lines) for line in check(row, values)
    ] + _entropy_lines(values, entropy_gradient)


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _wanted(name: str, value: Any) -> str | None:
    """What a knob wants when `value` alone is impossible, else None."""
    if name not in CHOICES:
        return _wanted_number(name, value)
    if value in CHOICES[name] and isinstance(value, type(CHOICES[name][-1]) | None):
        return None
    return "one of " + ", ".join(_shown(choice) for choice in CHOICES[name])


def _wanted_number(name: str, value: Any) -> str | None:
    low, low_allowed, high = _NUMBERS[name]
    if value is None and (KNOBS[name] is None or name == "delta"):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        return "a finite number"
    if (low <= value if low_allowed else low < value) and value <= high:
        return None
    return f"{'at least' if low_allowed else 'more than'} {low:g}" + (
        f", at most {high:g}" if high < float("inf") else ""
    )


def _ratio_lines(row: Recipe, values: Mapping[str, Any]) -> list[str]:
    lines = []
    high, delta = values["epsilon_high"], values["delta"]
    if row.surrogate == "cispo" and high < 1:
        lines.append(
            f"objective.epsilon_high is {high:g} (want at least 1: cispo caps the ratio itself there, usually at 5)"
        )
    if row.surrogate == "clip" and delta is not None and delta <= 1 + high:
        lines.append(f"objective.delta is {delta:g} (want more than 1 + epsilon_high = {1 + high:g}, or null)")
    level = values["importance_sampling_level"] or row.importance_sampling_level
    if (values["denominator"] or row.denominator) == "sequence" and level == "token":
        lines.append(
            "objective.importance_sampling_level is token (want sequence or sequence_sum with denominator sequence, "
            "which counts one term per completion; for token terms want denominator sequence_sum)"
        )
    return lines


def _kl_lines(row: Recipe, values: Mapping[str, Any]) -> list[str]:
    if values["beta"] == 0:
        return []
    if values["kl"] == "k1" and values["kl_in"] == "loss":
        return ["objective.kl is k1 (want k3_ratio or k2: in the loss k1 has no gradient on average; or kl_in: reward)"]
    if values["kl"] != "k1" and values["kl_in"] == "reward":
        return [f"objective.kl is {values['kl']} (want k1 with kl_in: reward, whose gradient is that of the KL)"]
    return []


def _correction_lines(row: Recipe, values: Mapping[str, Any]) -> list[str]:
    kind, level = values["sampler_correction"], values["correction_level"]
    low, high = correction_band(level, values["correction_min"], values["correction_max"])
    lines = []
    if kind in ("truncate", "mask") and high < 1:
        lines.append(
            f"objective.correction_max is {high:g} (want at least 1, the weight where sampler and policy agree)"
        )
    if kind == "mask" and low > 1:
        lines.append(f"objective.correction_min is {low:g} (want at most 1, the weight where sampler and policy agree)")
    if kind == "truncate" and values["correction_min"]:
        lines.append(
            f"objective.correction_min is {low:g} (want null or 0 with truncate, which has no lower end; or mask)"
        )
    return lines


def _advantage_lines(row: Recipe, values: Mapping[str, Any]) -> list[str]:
    if values["multi_objective_aggregation"] == "normalize_then_sum" and row.advantage not in get_args(Scaling):
        return [
            "objective.multi_objective_aggregation is normalize_then_sum (want sum_then_normalize with the advantage "
            f"{row.advantage}, which normalises in its own way)"
        ]
    return []


def _entropy_lines(values: Mapping[str, Any], entropy_gradient: bool) -> list[str]:
    if values["entropy_coef"] != 0 and not entropy_gradient:
        return [f"objective.entropy_coef is {values['entropy_coef']:g} (want entropies with a gradient, or 0)"]
    return []


def correction_band(level: str, low: float | None, high: float | None) -> tuple[float, float]:
    """The band [C_min, C_max] in force: what is given, else the level's own."""
    own_low, own_high = CORRECTION_BANDS[level]
    return (own_low if low is None else low), (own_high if high is None else high)
