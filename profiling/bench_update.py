"""The policy update of real model shapes: seconds and peak memory of forward + backward, and how exact it is.

    python -m profiling.bench_update                         # every case on the first CUDA device
    python -m profiling.bench_update --case llama-8b-lora    # one
    python -m profiling.bench_update --toy --device cpu      # seconds; checks the program, not the machine
    python -m profiling.bench_update --longest 24 80         # completions that still train on a card of so many GB
    python -m profiling.bench_update --table                 # rewrite the table of profiling/README.md from the JSON

Models are built from their configuration with random weights. A call is forward and backward of one bin (or of all bins
of one optimizer step, for a group): 256 prompt tokens, the rest completion, GRPO loss with beta 0.04 and given
reference log-probs. Peers get the same tokens. Every method's gradient is held, on a model of the same widths and two
layers, against that model in float32 without any saving; so is the stock model in bfloat16, which shows what rounding
alone does.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo.bench import gradient_errors as _gradient_errors
from grpo.bench_models import CASES, SHAPES, TOY, Case, build
from grpo.bench_peers import PEERS
from grpo.bench_step import BETA, PROMPT, Data, Method, ours
from grpo.model.policy import Policy
from profiling.measure import GIB, Measurement, device_slug, environment, measure, write_json, write_tables
from profiling.update_longest import longest
from profiling.update_table import line, table

HERE = Path(__file__).parent
__all__ = [
    "BETA",
    "CASES",
    "METHODS",
    "PROMPT",
    "SHAPES",
    "TOY",
    "Case",
    "Data",
    "Method",
    "build",
    "gradient_errors",
    "main",
    "ours",
]
LONG = 4  # more bins than this are timed once

METHODS = (
    Method("ours, offload", (("activation_checkpointing", "offload"),)),
    Method("ours, offload, attention kept", (("activation_checkpointing", "offload"), ("keep_attention", True))),
    Method("ours, recompute", (("activation_checkpointing", "recompute"),)),
    Method("ours, offload, tiled MLP", (("activation_checkpointing", "offload"), ("tiled_mlp", True))),
    Method("stock layers, recompute", (("activation_checkpointing", "recompute"), ("fused_kernels", False))),
    Method("TRL", peer=True),
)


def rows(case: Case, methods: list[Method], device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """Seconds and GiB of each method on one case, or why there are none. Our methods share one model, in turn."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    data = Data.make(case, device)
    model = None
    for method in methods:
        result: dict[str, Any] = {"method": method.name}
        policy = run = None
        try:
            if model is None or method.peer:
                model = None
                _clear(device)
                model = build(case, device, dtype)
                weights = _allocated(device)
            policy = None if method.peer else Policy(model, **dict(method.options))
            run = (
                PEERS[method.name].update(model, len(data.ids), device)(data) if policy is None else ours(policy, data)
            )
            first = None
            if policy is not None and len(data.batches) > LONG:  # one bin warms up, then all are timed once
                first = ours(policy, replace(data, batches=data.batches[:1]))
            result |= _measured(run, model, device, seconds, first)
            result["weights_gib"] = round(weights / GIB, 3)
            result["tokens_per_s"] = round(data.ids.numel() / result["forward_backward"]["median_ms"] * 1e3, 1)
            if policy is not None and policy.checkpointer is not None and policy.checkpointer.host is not None:
                arena = policy.checkpointer.host.arena
                result |= {"pinned_gib": round(arena.capacity / GIB, 3), "payload_gib": round(arena.peak / GIB, 3)}
        except torch.OutOfMemoryError:
            result["skipped"] = "out of memory"
        except ImportError as error:
            result["skipped"] = f"{error}"
        if policy is not None and policy.checkpointer is not None:
            policy.checkpointer.remove()
        del policy, run
        if model is not None:
            model.zero_grad(set_to_none=True)  # one that ran out of memory half-way left some
        _clear(device)
        yield result


def _once(run: Callable[[], None], device: torch.device) -> Measurement:
    """One call, for those that take many seconds: its own time and peak."""
    before = _allocated(device)
    start = time.perf_counter()
    run()
    _allocated(device)  # synchronises
    duration = (time.perf_counter() - start) * 1e3
    peak = (torch.cuda.max_memory_allocated() - before) / GIB if device.type == "cuda" else None
    return Measurement(duration, duration, duration, 1, peak)


def _measured(
    run: Callable[[], None],
    model: nn.Module,
    device: torch.device,
    seconds: float,
    warm_up: Callable[[], None] | None,
) -> dict[str, Any]:
    def clean_run() -> None:
        run()
        model.zero_grad(set_to_none=True)

    before = _allocated(device)
    if warm_up is None:
        (found,) = measure([clean_run], device, seconds=seconds)
    else:
        warm_up()
        model.zero_grad(set_to_none=True)
        found = _once(clean_run, device)
    result: dict[str, Any] = {"forward_backward": found.as_json()}
    if found.peak_gib is not None:
        result["peak_gib"] = round(found.peak_gib + before / GIB, 3)
        result["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
    return result


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def gradient_errors(case: Case, device: torch.device) -> dict[str, float]:
    """Of all our methods (see `grpo.bench.gradient_errors`)."""
    return _gradient_errors(case, [method for method in METHODS if not method.peer], device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, for checking this program")
    parser.add_argument("--case", action="append", help="names (default: all)")
    parser.add_argument("--only", action="append", help="names of methods (default: all)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing per figure")
    parser.add_argument("--no-errors", action="store_true", help="leave the gradient errors out")
    parser.add_argument("--longest", type=float, nargs="*", help="card sizes in GB")
    parser.add_argument("--tokens", type=int, nargs="*", help="lengths to try with --longest, ascending")
    parser.add_argument("--out", type=Path, help="default: profiling/results/<device>/update.json")
    parser.add_argument("--update", action="store_true", help="keep the other cases of an earlier run's JSON")
    parser.add_argument("--commit", help="recorded in the JSON where the checkout has no git")
    parser.add_argument("--table", action="store_true", help="rewrite profiling/README.md, measure nothing")
    given = parser.parse_args(arguments)
    if given.table:
        write_tables("update", table)
        return
    device = torch.device(given.device)
    out = given.out or HERE / "results" / device_slug(given.device) / "update.json"
    env = environment(given.device, given.commit)
    data: dict[str, Any] = {"cases": {}, "longest": []}
    if given.update and out.exists():
        data |= json.loads(out.read_text())
    for gigabytes in given.longest or []:
        case = next(c for c in CASES if c.four_bit)
        data["longest"].append({"environment": env, "rows": longest(case, gigabytes, given.tokens or [], device)})
        write_json(out, data)
    chosen = (
        []
        if given.longest is not None
        else [c for c in (TOY if given.toy else CASES) if not given.case or c.name in given.case]
    )
    for case in chosen:
        data["cases"][case.name] = {"environment": env, "rows": (kept := [])}
        methods = [m for m in METHODS if not given.only or m.name in given.only]
        for found in rows(case, methods, device, given.seconds):
            kept.append(found)
            print(line(case.name, found, {}), flush=True)
            write_json(out, data)
        if not given.no_errors:
            data["cases"][case.name]["gradient_errors"] = gradient_errors(case, device)
            write_json(out, data)
    print(table(data))


if __name__ == "__main__":
    main()
