"""A whole GRPO step, ours on vLLM against TRL 1.16 with vLLM colocated in sleep mode: seconds by phase, peak memory.

    python -m profiling.bench_step                     # both sides, each in a process of its own
    python -m profiling.bench_step --only ours         # or trl; the other side of an earlier JSON is kept
    python -m profiling.bench_step --toy --device cpu  # seconds, ours on `hf`; checks the program alone

Qwen3-1.7B shape with random weights, LoRA r=16 on all linear layers, 16 prompts × 8 generations × 1,024 forced tokens,
one update in micro-batches of the same number of tokens. `lean` is ours with the knobs that trade time for memory and
leave the result as it is: offload, small log-prob tiles, micro-batches of half the tokens. TRL has no argument for the
bytes of the KV cache, so its call of `LLM` is given ours. The first step warms up. Memory outside the KV cache is the
driver's count every 20 ms (the whole device) less the cache while it is mapped.
Left out: learning (rewards are a hash).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from profiling.bench_rollout import FULL, RANK, TOY, Clock, Size, model_folder, prompt_words
from profiling.measure import GIB, device_slug, environment, origin, write_json, write_tables

HERE = Path(__file__).parent
SIDES = ("ours", "ours, lean", "trl")
LEAN = {"activation_checkpointing": "offload", "logprob_chunk_mb": 128}  # and micro-batches of half the tokens


def hash_reward(completion: str) -> float:
    """Different for each completion, the same each time, in [0, 1)."""
    return zlib.crc32(completion.encode()) % 1000 / 1000


class MemoryWatch:
    """Highest bytes in use on the device, less the KV cache while it is mapped; samples during a change are dropped."""

    def __init__(self, kv_cache_bytes: int) -> None:
        self.kv_cache_bytes = kv_cache_bytes
        self.mapped: bool | None = False  # None: changing
        self.peak = {True: 0, False: 0}  # with the cache mapped, and without
        self._end = threading.Event()

    def sample(self, used: Callable[[], int]) -> None:
        """One reading; it counts where the cache did not change meanwhile."""
        before = self.mapped
        value = used()
        if before is None or self.mapped is not before:
            return
        self.peak[before] = max(self.peak[before], value - (self.kv_cache_bytes if before else 0))

    def follow(self, llm: Any, mapped_bytes: Callable[[], int] | None = None) -> None:
        """Know from now on when `llm` maps and unmaps its cache (it is asleep now), and how large it really is."""
        wake_up, sleep = llm.wake_up, llm.sleep

        def woken(tags: list[str] | None = None) -> Any:
            maps = tags is None or "kv_cache" in tags
            self.mapped = None if maps else self.mapped
            found = wake_up(tags)
            if maps:
                self.kv_cache_bytes = mapped_bytes() if mapped_bytes else self.kv_cache_bytes
                self.mapped = True
            return found

        def slept(*arguments: Any, **named: Any) -> Any:
            self.mapped = None
            found = sleep(*arguments, **named)
            self.mapped = False
            return found

        llm.wake_up, llm.sleep = woken, slept

    @contextmanager
    def running(self, cuda: bool) -> Iterator[None]:
        """Sample every 20 ms inside the block."""

        def loop() -> None:
            while not self._end.wait(0.02):
                self.sample(_used)

        thread = threading.Thread(target=loop, daemon=True)
        if cuda:
            thread.start()
        try:
            yield
        finally:
            self._end.set()
            if cuda:
                thread.join()

    def row(self) -> dict[str, float]:
        """In GiB."""
        return {
            "peak_outside_kv_gib": max(self.peak.values()) / GIB,
            "peak_asleep_gib": self.peak[False] / GIB,
            "peak_awake_outside_kv_gib": self.peak[True] / GIB,
        }


def _cache_bytes() -> int:
    from grpo.rollout.vllm_weights import pool_bytes

    return pool_bytes()["kv_cache"]


def _used() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def _dataset(size: Size, vocabulary: int, steps: int) -> list[dict[str, str]]:
    return [
        {"prompt": " ".join(f"t{i}" for i in ids)} for ids in prompt_words(size, size.prompts * (steps + 1), vocabulary)
    ]


def run_ours(size: Size, steps: int, rows: int, device: torch.device, **update: Any) -> dict[str, Any]:
    """Steps of our trainer: seconds of each, and its ledger's rows. `update`: knobs of that section."""
    from grpo import GRPOConfig, GRPOTrainer

    with model_folder(size, device) as (folder, tokenizer), tempfile.TemporaryDirectory() as output:
        config = GRPOConfig.model_validate(
            {
                "output_dir": output,
                "max_steps": steps + 2,  # the run is left before its end, which would save
                "prompts_per_step": size.prompts,
                "model": {"name_or_path": str(folder), "dtype": "float32" if size.toy else "bfloat16"}
                | {"device": device.type},
                "adapter": {"r": RANK},
                "data": {"max_prompt_length": size.prompt_tokens},
                "rollout": {"num_generations": size.generations, "max_completion_length": size.completion_tokens}
                | {"max_sequences": size.prompts * size.generations}
                | (
                    {"engine": "hf"} if size.toy else {"engine": "vllm", "kv_cache": f"{size.kv_cache_bytes // GIB}GiB"}
                ),
                "update": {"max_tokens_per_batch": rows * (size.prompt_tokens + size.completion_tokens)} | update,
                "evaluation": {"every_steps": 0},
                "checkpoint": {"every_steps": 0},
            }
        )
        data = _dataset(size, len(tokenizer), steps)
        trainer = GRPOTrainer(None, [hash_reward], config, data, processing_class=tokenizer)
        trainer.stop_token_ids = ()  # every completion has all its tokens
        watch = MemoryWatch(size.kv_cache_bytes)
        if not size.toy:
            watch.follow(trainer.engine._llm, _cache_bytes)  # type: ignore[attr-defined]
        seconds, found = [], []
        with watch.running(device.type == "cuda"):
            start = time.perf_counter()
            for row in trainer.steps():
                seconds.append(time.perf_counter() - start - row.get("phase/save/seconds", 0.0))
                found.append({key: value for key, value in row.items() if isinstance(value, int | float)})
                if len(seconds) > steps:
                    break
                start = time.perf_counter()
        names = {key.split("/")[1] for row in found for key in row if key.startswith("phase/")}
        phases = {n: statistics.median(r.get(f"phase/{n}/seconds", 0.0) for r in found[1:]) for n in sorted(names)}
        peaks = [r["phase/update/peak_gib"] for r in found if "phase/update/peak_gib" in r]
        return {
            "engine": config.rollout.engine,
            "update": config.update.model_dump(exclude_defaults=True),
            "rows": found,
            "torch_peak_update_gib": max(peaks, default=None),
            **_summary(size, seconds, phases, watch),
        }


def run_lean(size: Size, steps: int, rows: int, device: torch.device) -> dict[str, Any]:
    """`run_ours` with the knobs of LEAN."""
    return run_ours(size, steps, max(1, rows // 2), device, **LEAN)


def _summary(size: Size, seconds: list[float], phases: dict[str, float], watch: MemoryWatch) -> dict[str, Any]:
    median = statistics.median(seconds[1:])
    return {
        "step_seconds": seconds,
        "median_seconds": median,
        "tokens_per_s": size.tokens / median,
        "phases": phases,
        "kv_cache_bytes": watch.kv_cache_bytes,
        **watch.row(),
    }


def _timed(owner: Any, method: str, name: str, clock: Clock, then: Callable[[], None] | None = None) -> None:
    """Bill the calls of `owner.method` to `name`, those with a gradient to the loss."""
    inner = getattr(owner, method)

    @functools.wraps(inner)
    def call(*arguments: Any, **named: Any) -> Any:
        with clock("loss forward" if torch.is_grad_enabled() and name == "log-probs" else name):
            torch.cuda.synchronize()
            found = inner(*arguments, **named)
            torch.cuda.synchronize()
        if then is not None:
            then()
        return found

    setattr(owner, method, call)


def run_trl(size: Size, steps: int, rows: int, device: torch.device) -> dict[str, Any]:
    """The same of TRL. Its head is chunked by default; gradient checkpointing is on."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import trl.generation.vllm_generation as generation
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    generation.LLM = functools.partial(generation.LLM, kv_cache_memory_bytes=size.kv_cache_bytes)
    seconds: list[float] = []

    class Times(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.start)

    with model_folder(size, device) as (folder, tokenizer), tempfile.TemporaryDirectory() as output:
        trainer = GRPOTrainer(
            model=str(folder),
            reward_funcs=lambda completions, **_: [hash_reward(one) for one in completions],
            args=GRPOConfig(
                output_dir=output,
                model_init_kwargs={"dtype": "bfloat16"},
                bf16=True,
                gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=size.prompts * size.generations // rows,
                num_generations=size.generations,
                max_completion_length=size.completion_tokens,
                max_steps=steps + 1,
                learning_rate=1e-5,
                beta=0.0,
                use_vllm=True,
                vllm_mode="colocate",
                vllm_enable_sleep_mode=True,
                vllm_gpu_memory_utilization=0.5,
                vllm_max_model_length=size.prompt_tokens + size.completion_tokens,
                generation_kwargs={"ignore_eos": True},
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=Dataset.from_list(_dataset(size, len(tokenizer), steps)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Times()],
        )
        clock, watch, reset = Clock(), MemoryWatch(size.kv_cache_bytes), torch.cuda.reset_peak_memory_stats
        watch.follow(trainer.vllm_generation.llm, _cache_bytes)
        _timed(trainer.vllm_generation, "sync_weights", "sync", clock)
        _timed(trainer.vllm_generation, "generate", "generate", clock)
        _timed(trainer, "_generate_and_score_completions", "rollout and scoring", clock, reset)
        _timed(trainer, "_get_per_token_logps_and_entropies", "log-probs", clock)
        with watch.running(True):
            trainer.train()
        calls = {name: len(found) // (steps + 1) for name, found in clock.seconds.items()}
        phases = {n: sum(f[calls[n] :]) / steps for n, f in clock.seconds.items()}  # means, without the first step
        phases = without_overlap(phases, statistics.median(seconds[1:]))
        return {
            "engine": "vllm",
            "calls_per_step": calls,
            # of the last update; torch goes on counting pools of the engine that are unmapped
            "torch_peak_update_gib": torch.cuda.max_memory_allocated() / GIB,
            **_summary(size, seconds, phases, watch),
        }


def without_overlap(phases: dict[str, float], step: float) -> dict[str, float]:
    """TRL's calls as parts of a step of `step` seconds: what "rollout and scoring" holds is taken out of it."""
    rollout = phases["rollout and scoring"]
    inside = {name: phases.get(name, 0.0) for name in ("sync", "generate", "log-probs")}
    forward = phases.get("loss forward", 0.0)
    return {
        **inside,
        "scoring and rest": rollout - sum(inside.values()),
        "loss forward": forward,
        "backward and rest": step - rollout - forward,
    }


def why_not(side: str, toy: bool) -> str | None:
    """Why this side cannot run here, or None."""
    if side != "trl" and toy:
        return None
    needed = ("vllm", "trl") if side == "trl" else ("vllm",)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    return "no toy run: needs CUDA" if toy else None


def table(sides: dict[str, Any]) -> str:
    """One line a side, then the split by phase."""
    lines = ["| side | engine | s/step | tokens/s | peak outside KV GiB | KV GiB |", "|---|---|---|---|---|---|"]
    for side, row in sides.items():
        if "skipped" in row:
            lines.append(f"| {side} | skipped: {row['skipped']} | | | | |")
            continue
        numbers = f"{row['median_seconds']:.2f} | {row['tokens_per_s']:,.0f} | {row['peak_outside_kv_gib']:.1f}"
        lines.append(f"| {side} | {row['engine']} | {numbers} | {row['kv_cache_bytes'] / GIB:.2f} |")
    for side, row in sides.items():
        split = ", ".join(f"{name} {value:.2f}" for name, value in row.get("phases", {}).items())
        lines.append(f"{side}: {split}" if split else f"{side}: no phases")
    return "\n".join(lines)


def page(data: dict[str, Any]) -> str:
    """Where the sides of one results file come from, and their table."""
    sources = [f"- {side}: {origin(row['environment'])}" for side, row in data["sides"].items()]
    lines = table(data["sides"]).split("\n")
    rows = 2 + len(data["sides"])
    return "\n".join([*lines[:rows], "", *(f"- {line}" for line in lines[rows:]), "", *sources])


def _child(given: argparse.Namespace, side: str) -> dict[str, Any]:
    """`side` in a process of its own: a process holds one sleeping engine."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "side.json"
        command = [sys.executable, "-m", "profiling.bench_step", "--child", side, "--out", str(out)]
        command += ["--device", given.device, "--steps", str(given.steps), "--rows", str(given.rows)]
        try:
            code = subprocess.run(command, timeout=given.timeout, check=False).returncode
        except subprocess.TimeoutExpired:
            return {"skipped": f"not done in {given.timeout:.0f} s"}
        if not out.exists():
            return {"skipped": f"its process ended with {code}"}
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, for checking this program")
    parser.add_argument("--only", choices=SIDES, help="one side")
    parser.add_argument("--steps", type=int, default=2, help="timed, after one that warms up")
    parser.add_argument("--rows", type=int, default=16, help="completions in a micro-batch (ours: as many tokens)")
    parser.add_argument("--timeout", type=float, default=280.0, help="seconds for one side")
    parser.add_argument("--out", type=Path, help="default: profiling/results/<device>/step.json")
    parser.add_argument("--commit", help="recorded in the JSON where the checkout has no git")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="rewrite profiling/README.md, measure nothing")
    given = parser.parse_args(arguments)
    if given.table:
        write_tables("step", page)
        return
    device = torch.device(given.device)
    if device.type != "cuda" and not given.toy:
        parser.error("without --toy this needs CUDA and vLLM")
    run = {"ours": run_ours, "ours, lean": run_lean, "trl": run_trl}
    size = TOY if given.toy else FULL
    if given.child:
        write_json(given.out, run[given.child](size, given.steps, given.rows, device))
        return
    out = given.out or HERE / "results" / device_slug(device) / "step.json"
    data: dict[str, Any] = json.loads(out.read_text()) if given.only and out.exists() else {"sides": {}}
    for side in (given.only,) if given.only else SIDES:
        reason = why_not(side, given.toy)
        if reason:
            found: dict[str, Any] = {"skipped": reason}
        else:
            found = run[side](size, given.steps, given.rows, device) if given.toy else _child(given, side)
        data["sides"][side] = found | {"environment": environment(device, given.commit)}
        write_json(out, data)
        print(f"{side}: {found.get('skipped', 'done')}", flush=True)
    print(table(data["sides"]))


if __name__ == "__main__":
    main()
