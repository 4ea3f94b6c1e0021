"""TRL's update on the same model and tokens, to measure beside ours: the door to trl.

`GRPOTrainer.compute_loss` is called as `train()` would call it, with the flags that save most memory at long context:
one row a micro-batch, gradient checkpointing on, bf16, and the chunked LM head, which it uses of itself since 1.15. Its
GRPO trainer has no flag for activation offloading; its SFT and DPO trainers have, by a context manager around forward
and backward, and `trl_offload` puts GRPO's loss into that same context manager.
Left out: Unsloth, whose import rewrites transformers and trl for everything else in the process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from grpo.bench_step import BETA, Data
from grpo.demo import make_tokenizer
from grpo.errors import InputError
from grpo.model.adapter import is_adapted

Step = Callable[[], None]
Update = Callable[[Data], Step]


def trl_trainer(model: nn.Module, rows: int, device: torch.device) -> Any:
    """A GRPOTrainer over `model`, set up as for its first step, for micro-batches of `rows` rows.

    Raises:
        ImportError: TRL is not installed.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    generations = max(2, rows)
    arguments = GRPOConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=rows,
        num_generations=generations,
        generation_batch_size=generations,
        beta=BETA if is_adapted(model) else 0.0,  # else it loads a reference model, by name
        bf16=device.type == "cuda",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to=[],
        use_cpu=device.type == "cpu",
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "x"}] * generations),
        processing_class=make_tokenizer(),
    )
    trainer.beta = BETA
    trainer.current_gradient_accumulation_steps = 1
    # What `trainer.train()` does before its first step.
    prepared: Any = model
    prepared.gradient_checkpointing_enable({"use_reentrant": False})
    if is_adapted(model):
        prepared.enable_input_require_grads()
    model.train()
    return trainer


def trl_step(trainer: Any, data: Data, around: AbstractContextManager[Any] | None = None) -> Step:
    """Forward and backward of its loss on all rows of `data` in one micro-batch, inside `around`."""
    prompt, completion = data.ids[:, : data.prompt], data.ids[:, data.prompt :]
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "advantages": data.advantages,
        "ref_per_token_logps": data.reference,
        "num_items_in_batch": torch.tensor(completion.numel(), device=data.ids.device),
    }

    def run() -> None:
        with around or nullcontext():
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, inputs)
            loss.backward()

    return run


def trl(model: nn.Module, rows: int, device: torch.device) -> Update:
    """TRL's own compute_loss, all rows in one micro-batch."""
    trainer = trl_trainer(model, rows, device)
    return lambda data: trl_step(trainer, data)


def trl_offload(model: nn.Module, rows: int, device: torch.device) -> Update:
    """The same inside the activation offloading of its other trainers.

    Raises:
        ImportError: TRL is not installed.
        InputError: not on a CUDA device.
    """
    from trl.models import get_act_offloading_ctx_manager

    if device.type != "cuda":
        raise InputError(f"TRL's activation offloading on {device} (want a CUDA device)")
    trainer = trl_trainer(model, rows, device)
    context = get_act_offloading_ctx_manager(model, warn_if_no_head=False)
    return lambda data: trl_step(trainer, data, context)


PEERS: dict[str, Callable[[nn.Module, int, torch.device], Update]] = {
    "TRL": trl,
    "TRL, activation offloading": trl_offload,
}
