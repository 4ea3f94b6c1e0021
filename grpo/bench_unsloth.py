"""A case's model as Unsloth has it: the door to unsloth.

Unsloth trains only what it has loaded itself, so the model is written first, as a checkpoint and its adapter, by a
process without Unsloth, and read from there.
Left out: training without an adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo.bench_models import Case, adapted, random_model
from grpo.config import AdapterConfig
from grpo.demo import make_tokenizer
from grpo.errors import InputError

_ADAPTER = "adapter.pt"


def write(case: Case, folder: Path, device: torch.device, dtype: torch.dtype, **changes: Any) -> None:
    """`build(case, device, dtype, **changes)` as files in `folder`; the weights in `dtype`, not in 4 bit.

    Raises:
        InputError: the case trains all weights.
    """
    if case.training == "full":
        raise InputError("Unsloth is measured with an adapter alone (want lora or qlora)")
    plain: Any = random_model(case.shape, device, dtype, **changes)
    plain.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    adapter = {name: p.cpu() for name, p in adapted(plain, case).named_parameters() if "lora_" in name}
    torch.save(adapter, folder / _ADAPTER)


def load(case: Case, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The written model by Unsloth's loader, with its own gradient checkpointing and every saving it has on by itself.

    Raises:
        ImportError: Unsloth is not installed.
    """
    from unsloth import FastLanguageModel

    weights = torch.load(folder / _ADAPTER)
    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=case.length,
        dtype=dtype,
        load_in_4bit=case.four_bit,
        use_gradient_checkpointing="unsloth",
        fix_tokenizer=False,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=case.rank,
        lora_alpha=AdapterConfig(r=case.rank).alpha,
        lora_dropout=0,
        bias="none",
        target_modules=sorted({name.split(".lora_")[0].rpartition(".")[2] for name in weights}),
        use_gradient_checkpointing="unsloth",
        max_seq_length=case.length,
    )
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].data.copy_(weight)
    return model
