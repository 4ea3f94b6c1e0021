"""Padded batches against packed bins: how full they are, and real tokens per second forward + backward.

    python -m profiling.bench_packing                     # Qwen3-1.7B shape, bf16, LoRA, on the first CUDA device
    python -m profiling.bench_packing --toy --device cpu  # seconds; checks the program, not the machine

The rows: 60 % of 32–256 tokens, 40 % of 257–1,024, a quarter of each its prompt; random ids, random weights. All
methods get the same rows and the same loss, −Σ log π / (completion tokens), over all of them:

- padded: plain transformers and peft, batches padded to their longest row, as a stock trainer does;
- packed, stock layers: `grpo.model.policy.Policy` over bins, nothing fused;
- packed: the same with fused kernels, the product's default.

A real token is one of a row's own; pads count as time, not as tokens. Activations are recomputed in all of them. The
gradients of all adapters are compared with the padded method's. Writes profiling/results/<device>/packing.json.
Left out: the optimizer step (bench_sft.py has whole training runs).
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo.bench_models import SHAPES, model_config, random_model
from grpo.config import SFTConfig
from grpo.packing import Document, pack_documents, packing_metrics
from grpo.trainer.build import build_policy
from profiling.measure import device_slug, environment, measure, with_origin, write_json, write_tables

HERE = Path(__file__).parent
IGNORED = -100
METHODS = ("padded", "packed, stock layers", "packed")
TOKENS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


def mixed_lengths(count: int, seed: int, longest: int = 1024) -> list[int]:
    """Tokens per row: 60 % uniform in [longest/32, longest/4], 40 % uniform in (longest/4, longest]."""
    draw = random.Random(f"lengths-{seed}")
    quarter = longest // 4
    return [
        draw.randint(longest // 32, quarter) if draw.random() < 0.6 else draw.randint(quarter + 1, longest)
        for _ in range(count)
    ]


# --- the case --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is run: a shape of SHAPES, rows of the mix, rows of a padded batch, tokens of a bin."""

    shape: str
    rows: int
    longest: int
    batch_size: int
    tokens_per_bin: int
    device: torch.device
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def lengths(self) -> list[int]:
        return mixed_lengths(self.rows, self.seed, self.longest)

    def documents(self) -> list[Document]:
        draw = random.Random(f"ids-{self.seed}")
        vocabulary = model_config(self.shape).vocab_size
        found = []
        for row, length in enumerate(self.lengths):
            ids = [draw.randrange(2, vocabulary) for _ in range(length)]
            num_prompt = max(1, length // 4)
            found.append(Document(row, ids[:num_prompt], ids[num_prompt:]))
        return found

    def config(self, *, fused: bool) -> SFTConfig:
        dtype = str(self.dtype).removeprefix("torch.")
        return SFTConfig(
            adapter={"r": 16, "alpha": 32, "dtype": dtype},
            update={"activation_checkpointing": "recompute", "fused_kernels": fused},
        )


@dataclass
class Padded:
    """[B, longest] ids, attention mask and labels (IGNORED on prompts and pads) of consecutive rows."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @staticmethod
    def of(documents: Sequence[Document], device: torch.device) -> Padded:
        rows = [[*document.prompt_ids, *document.completion_ids] for document in documents]
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for place, (document, row) in enumerate(zip(documents, rows, strict=True)):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
            labels[place, len(document.prompt_ids) : len(row)] = torch.tensor(document.completion_ids)
        return Padded(ids.to(device), mask.to(device), labels.to(device))


def padded_utilization(lengths: Sequence[int], batch_size: int) -> float:
    """Real tokens / places of consecutive batches that are padded to their longest row."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


# --- the methods -----------------------------------------------------------------------------------------------------


@dataclass
class Method:
    """One way through all rows: `losses()` yields each batch's share of the loss, still to be backpropagated."""

    name: str
    module: nn.Module
    losses: Callable[[], Iterator[Tensor]]
    facts: dict[str, float]

    def run(self) -> Tensor:
        """Forward and backward of everything, batch by batch: the loss, and its gradients in the parameters."""
        self.module.zero_grad(set_to_none=True)
        values = []
        for loss in self.losses():
            loss.backward()
            values.append(loss.detach())
        return torch.stack(values).sum()

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.module.named_parameters() if p.grad is not None}


def make_method(name: str, case: Case) -> Method:
    """A method with a model of its own; all of them have the same weights."""
    make = padded if name == "padded" else packed
    model = random_model(case.shape, case.device, case.dtype, **TOKENS)
    method = make(name, case, model, case.documents())
    _randomise_adapters(method.module, case.seed)
    method.module.train()
    return method


def padded(name: str, case: Case, model: Any, documents: Sequence[Document]) -> Method:
    """transformers' own forward with labels, over rectangles; peft's LoRA in the dtype of the others."""
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    module: Any = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    module.gradient_checkpointing_enable({"use_reentrant": False})
    starts = range(0, len(documents), case.batch_size)
    batches = [Padded.of(documents[start : start + case.batch_size], case.device) for start in starts]
    total = num_completion_tokens(documents)

    def losses() -> Iterator[Tensor]:
        for batch in batches:
            yield module(**vars(batch), use_cache=False, num_items_in_batch=total).loss

    return Method(
        name,
        module,
        losses,
        {"num_batches": len(batches), "utilization": padded_utilization(case.lengths, case.batch_size)},
    )


def packed(name: str, case: Case, model: Any, documents: Sequence[Document]) -> Method:
    """The product's update path over bins."""
    policy = build_policy(case.config(fused=name == "packed"), model, None)
    bins = pack_documents(documents, case.tokens_per_bin)
    batches = [batch.to(case.device) for batch in bins]
    total = num_completion_tokens(documents)

    def losses() -> Iterator[Tensor]:
        for batch in batches:
            yield -policy.logprobs(batch, temperature=1.0).logprobs.sum() / total

    facts = {"num_batches": len(bins), "utilization": packing_metrics(bins)["packing/utilization"]}
    return Method(name, policy.module, losses, facts)


def num_completion_tokens(documents: Sequence[Document]) -> int:
    """The divisor of the loss."""
    return sum(len(document.completion_ids) for document in documents)


def _randomise_adapters(module: nn.Module, seed: int) -> None:
    # B starts at zero, which would hide A's gradient from the comparison
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if parameter.requires_grad:
            values = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1])
            parameter.data.copy_(values * (0.1 if "lora_B" in name else 1.0))


def gradient_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Relative error over all adapter weights together."""
    if found.keys() != wanted.keys():
        raise ValueError(f"gradients of other parameters: {sorted(found.keys() ^ wanted.keys())[:3]}")
    difference = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    return math.sqrt(difference / sum(float(gradient.double().square().sum()) for gradient in wanted.values()))


# --- running ---------------------------------------------------------------------------------------------------------


def run(case: Case, names: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """One line per method, all timed in turn in the same run."""
    methods = [make_method(name, case) for name in names]
    losses, wanted, lines = [], None, []
    for method in methods:
        print(f"{method.name}: first pass", flush=True)
        losses.append(float(method.run()))
        gradients = method.gradients()
        wanted = gradients if wanted is None else wanted
        lines.append({"name": method.name, **method.facts, "loss": losses[-1]})
        lines[-1]["gradient_error"] = gradient_error(gradients, wanted)
    del gradients, wanted
    tokens = sum(case.lengths)
    times = measure([method.run for method in methods], case.device, seconds=seconds)
    for line, time in zip(lines, times, strict=True):
        line |= {"tokens_per_second": tokens / time.median_ms * 1e3, "forward_backward": time.as_json()}
    return lines


COLUMNS = "method | batches | utilization | real tokens/s | × | peak GiB | loss | gradient error"


def table(data: dict[str, Any]) -> str:
    """Markdown of one results file; × is against the first method."""
    lines = [f"| {COLUMNS} |", "|---" * 8 + "|"]
    first = data["methods"][0]["tokens_per_second"]
    for line in data["methods"]:
        peak = line["forward_backward"]["peak_gib"]
        cells = [
            line["name"],
            f"{line['num_batches']}",
            f"{line['utilization']:.1%}",
            f"{line['tokens_per_second']:,.0f}",
            f"{line['tokens_per_second'] / first:.2f}",
            "" if peak is None else f"{peak:.2f}",
            f"{line['loss']:.4f}",
            f"{line['gradient_error']:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="a tiny shape, for checking this program")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-1.7b")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a padded batch")
    parser.add_argument("--tokens-per-bin", type=int, default=8192, help="about the places of a padded batch")
    parser.add_argument("--only", action="append", choices=METHODS, help="methods (default: all)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing, all methods together")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and ids")
    parser.add_argument("--out", type=Path, help="default: profiling/results/<device>/packing.json")
    parser.add_argument("--commit", help="recorded in the JSON where the checkout has no git")
    parser.add_argument("--table", action="store_true", help="rewrite profiling/README.md, measure nothing")
    given = parser.parse_args(arguments)
    if given.table:
        write_tables("packing", with_origin(table))
        return
    device = torch.device(given.device)
    case = Case(given.shape, given.rows, 1024, given.batch_size, given.tokens_per_bin, device, given.seed)
    if given.toy:
        case = Case("toy-qwen3", 24, 64, 4, 256, device, given.seed)
    lines = run(case, given.only or METHODS, given.seconds)
    facts = {**vars(case), "device": str(device), "tokens": sum(case.lengths)}
    results = {"environment": environment(device, given.commit), "case": facts, "methods": lines}
    out = given.out or HERE / "results" / device_slug(device) / "packing.json"
    write_json(out, results)
    print(f"{case.shape}, {case.rows} rows, {sum(case.lengths):,} tokens, {results['environment']['device']}")
    print(table(results))


if __name__ == "__main__":
    main()
