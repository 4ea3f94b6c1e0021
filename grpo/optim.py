"""AdamW and the learning-rate schedule.

The schedule is a pure function of its position, so that resuming it means restoring one integer. Optimizer state is
read and written as named tensors in their own dtype: `Optimizer.load_state_dict` would cast it to the parameter's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo.config import OptimizerConfig


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019); weight decay acts on matrices only, not on norms and biases."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


@dataclass
class Schedule:
    """Linear warm-up, then constant, linear or cosine decay to `min_lr_ratio`. `position` counts optimizer steps."""

    config: OptimizerConfig
    max_steps: int
    position: int = 0

    def learning_rate(self) -> float:
        """The rate of the optimizer step at `position` (from 0)."""
        config = self.config
        warmup = math.ceil(config.warmup_ratio * self.max_steps)
        if self.position < warmup:
            return config.learning_rate * (self.position + 1) / warmup
        progress = min(1.0, (self.position - warmup) / max(1, self.max_steps - warmup))
        decay = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[config.lr_scheduler_type]
        floor = 0.0 if config.lr_scheduler_type == "constant" else config.min_lr_ratio
        return config.learning_rate * (floor + (1.0 - floor) * decay)

    def apply(self, optimizer: torch.optim.Optimizer) -> float:
        """Set the rate of the coming step on every parameter group and return it."""
        rate = self.learning_rate()
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """State as `<parameter>/<slot>` → tensor, each in its own dtype."""
    return {
        f"{name}/{slot}": value
        for name, parameter in parameters.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_state` returned, without casting. Unknown parameters raise KeyError."""
    optimizer.state.clear()
    for key, value in state.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU unless it is capturable.
        restored: Any = value.clone() if slot == "step" else value.to(parameter.device).clone()
        optimizer.state[parameter][slot] = restored
