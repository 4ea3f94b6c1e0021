"""Objectives: pure functions, each a combination of independent choices (advantage, surrogate, denominator, KL, …).

    advantages = group_advantages(scored, recipe="dapo")                       # lists of floats, no torch
    loss, metrics = policy_loss("dapo", logprobs, advantages, cu_seqlens, …)   # plain torch

Importing this package or `recipes` does not import torch: what needs it is loaded when it is first named.
Left out: where log-probs come from (grpo/kernels) and the loop over bins (grpo/trainer).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grpo.algorithm.advantages import baselined_rewards, group_advantages, zero_variance_groups
from grpo.algorithm.recipes import (
    ADVANTAGE_KNOBS,
    KNOBS,
    LOSS_KNOBS,
    RECIPES,
    Recipe,
    check_objective,
    resolve,
)

if TYPE_CHECKING:
    from grpo.algorithm.metrics import add_metrics, combine_metrics, public_metrics
    from grpo.algorithm.objective import policy_loss
    from grpo.algorithm.shaping import entropy_quantile, soft_overlong, token_returns, whitened_returns

_TORCH_SIDE = {
    "policy_loss": "objective",
    "add_metrics": "metrics",
    "combine_metrics": "metrics",
    "public_metrics": "metrics",
    "entropy_quantile": "shaping",
    "soft_overlong": "shaping",
    "token_returns": "shaping",
    "whitened_returns": "shaping",
}

__all__ = [
    "policy_loss",
    "group_advantages",
    "zero_variance_groups",
    "baselined_rewards",
    "whitened_returns",
    "token_returns",
    "soft_overlong",
    "entropy_quantile",
    "combine_metrics",
    "add_metrics",
    "public_metrics",
    "RECIPES",
    "Recipe",
    "KNOBS",
    "LOSS_KNOBS",
    "ADVANTAGE_KNOBS",
    "check_objective",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in _TORCH_SIDE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_TORCH_SIDE[name]}"), name)
