"""Whole runs on vLLM for bench_plan.py: two steps of a real trainer, and the ledger's peaks beside the plan's.

    python -m profiling.plan_runs "qwen3-1.7b lora 128×512 vllm own" --out FILE    # one run; bench_plan starts these

A run has a process of its own, since a process holds one engine. Left out: what only time could show (bench_step.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo import GRPOConfig, GRPOTrainer
from grpo.bench_models import model_config
from grpo.planner import Plan, Planner
from profiling.bench_rollout import Size, model_folder, prompt_words
from profiling.bench_step import hash_reward
from profiling.measure import write_json

STEPS = 2
GENERATIONS = 8
SECONDS = 190.0  # for one run; an engine takes up to a minute to start
PHASES = ("load", "rollout", "score", "update")


@dataclass(frozen=True)
class Run:
    """`sequences` at once; half the tokens of one are its prompt. Prompts hold all their tokens, completions too."""

    shape: str
    training: str  # full, lora, qlora
    sequences: int
    length: int
    kv_cache: str
    shared: bool = True  # base weights, with lora
    cuda_graphs: bool = False
    checkpointing: str = "recompute"

    @property
    def name(self) -> str:
        """For people."""
        weights = "shared" if self.shared and self.training == "lora" else "own"
        size = f"{self.sequences}×{self.length:,}"
        return f"{self.shape} {self.training} {size} vllm {weights}{' graphs' * self.cuda_graphs}"

    def config(self, model: str, output_dir: str) -> GRPOConfig:
        """Of a run on the model in a folder."""
        half = self.length // 2
        return GRPOConfig.model_validate(
            {
                "output_dir": output_dir,
                "max_steps": STEPS,
                "prompts_per_step": self.sequences // GENERATIONS,
                "model": {"name_or_path": model, "load_in_4bit": self.training == "qlora"},
                "adapter": None if self.training == "full" else {"r": 16},
                "data": {"max_prompt_length": half},
                "rollout": {"num_generations": GENERATIONS, "max_completion_length": half, "engine": "vllm"}
                | {"max_sequences": self.sequences, "kv_cache": self.kv_cache, "cuda_graphs": self.cuda_graphs}
                | {"share_weights": self.shared if self.training == "lora" else "auto"},
                "update": {"max_tokens_per_batch": 16 * self.length, "activation_checkpointing": self.checkpointing},
                "optimizer": {"learning_rate": 1e-6},
                "evaluation": {"every_steps": 0},
                "checkpoint": {"every_steps": 0},
            }
        )


RUNS = (
    Run("qwen2.5-0.5b", "full", 64, 512, "2GiB"),
    Run("qwen2.5-0.5b", "lora", 256, 512, "6GiB", cuda_graphs=True),
    Run("qwen3-1.7b", "lora", 128, 512, "8GiB", shared=False),
    Run("qwen3-1.7b", "full", 64, 1_024, "8GiB", checkpointing="offload"),
    Run("llama-3.2-3b", "lora", 64, 1_024, "8GiB", checkpointing="offload"),
    Run("llama-3.2-3b", "qlora", 64, 512, "4GiB"),
)


def plan_of(run: Run) -> Plan:
    """What is to be expected, without a GPU."""
    return Planner(model_config(run.shape)).plan(run.config(run.shape, "unused"))


def described(run: Run) -> dict[str, Any]:
    """The predicted half of a row."""
    plan = plan_of(run)
    phases = {name: plan.bytes_of(name) or 0 for name in PHASES}
    peak = max(phases, key=lambda name: phases[name])
    return {
        "name": run.name,
        "tokens": run.sequences * run.length,
        "predicted_gib": round(phases[peak] / 2**30, 4),
        "needed_gib": round(plan.needed / 2**30, 3),
        "peak_in": peak,
        "predicted_phases_gib": {name: round(size / 2**30, 4) for name, size in phases.items()},
        "parts_gib": {name: round(size / 2**30, 4) for name, size in plan.phase("rollout").parts.items()},
    }


def measured(run: Run) -> dict[str, Any]:
    """The other half: peaks by torch's count, the largest of the run's steps."""
    size = Size(prompts=run.sequences // GENERATIONS, generations=GENERATIONS, prompt_tokens=run.length // 2,
                completion_tokens=run.length // 2, shape=run.shape)  # fmt: skip
    with model_folder(size, torch.device("cuda")) as (folder, tokenizer), tempfile.TemporaryDirectory() as output:
        words = prompt_words(size, size.prompts * (STEPS + 1), len(tokenizer))
        data = [{"prompt": " ".join(f"t{i}" for i in ids)} for ids in words]
        trainer = GRPOTrainer(None, [hash_reward], run.config(str(folder), output), data, processing_class=tokenizer)
        trainer.stop_token_ids = ()
        rows = list(trainer.steps())
    keys = {name: f"phase/{name}/peak_gib" for name in PHASES}
    phases = {name: max(row.get(key, 0.0) for row in rows) for name, key in keys.items()}
    outside = max(row.get("phase/update/others_gib", 0.0) for row in rows)
    return {
        "peak_gib": round(max(phases.values()), 4),
        "phases_gib": {name: round(value, 4) for name, value in phases.items()},
        "others_gib": round(outside, 4),  # context and graphs
    }


def results(only: list[str] | None, ends: float) -> Iterator[dict[str, Any]]:
    """A row for each run whose name holds one of `only`; none is begun after `ends`, by `time.perf_counter`."""
    for run in RUNS:
        if only and not any(part in run.name for part in only):
            continue
        row = described(run)
        if time.perf_counter() > ends:
            yield row | {"skipped": "no time left"}
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run.json"
            command = [sys.executable, "-m", "profiling.plan_runs", run.name, "--out", str(out)]
            try:
                done = subprocess.run(command, timeout=SECONDS, check=False, stderr=subprocess.PIPE, text=True)
            except subprocess.TimeoutExpired:
                yield row | {"skipped": f"not done in {SECONDS:.0f} s"}
                continue
            if out.exists():
                yield row | json.loads(out.read_text())
            else:
                last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:200]
                yield row | {"failed" if "out of memory" in last.lower() else "skipped": last}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[run.name for run in RUNS])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    write_json(given.out, measured(next(run for run in RUNS if run.name == given.name)))


if __name__ == "__main__":
    main()
