"""AdamW (torch's, or the 8-bit and paged ones of bitsandbytes) and the learning-rate schedule.

The schedule is a pure function of its position, so that resuming it means restoring one integer. Optimizer state is
read and written as named tensors in their own dtype: `Optimizer.load_state_dict` would cast it to the parameter's.
Left out: 8-bit state of embeddings kept in 32 bit, percentile clipping, gradient scaling; the trainer clips.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo.config import OptimizerConfig
from grpo.errors import InputError, clip

MIN_8BIT_SIZE = 4096  # elements; smaller tensors keep fp32 state
_BLOCK = 256  # elements of 8-bit state that share an fp32 scale
_CODES = ("qmap1", "qmap2")  # [256] fp32, what the bytes of 8-bit state mean; one pair for all parameters


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019); weight decay acts on matrices only, not on norms and biases.

    8-bit: both moments in block-wise dynamic quantisation (Dettmers et al. 2022, 8-bit Optimizers). Paged: states of
    at least 100,000 elements lie in unified memory, which the driver moves to the host when the GPU is full.

    Raises:
        InputError: bitsandbytes is not installed, or a paged optimizer with parameters that are not on a CUDA device,
            naming `optimizer.name`.
    """
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    kind, extra = _optimizer_class(parameters, config.name)
    return kind(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        **extra,
    )


def _optimizer_class(parameters: Mapping[str, nn.Parameter], name: str) -> tuple[Any, dict[str, Any]]:
    if name == "adamw":
        return torch.optim.AdamW, {}
    devices = {parameter.device.type for parameter in parameters.values()}
    if name.startswith("paged_") and devices != {"cuda"}:
        raise InputError(
            f"optimizer.name is {name!r} (want {name.removeprefix('paged_')}: paged state needs CUDA, the model is on "
            f"{', '.join(sorted(devices))})"
        )
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise InputError(
            f"optimizer.name is {name!r} but bitsandbytes cannot be imported: {clip(error, 200)} (want it installed, "
            "or adamw)"
        ) from error
    if name == "paged_adamw":
        return optim.PagedAdamW, {}
    return {"adamw_8bit": optim.AdamW8bit, "paged_adamw_8bit": optim.PagedAdamW8bit}[name], {
        "min_8bit_size": MIN_8BIT_SIZE
    }


def state_bytes(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> int:
    """Bytes of optimizer state once every parameter has had a step, without step counters.

    Torch's AdamW keeps two moments in the parameter's dtype; bitsandbytes keeps them in fp32, or in 8 bit with one fp32
    scale for each block of 256 (2.03 B per element) and two code tables of 1 KiB. Paged state counts in full.
    """
    total, coded = 0, False
    for parameter in parameters.values():
        size = parameter.numel()
        if config.name == "adamw":
            total += 2 * size * parameter.element_size()
        elif config.name == "paged_adamw" or size < MIN_8BIT_SIZE:
            total += 2 * size * 4
        else:
            total += 2 * (size + 4 * -(-size // _BLOCK))
            coded = True
    return total + (2 * 256 * 4 if coded else 0)


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
    """State as `<parameter>/<slot>` → tensor, each in its own dtype; a whole number becomes an int64 scalar.

    The code tables of 8-bit state are shared by all parameters and come once, as `/qmap1` and `/qmap2`: 2 KiB instead
    of 2 KiB per parameter, and yet the bytes keep their meaning should another bitsandbytes have other tables.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            key = f"/{slot}" if slot in _CODES else f"{name}/{slot}"
            state[key] = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
    return state


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_state` returned, without casting. Unknown parameters raise KeyError."""
    optimizer.state.clear()
    codes = {slot: state[f"/{slot}"] for slot in _CODES if f"/{slot}" in state}
    for key, value in state.items():
        name, _, slot = key.rpartition("/")
        if slot in _CODES:
            continue
        parameter = parameters[name]
        held = optimizer.state[parameter]
        held[slot] = _restored(optimizer, parameter, slot, value)
        if value.dtype == torch.uint8:  # state1 or state2 in 8 bit
            index = slot.removeprefix("state")
            held[f"qmap{index}"] = codes[f"qmap{index}"] = codes[f"qmap{index}"].to(parameter.device)


def _restored(optimizer: Any, parameter: nn.Parameter, slot: str, value: Tensor) -> Any:
    if slot == "step":
        # bitsandbytes counts in Python; torch's AdamW keeps its counter on the CPU unless it is capturable.
        return int(value) if value.dtype == torch.int64 else value.clone()
    if slot.startswith("state") and hasattr(optimizer, "get_state_buffer"):
        buffer = optimizer.get_state_buffer(parameter, dtype=value.dtype)  # paged where bitsandbytes would page it
        buffer.copy_(value)
        return buffer
    return value.to(parameter.device).clone()
