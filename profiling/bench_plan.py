"""The planner against the allocator: predicted and measured peak of one update over a grid of shapes and methods.

    python -m profiling.bench_plan                         # the grid on the first CUDA device, at most 10 minutes
    python -m profiling.bench_plan --budget 120 --only qlora
    python -m profiling.bench_plan --toy --device cpu      # seconds; checks the program, not the machine
    python -m profiling.bench_plan --table                 # rewrite the table of profiling/README.md from the JSON

One row is one optimizer step on one bin: forward, backward, AdamW, with the optimizer's state already there. Models are
built from their configuration with random weights, one for all rows of a shape and method. A peak needs no warm-up, so
each row runs once. Rows that the plan calls too large are listed, not run; a row that runs out of memory all the same
is kept as a failure of the plan. On a CPU, whose allocator keeps no peak, bytes that stay are compared alone.
On a GPU with vLLM, whole runs beside a colocated engine follow (plan_runs.py): the ledger's peaks against the plan's.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo.bench_models import Case, build, model_config
from grpo.bench_step import Data, ours
from grpo.config import GRPOConfig
from grpo.model.policy import Policy
from grpo.optim import make_optimizer
from grpo.plan_parts import CUDA_CONTEXT
from grpo.planner import SLACK, Phase, Planner
from profiling.measure import GIB, device_slug, earlier_results, environment, origin, write_json, write_tables
from profiling.plan_runs import results as runs

HERE = Path(__file__).parent
WITHIN = (0.05, 0.10)  # of the measured peak: for nine rows of ten, and for all


@dataclass(frozen=True)
class Row:
    """`count` documents of `length` tokens in one bin."""

    shape: str
    training: str  # full, lora, qlora
    count: int
    length: int
    checkpointing: str = "recompute"
    tiled: bool = False

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.shape} {self.training} {self.count}×{self.length:,} {self.checkpointing}{' tiled' * self.tiled}"

    def case(self) -> Case:
        """As the benchmarks' builders take it."""
        rank = 0 if self.training == "full" else 16
        return Case(
            self.name, self.shape, self.count, self.length, self.count * self.length, self.training == "qlora", rank
        )

    def config(self, dtype: str) -> GRPOConfig:
        """As a run would have it."""
        return GRPOConfig(
            model={"name_or_path": self.shape, "dtype": dtype, "load_in_4bit": self.training == "qlora"},
            adapter=None if self.training == "full" else {"r": 16},
            update={"activation_checkpointing": self.checkpointing, "tiled_mlp": self.tiled},
            optimizer={"learning_rate": 1e-30},
        )


GRID = (
    Row("qwen2.5-0.5b", "full", 1, 2_048),
    Row("qwen2.5-0.5b", "full", 8, 2_048),
    Row("qwen2.5-0.5b", "full", 4, 16_384, "offload"),
    Row("qwen2.5-0.5b", "lora", 4, 512),
    Row("qwen2.5-0.5b", "lora", 1, 32_768, "offload"),
    Row("qwen2.5-0.5b", "lora", 8, 16_384, "offload"),
    Row("qwen2.5-0.5b", "lora", 8, 16_384),
    Row("qwen3-1.7b", "full", 2, 4_096),
    Row("qwen3-1.7b", "full", 2, 16_384, "offload"),
    Row("qwen3-1.7b", "lora", 4, 1_024),
    Row("qwen3-1.7b", "lora", 4, 4_352),
    Row("qwen3-1.7b", "lora", 4, 4_352, "offload"),
    Row("qwen3-1.7b", "lora", 8, 16_384, "offload", tiled=True),
    Row("qwen3-1.7b", "qlora", 1, 16_384),
    Row("qwen3-1.7b", "qlora", 4, 16_384, "offload"),
    Row("llama-3.2-3b", "full", 4, 2_048),
    Row("llama-3.2-3b", "full", 2, 8_192, "offload"),
    Row("llama-3.2-3b", "lora", 1, 16_384),
    Row("llama-3.2-3b", "lora", 2, 16_000, "offload"),
    Row("llama-3.1-8b", "lora", 8, 2_047),
    Row("llama-3.1-8b", "lora", 1, 20_480, "offload"),
    Row("llama-3.1-8b", "lora", 1, 20_480, "offload", tiled=True),
    Row("llama-3.1-8b", "qlora", 1, 20_480, "offload"),
    Row("llama-3.1-8b", "qlora", 4, 8_192, "offload", tiled=True),
    Row("llama-3.1-8b", "qlora", 8, 1_024),
    Row("qwen3-14b", "lora", 1, 8_192),
    Row("qwen3-14b", "lora", 1, 16_384, "offload"),
    Row("qwen3-14b", "qlora", 2, 8_192, "offload"),
)
TOY = (
    Row("toy", "full", 2, 150),
    Row("toy", "full", 1, 300, "offload"),
    Row("toy", "lora", 2, 150),
    Row("toy", "lora", 1, 300, "offload", tiled=True),
)


def predicted(row: Row, dtype: str, planner: Planner) -> dict[str, Phase]:
    """Phases of the update. A document of n tokens takes n − 1 rows."""
    lengths = (row.length - 1,) * row.count
    return {phase.name: phase for phase in planner.update(row.config(dtype), lengths, several_bins=False)}


def rows(grid: tuple[Row, ...], device: torch.device, budget: float) -> Iterator[dict[str, Any]]:
    """One result after the other, until `budget` seconds are over."""
    start = time.perf_counter()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for (shape, _), group in groupby(grid, key=lambda row: (row.shape, row.training)):
        planner, model = Planner(model_config(shape), 1), None
        for row in group:
            result = _described(row, predicted(row, str(dtype).removeprefix("torch."), planner))
            if time.perf_counter() - start > budget:
                yield result | {"skipped": "no time left"}
                continue
            if device.type == "cuda" and result["needed_gib"] * GIB > torch.cuda.mem_get_info(device)[1]:
                yield result | {"skipped": "the plan says it does not fit"}
                continue
            _clear(device)
            try:
                if model is None:
                    model = build(row.case(), device, dtype)
                result |= _measured(row, model, device)
            except torch.OutOfMemoryError as error:
                result["failed"] = str(error).splitlines()[0][:120]
            yield _with_ratio(result)
        del model
        _clear(device)


def _described(row: Row, phases: dict[str, Phase]) -> dict[str, Any]:
    peak = max(phases.values(), key=lambda phase: phase.bytes)
    stays = phases["optimizer"].bytes - sum(
        phases["optimizer"].parts.get(name, 0) for name in ("gradients", "optimizer's own", "cuBLAS workspace")
    )
    return {
        "name": row.name,
        "tokens": row.count * row.length,
        "predicted_gib": round(peak.bytes / GIB, 4),
        "predicted_resident_gib": round(stays / GIB, 6),
        "needed_gib": round((peak.bytes * (1 + SLACK) + CUDA_CONTEXT) / GIB, 3),
        "peak_in": peak.name,
        "parts_gib": {name: round(size / GIB, 4) for name, size in peak.parts.items()},
    }


def _measured(row: Row, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """GiB of one step; what stays is measured by the tensors themselves."""
    policy = Policy(
        model, activation_checkpointing=row.checkpointing, tiled_mlp=row.tiled  # type: ignore[arg-type]
    )  # fmt: skip
    optimizer = make_optimizer(policy.trainable(), row.config("float32").optimizer)
    for parameter in policy.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    data = Data.make(row.case(), device)
    _clear(device)
    found: dict[str, Any] = {"resident_gib": round(_resident(policy, optimizer) / GIB, 6)}
    start = time.perf_counter()
    ours(policy, data)()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 4)
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 4)
    found["seconds"] = round(time.perf_counter() - start, 3)
    optimizer.zero_grad(set_to_none=True)
    if policy.checkpointer is not None:
        if policy.checkpointer.host is not None:
            found["pinned_gib"] = round(policy.checkpointer.host.arena.capacity / GIB, 4)
        policy.checkpointer.remove()
    return found


def _resident(policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, adapter, its copies and optimizer state, each storage once."""
    from grpo.kernels.nf4 import SCRATCH

    tensors = list(policy.module.parameters())
    for parameter in policy.module.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.code, state.state2.absmax]
    tensors += [copy for copy, _ in policy.checkpointer.refreshed] if policy.checkpointer is not None else []
    for slots in optimizer.state.values():
        tensors += [value for name, value in slots.items() if isinstance(value, torch.Tensor) and name != "step"]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) + (SCRATCH.num_bytes if policy.device.type == "cuda" else 0)


def _with_ratio(result: dict[str, Any]) -> dict[str, Any]:
    if "peak_gib" in result:
        result["ratio"] = round(result["predicted_gib"] / result["peak_gib"], 4)
    if "resident_gib" in result:
        result["resident_ratio"] = round(result["predicted_resident_gib"] / result["resident_gib"], 4)
    return result


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- the table -------------------------------------------------------------------------------------------------------

HEADER = "| configuration | predicted GiB | measured GiB | ratio | reserved GiB | peak in |\n" + "|---" * 6 + "|"


def line(found: dict[str, Any]) -> str:
    """One row of the table."""
    why = found.get("failed") or found.get("skipped")
    shown = {
        key: f"{found[key]:.{digits}f}" if key in found else ""
        for key, digits in (("predicted_gib", 2), ("peak_gib", 2), ("ratio", 3), ("reserved_gib", 2))
    }
    if why:
        shown["peak_gib"] = f"– ({why})"
    return f"| {found['name']} | {' | '.join(shown.values())} | {found['peak_in']} |"


def summary(results: list[dict[str, Any]]) -> str:
    """How many rows come within the bounds, and what ran out of memory though it was to fit."""
    off = [abs(found["ratio"] - 1) for found in results if "ratio" in found]
    failed = sum("failed" in found for found in results)
    if not off:
        return f"no peak measured; {failed} failed"
    near, far = (sum(value <= bound for value in off) for bound in WITHIN)
    return (
        f"{len(off)} measured: {near} within {WITHIN[0]:.0%}, {far} within {WITHIN[1]:.0%}, worst {max(off):.1%}; "
        f"{failed} ran out of memory"
    )


def table(data: dict[str, Any]) -> str:
    """Markdown of one results file."""
    rows = data["rows"]
    return "\n".join([origin(data["environment"]), "", HEADER, *map(line, rows), "", summary(rows)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, for checking this program")
    parser.add_argument("--only", action="append", help="part of a row's name (default: all)")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which no row is begun")
    parser.add_argument("--out", type=Path, help="default: profiling/results/<device>/plan.json")
    parser.add_argument("--commit", help="recorded in the JSON where the checkout has no git")
    parser.add_argument("--update", action="store_true", help="keep the other rows of an earlier run's JSON")
    parser.add_argument("--table", action="store_true", help="rewrite profiling/README.md, measure nothing")
    parser.add_argument("--no-runs", action="store_true", help="without the whole runs on vLLM")
    given = parser.parse_args(arguments)
    if given.table:
        write_tables("plan", table)
        return
    device = torch.device(given.device)
    out = given.out or HERE / "results" / device_slug(given.device) / "plan.json"
    grid = tuple(r for r in (TOY if given.toy else GRID) if not given.only or any(o in r.name for o in given.only))
    env = environment(given.device, given.commit)
    earlier = earlier_results(out, env) if given.update else None
    data: dict[str, Any] = earlier or {"environment": env, "rows": []}
    start = time.perf_counter()
    found_rows = rows(grid, device, given.budget)
    if device.type == "cuda" and not given.toy and not given.no_runs:
        if importlib.util.find_spec("vllm") is None:
            print("whole runs on vLLM are left out: vllm is not installed")
        else:
            ends = start + given.budget
            found_rows = itertools.chain(found_rows, map(_with_ratio, runs(given.only, ends)))
    for found in found_rows:
        data["rows"] = [old for old in data["rows"] if old["name"] != found["name"]] + [found]
        write_json(out, data)
        print(line(found), flush=True)
    print(summary(data["rows"]))


if __name__ == "__main__":
    main()
