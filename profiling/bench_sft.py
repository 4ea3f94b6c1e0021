"""Supervised fine-tuning, QLoRA rank 16: Hugging Face's Trainer on padded batches against our SFTTrainer on bins.

    python -m profiling.bench_sft                     # Llama-3.1-8B shape, NF4 base, on the first CUDA device
    python -m profiling.bench_sft --toy --device cpu  # a tiny Llama, float32, no 4-bit; checks the program

The rows: 60 % of 32–256 tokens, 40 % of 257–1,024 (`bench_packing.mixed_lengths`), a quarter of each its prompt, loss
on the completion. Both trainers see the same examples in each optimizer step, in the same order, under the same AdamW,
learning rate and LoRA (rank 16 on all linear layers, fp32 adapters, NF4 base with double quantisation):

- padded: `transformers.Trainer` + peft as a user sets them up: bf16=True, gradient checkpointing, batches padded to
  their longest row, gradient accumulation. peft's `prepare_model_for_kbit_training` is left out: it would add fp32
  copies of embedding and head to this side.
- packed: `grpo.SFTTrainer` with its defaults, which is what `grpo sft` runs;
- packed, offload: the same with `update.activation_checkpointing: offload`.

Tokens per second are real tokens (no pads) over wall time from the end of the warm-up steps to the end of the last;
memory is the allocator's peak over all steps, base weights included. The weights are random: the losses show that both
do the same, not that anything is learnt. Writes profiling/results/<device>/sft.json.
"""

from __future__ import annotations

import argparse
import gc
import random
import string
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo.bench_models import SHAPES, quantise, random_model
from grpo.config import SFTConfig
from grpo.demo import make_tokenizer
from grpo.sft import SFTTrainer
from profiling.bench_packing import IGNORED, TOKENS, mixed_lengths, padded_utilization
from profiling.measure import GIB, device_slug, environment, with_origin, write_json, write_tables

HERE = Path(__file__).parent
METHODS = ("padded", "packed", "packed, offload")
RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4


@dataclass(frozen=True)
class Case:
    """What is trained. `per_device` rows make one padded batch, `examples_per_step` one optimizer step."""

    shape: str
    load_in_4bit: bool
    longest: int
    examples_per_step: int
    per_device: int
    tokens_per_bin: int
    steps: int
    warm_up_steps: int
    device: torch.device
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def num_steps(self) -> int:
        return self.steps + self.warm_up_steps

    @property
    def lengths(self) -> list[int]:
        return mixed_lengths(self.num_steps * self.examples_per_step, self.seed, self.longest)

    def rows(self) -> list[dict[str, str]]:
        """Text rows: one token a character of the demo's tokenizer, and EOS at the end of the completion."""
        draw = random.Random(f"text-{self.seed}")
        found = []
        for length in self.lengths:
            text = "".join(draw.choices(string.ascii_lowercase, k=max(2, length - 1)))
            num_prompt = max(1, length // 4)
            found.append({"prompt": text[:num_prompt], "completion": text[num_prompt:]})
        return found

    def model(self) -> nn.Module:
        model = random_model(self.shape, self.device, self.dtype, seed=self.seed, **TOKENS)
        return quantise(model) if self.load_in_4bit else model


# --- the two trainers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Seconds since the start at the end of each step, the loss of each step, and GiB at the peak (None on a CPU)."""

    stamps: list[float]
    losses: list[float]
    peak_gib: float | None
    reserved_gib: float | None
    utilization: float
    notes: list[str]


class Clock:
    """Stamps at step ends, after the device has finished; the memory peak since it was made.

    Blocks that building the model left in the allocator's cache are given back first: they are not the trainer's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stamps: list[float] = []
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    def stamp(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stamps.append(time.perf_counter())

    def peak(self) -> tuple[float | None, float | None]:
        """GiB allocated and reserved."""
        if self.device.type != "cuda":
            return None, None
        return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def encoded(case: Case, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Ids and labels of the rows: the examples that SFTTrainer makes of them."""
    found = []
    for row in case.rows():
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        found.append({"input_ids": [*prompt, *completion], "labels": [IGNORED] * len(prompt) + completion})
    return found


def pad_to_longest(rows: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, Tensor]:
    """[B, longest] ids, attention mask and labels, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": pad_token_id, "labels": IGNORED}
    batch = {
        name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])
        for name, fill in fills.items()
    }
    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {**batch, "attention_mask": torch.tensor(mask)}


def train_padded(case: Case, model: nn.Module, folder: str) -> Run:
    """transformers.Trainer, as a user of QLoRA sets it up."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainerCallback, TrainingArguments

    tokenizer = make_tokenizer()
    rows = encoded(case, tokenizer)

    class InOrder(Trainer):
        """The rows in their order, so that both trainers have the same examples in a step."""

        def get_train_dataloader(self) -> Any:
            return DataLoader(
                rows, batch_size=case.per_device, collate_fn=lambda batch: pad_to_longest(batch, tokenizer.pad_token_id)
            )

    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=case.num_steps,
        per_device_train_batch_size=case.per_device,
        gradient_accumulation_steps=case.examples_per_step // case.per_device,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=case.device.type == "cuda",
        use_cpu=case.device.type == "cpu",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=case.seed,
    )
    clock = Clock(case.device)

    class Stamps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.stamp()

    trainer = InOrder(get_peft_model(model, adapter), arguments, train_dataset=rows, callbacks=[Stamps()])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(clock.stamps, losses, *clock.peak(), padded_utilization(case.lengths, case.per_device), [])


def train_packed(case: Case, model: nn.Module, folder: str, **update: Any) -> Run:
    """grpo.SFTTrainer with its defaults, but for the knobs of `update`."""
    config = SFTConfig(
        output_dir=folder,
        max_steps=case.num_steps,
        seed=case.seed,
        examples_per_step=case.examples_per_step,
        learning_rate=LEARNING_RATE,
        max_completion_length=case.longest,
        adapter={"r": RANK, "alpha": ALPHA},
        data={"shuffle": False},
        update={"max_tokens_per_batch": case.tokens_per_bin} | update,
        checkpoint={"every_steps": 0},
    )
    trainer = SFTTrainer(model, config, case.rows(), processing_class=make_tokenizer())
    clock = Clock(case.device)
    rows = []
    for row in trainer.steps():
        clock.stamp()
        rows.append(row)
    losses, utilization = ([row[key] for row in rows] for key in ("loss", "packing/utilization"))
    peak, reserved = (_highest(rows, name) for name in ("peak_gib", "reserved_gib"))
    return Run(clock.stamps, losses, peak, reserved, sum(utilization) / len(utilization), trainer.policy.notes())


def _highest(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """Of all phases but loading (the ledger resets the allocator's own peaks as it goes); None without CUDA."""
    if not any("phase/update/reserved_gib" in row for row in rows):
        return None
    ends = f"/{name}"
    return max(v for row in rows for key, v in row.items() if key.endswith(ends) and not key.startswith("phase/load/"))


# --- running ---------------------------------------------------------------------------------------------------------


def line(case: Case, name: str) -> dict[str, Any]:
    """One trainer's figures, with a model of its own that is gone afterwards."""
    lean = partial(train_packed, activation_checkpointing="offload")
    train: Any = {"padded": train_padded, "packed": train_packed, "packed, offload": lean}[name]
    with tempfile.TemporaryDirectory() as folder:
        run = train(case, case.model(), folder)
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
    timed = sum(case.lengths[case.warm_up_steps * case.examples_per_step :])
    seconds = run.stamps[-1] - run.stamps[case.warm_up_steps - 1]
    return {
        "name": name,
        "tokens_per_second": timed / seconds,
        "seconds_per_step": seconds / case.steps,
        "peak_gib": run.peak_gib,
        "reserved_gib": run.reserved_gib,
        "utilization": run.utilization,
        "losses": run.losses,
        "notes": run.notes,
    }


COLUMNS = "trainer | utilization | real tokens/s | × | s/step | peak GiB | reserved GiB | loss first → last"


def table(data: dict[str, Any]) -> str:
    """Markdown of one results file; × is against the first trainer."""
    lines = [f"| {COLUMNS} |", "|---" * 8 + "|"]
    first = data["methods"][0]["tokens_per_second"]
    for entry in data["methods"]:
        memory = ["" if entry[key] is None else f"{entry[key]:.2f}" for key in ("peak_gib", "reserved_gib")]
        cells = [
            entry["name"],
            f"{entry['utilization']:.1%}",
            f"{entry['tokens_per_second']:,.0f}",
            f"{entry['tokens_per_second'] / first:.2f}",
            f"{entry['seconds_per_step']:.3g}",
            *memory,
            f"{entry['losses'][0]:.4f} → {entry['losses'][-1]:.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="a tiny Llama in float32, for checking this program")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--bf16-base", action="store_true", help="LoRA over bf16 weights instead of NF4")
    parser.add_argument("--examples-per-step", type=int, default=64)
    parser.add_argument(
        "--per-device", type=int, default=8, help="rows of a padded batch (divides the step's examples)"
    )
    parser.add_argument("--tokens-per-bin", type=int, default=8192, help="about the places of a padded batch")
    parser.add_argument("--steps", type=int, default=5, help="timed optimizer steps")
    parser.add_argument("--warm-up-steps", type=int, default=2, help="steps before them, at least one")
    parser.add_argument("--only", action="append", choices=METHODS, help="trainers (default: both)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, text and weights")
    parser.add_argument("--out", type=Path, help="default: profiling/results/<device>/sft.json")
    parser.add_argument("--commit", help="recorded in the JSON where the checkout has no git")
    parser.add_argument("--table", action="store_true", help="rewrite profiling/README.md, measure nothing")
    given = parser.parse_args(arguments)
    if given.table:
        write_tables("sft", with_origin(table))
        return
    case = _case(given)
    if case.examples_per_step % case.per_device or case.warm_up_steps < 1:
        parser.error("--per-device must divide --examples-per-step, and --warm-up-steps be at least 1")
    lines = [line(case, name) for name in given.only or METHODS]
    facts = {**vars(case), "device": str(case.device), "tokens": sum(case.lengths)}
    results = {"environment": environment(case.device, given.commit) | _versions(), "case": facts, "methods": lines}
    out = given.out or HERE / "results" / device_slug(case.device) / "sft.json"
    write_json(out, results)
    print(f"{case.shape}, {case.examples_per_step} examples a step, {results['environment']['device']}")
    print(table(results))


def _case(given: argparse.Namespace) -> Case:
    device = torch.device(given.device)
    if given.toy:
        return Case("toy-llama", False, 64, 8, 4, 256, 2, 1, device, given.seed)
    return Case(
        given.shape,
        not given.bf16_base,
        1024,
        given.examples_per_step,
        given.per_device,
        given.tokens_per_bin,
        given.steps,
        given.warm_up_steps,
        device,
        given.seed,
    )


def _versions() -> dict[str, str | None]:
    from importlib.metadata import version

    return {name: version(name) for name in ("transformers", "peft", "accelerate", "bitsandbytes")}


if __name__ == "__main__":
    main()
