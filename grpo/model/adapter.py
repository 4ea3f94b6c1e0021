"""LoRA through peft: the only door to it. With the adapter off the same weights are the reference policy.

Left out: merging during training. The base is never rewritten then; only a saved adapter is merged at load.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo.config import AdapterConfig
from grpo.errors import InputError, clip


def add_adapter(model: nn.Module, config: AdapterConfig | Any) -> nn.Module:
    """Wrap `model` with LoRA. `config` is our section or the user's own `peft.PeftConfig`. The base is frozen.

    With our section the adapter's weights have `adapter.dtype`; with the user's own they have what peft gives (fp32
    over a bf16 or fp16 base). The base keeps its dtypes, also in 4 bit: peft's `prepare_model_for_kbit_training` would
    turn its norms, embedding and head into fp32.

    Raises:
        InputError: `adapter.target_modules` matches nothing.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise InputError("the model already carries an adapter (want peft_config=None, or the bare model)")
    dtype = getattr(torch, config.dtype) if isinstance(config, AdapterConfig) else None
    if isinstance(config, AdapterConfig):
        config = LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft scales by alpha / r, any float
            lora_dropout=config.dropout,
            target_modules=config.target_modules,
            task_type="CAUSAL_LM",
        )
    try:
        # peft's own rule, fp32 over a half-precision base, belongs to the user's own configuration
        with warnings.catch_warnings():
            # peft asks for a name that transformers has renamed; the user can do nothing about it
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=dtype is None)
    except ValueError as error:
        raise InputError(f"adapter.target_modules: {clip(error, 200)}") from error
    if dtype is not None:
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return adapted


def merged_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with the adapter saved in `folder` added to its weights, W + s·B·A, rounded to their dtype."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload().requires_grad_(True)


def is_adapted(model: nn.Module) -> bool:
    """Whether `model` is a peft model (ours or one the user passed)."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def base_of(model: nn.Module) -> Any:
    """The causal LM inside a peft wrapper, or `model` itself."""
    return model.get_base_model() if is_adapted(model) else model  # type: ignore[operator]


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The frozen base alone, bit for bit, until the block ends."""
    with model.disable_adapter():  # type: ignore[operator]
        yield


# --- one adapted projection, for fused kernels ---------------------------------------------------------------


@dataclass(frozen=True)
class LoRAParts:
    """A plain LoRA projection: y = base(x) + scale · B(A(dropout(x))).

    Attributes:
        base: the frozen `nn.Linear`, or `Linear4bit` of bitsandbytes; weight [out, in], perhaps a bias [out].
        a: [r, in], in `adapter.dtype`.
        b: [out, r], in the same.
        scale: alpha / r (or alpha / √r).
        dropout: probability with which an element of the adapter's input is dropped in training mode.
    """

    base: nn.Module
    a: nn.Parameter
    b: nn.Parameter
    scale: float
    dropout: float


def lora_parts(module: nn.Module) -> LoRAParts | str | None:
    """What a fused projection needs of `module`, whether its adapter is switched on at the moment or not.

    Returns:
        The parts of a peft LoRA layer that is nothing but the formula of `LoRAParts`; the reason, if it is a peft layer
        that must keep its own forward; None, if it is no peft layer at all.
    """
    layer: Any = module
    if not (hasattr(layer, "disable_adapters") and hasattr(layer, "active_adapters")):
        return None
    if not (hasattr(layer, "lora_A") and hasattr(layer, "base_layer")):
        return f"{type(layer).__name__} is not a LoRA layer"
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        return f"{len(names)} active adapters"
    reason = _not_plain(layer, names[0])
    if reason:
        return reason
    dropout = layer.lora_dropout[names[0]]
    return LoRAParts(
        layer.base_layer,
        layer.lora_A[names[0]].weight,
        layer.lora_B[names[0]].weight,
        float(layer.scaling[names[0]]),
        dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
    )


def adapters_disabled(module: nn.Module) -> bool:
    """Whether the adapter of this peft layer is switched off now (`adapter_off`); False for any other module."""
    return bool(getattr(module, "disable_adapters", False))


def _not_plain(layer: Any, name: str) -> str | None:
    """Why `layer` with its one active adapter `name` is more than `LoRAParts` says, or None."""
    base, a, b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    dropout = layer.lora_dropout[name]
    reasons = {
        f"the base layer is {type(base).__name__}": type(base) is not nn.Linear and type(base).__name__ != "Linear4bit",
        f"{type(layer).__name__} is not peft's plain linear layer": not _is_peft_linear(type(layer)),
        "the adapter is merged": layer.merged,
        "DoRA": layer.use_dora.get(name, False),
        f"variant {type(layer.lora_variant.get(name)).__name__}": name in layer.lora_variant,
        "the adapter has a bias": a.bias is not None or b.bias is not None,
        "the base weight is stored transposed": layer.fan_in_fan_out,
        f"the adapter is made of {type(a).__name__}": type(a) is not nn.Linear or type(b) is not nn.Linear,
        f"its dropout is {type(dropout).__name__}": not isinstance(dropout, nn.Dropout | nn.Identity),
        "the scale is not a number": not isinstance(layer.scaling[name], int | float),
        "hooks": any(map(has_hooks, (layer, base, a, b))),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _is_peft_linear(kind: type) -> bool:
    return kind.__module__.startswith("peft.tuners.lora.") and kind.__name__ in ("Linear", "Linear4bit")


def has_hooks(module: nn.Module) -> bool:
    """Whether something is registered on `module` that would not run where its forward is not called."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_hf_hook")
    return any(getattr(module, name, None) for name in names)


def adapter_modules(causal_lm: nn.Module) -> dict[str, LoRAParts]:
    """Every LoRA projection of a causal LM by its path ("model.layers.0.self_attn.q_proj").

    Raises:
        InputError: a peft layer is more than y = base(x) + scale · B(A(x)), the form that can be sent to an engine.
    """
    found: dict[str, LoRAParts] = {}
    for path, module in causal_lm.named_modules():
        if not hasattr(module, "base_layer"):  # every peft layer has one; a whole model has peft's methods too
            continue
        parts = lora_parts(module)
        if isinstance(parts, str):
            raise InputError(f"adapter: {path} cannot be sent to the rollout engine: {parts} (want plain LoRA, or hf)")
        if parts is not None:
            found[path] = parts
    return found
