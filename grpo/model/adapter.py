"""LoRA through peft: the only door to it. With the adapter off the same weights are the reference policy.

Left out: merging during training. The base is never rewritten then; only a saved adapter is merged at load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from grpo.config import AdapterConfig
from grpo.errors import InputError, clip


def add_adapter(model: nn.Module, config: AdapterConfig | Any) -> nn.Module:
    """Wrap `model` with LoRA. `config` is our section or the user's own `peft.PeftConfig`. The base is frozen.

    Raises:
        InputError: `adapter.target_modules` matches nothing.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise InputError("the model already carries an adapter (want peft_config=None, or the bare model)")
    if isinstance(config, AdapterConfig):
        config = LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft scales by alpha / r, any float
            lora_dropout=config.dropout,
            target_modules=config.target_modules,
            task_type="CAUSAL_LM",
        )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"adapter.target_modules: {clip(error, 200)}") from error


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
