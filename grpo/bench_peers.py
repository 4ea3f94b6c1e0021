"""Other trainers' updates on the same model and tokens, to measure beside ours: the door to trl.

TRL: `GRPOTrainer.compute_loss` is called as `train()` would call it, with the flags that save most memory at long
context: one row a micro-batch, gradient checkpointing on, bf16, and the chunked LM head, which it uses of itself since
1.15. Its GRPO trainer has no flag for activation offloading; its SFT and DPO trainers have, by a context manager around
forward and backward, and `trl_offload` puts GRPO's loss into that same context manager.

Unsloth replaces TRL's trainer with its own when it is imported, so its update is taken in the same way; how it loads a
model stands in bench_unsloth.py. That import rewrites transformers for the whole process: see bench_process.py.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from grpo import bench_unsloth
from grpo.bench_models import Case, build
from grpo.bench_step import BETA, Data
from grpo.demo import make_tokenizer
from grpo.errors import InputError
from grpo.model.adapter import is_adapted

Step = Callable[[], None]
Update = Callable[[Data], Step]


@dataclass(frozen=True)
class Peer:
    """How another trainer is measured.

    Attributes:
        package: what has to be installed; its process imports it before anything else.
        update: of a model, for micro-batches of so many rows: forward and backward over given data.
        write: the model as files, and
        load: from them, where it does not train a model made by others.
    """

    package: str
    update: Callable[[nn.Module, int, torch.device], Update]
    write: Callable[..., None] | None = None
    load: Callable[[Case, Path, torch.dtype], nn.Module] | None = None

    @property
    def installed(self) -> bool:
        """Whether its package can be imported."""
        return importlib.util.find_spec(self.package) is not None

    def build(self, case: Case, device: torch.device, dtype: torch.dtype, files: Path | None, **changes: Any) -> Any:
        """The case's model as this trainer has it (see `build` in bench_models.py)."""
        if self.load is None:
            return build(case, device, dtype, **changes)
        assert files is not None
        return self.load(case, files, dtype)


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
    generated = completion.numel() * trainer.args.steps_per_generation  # tokens of all its micro-batches
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "advantages": data.advantages,
        "ref_per_token_logps": data.reference,
        "num_items_in_batch": torch.tensor(generated, device=data.ids.device),
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


def unsloth(model: nn.Module, rows: int, device: torch.device) -> Update:
    """The compute_loss that Unsloth puts in TRL's place, all rows in one micro-batch."""
    trainer = trl_trainer(model, rows, device)
    # It takes every pad token in a row for padding, and made-up rows have some of every token.
    trainer.processing_class = SimpleNamespace(pad_token_id=-1)
    return lambda data: trl_step(trainer, data)


PEERS: dict[str, Peer] = {
    "TRL": Peer("trl", trl),
    "TRL, activation offloading": Peer("trl", trl_offload),
    "Unsloth": Peer("unsloth", unsloth, bench_unsloth.write, bench_unsloth.load),
}
