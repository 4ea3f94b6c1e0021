"""`bench_update --longest`: one step at each of some lengths on a card of a given size, until one does not fit.

Left out: finding the lengths, and other trainers: long_context.py does that.
"""

from __future__ import annotations

import gc
import json
import time
from dataclasses import replace
from typing import Any

import torch

from grpo.bench_card import Card
from grpo.bench_models import Case, build
from grpo.bench_step import Data, ours
from grpo.model.policy import Policy
from profiling.measure import GIB


def longest(case: Case, gigabytes: float, lengths: list[int], device: torch.device) -> list[dict[str, Any]]:
    """One step (forward, backward, 8-bit AdamW) at each length, ascending, until one does not fit."""
    found: list[dict[str, Any]] = []
    with Card(device, int(gigabytes * 1e9)):
        for length in lengths:
            gc.collect()
            torch.cuda.empty_cache()
            result: dict[str, Any] = {"card_gb": gigabytes, "tokens": length}
            try:
                found.append(result | _one_step(replace(case, length=length, bin_tokens=length), device))
            except torch.OutOfMemoryError as error:
                found.append(result | {"failed": str(error).splitlines()[0][:120]})
            print(json.dumps(found[-1]), flush=True)
            if "failed" in found[-1]:
                break
    return found


def _one_step(case: Case, device: torch.device) -> dict[str, Any]:
    from grpo.config import OptimizerConfig
    from grpo.optim import make_optimizer

    model = build(case, device, torch.bfloat16)
    policy = Policy(model, activation_checkpointing="offload", tiled_mlp=True)
    optimizer = make_optimizer(policy.trainable(), OptimizerConfig(name="adamw_8bit"))
    data = Data.make(case, device)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    ours(policy, data)()
    optimizer.step()
    torch.cuda.synchronize()
    assert policy.checkpointer is not None and policy.checkpointer.host is not None
    norm = torch.stack([p.grad.float().norm() for p in policy.trainable().values() if p.grad is not None]).norm()
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        "pinned_gib": round(policy.checkpointer.host.arena.capacity / GIB, 3),
        "gradient_norm": float(norm),
    }
