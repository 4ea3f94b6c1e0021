"""One try of `grpo bench` in this process: figures of whole optimizer steps, or the gradient of one.

A try is a fresh model, a short warm-up step (so that kernels are compiled and optimizer state exists, as in the middle
of a run), then whole optimizer steps on one row: forward, GRPO loss, backward, clip, 8-bit AdamW (fp32 on a CPU).
Left out: which lengths are tried (bench.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo.bench_card import Card, Rate, model_flops
from grpo.bench_models import Case, build
from grpo.bench_peers import PEERS
from grpo.bench_search import Row
from grpo.bench_step import Data, Method, num_prompt, ours
from grpo.config import OptimizerConfig
from grpo.errors import RunError, clip
from grpo.ledger import GIB
from grpo.model.attention import spare_rows
from grpo.model.policy import Policy
from grpo.optim import make_optimizer

WARM_UP = 2048  # tokens
AGAIN_BELOW = 20.0  # seconds: a step that takes less is timed a second time


def attempt_here(case: Case, method: Method, card: Card, rate: Rate, files: Path | None = None) -> Row:
    """Some steps at `case.length` from a clean allocator: their figures, or `failed` with what ran out.

    Args:
        files: where a peer's `write` has written.

    Raises:
        RuntimeError: anything but memory that ran out; also memory still held by what ran before.
    """
    row: Row = {"tokens": case.length, "completion": case.length - num_prompt(case.length)}
    card.clean()
    card.check_empty()
    start = time.perf_counter()
    try:
        row |= _steps(case, method, card, rate, files)
    except RuntimeError as error:
        if not _ran_out(error):
            raise
        row["failed"] = clip(error, 160)
    card.clean()
    return row | {"wall_s": round(time.perf_counter() - start, 2)}


def _ran_out(error: RuntimeError) -> bool:
    of_host = isinstance(error, RunError) and "host memory" in str(error)
    return of_host or isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def _steps(case: Case, method: Method, card: Card, rate: Rate, files: Path | None) -> Row:
    model, update, policy = _prepared(case, method, card, files)
    facts: Row = {"weights_gib": card.held_gib()}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(
        parameters, OptimizerConfig(name="adamw_8bit" if card.device.type == "cuda" else "adamw")
    )

    def step(run: Callable[[], None]) -> float:
        run()
        norm = nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    short = min(case.length, WARM_UP)
    step(update(Data.make(replace(case, length=short, bin_tokens=short), card.device)))
    data = Data.make(case, card.device)
    card.clean()
    facts |= {"pin_seconds": _pin(policy, data)}
    run = update(data)
    found = _timed(lambda: step(run), card) | card.peaks() | facts
    if policy is not None and policy.checkpointer is not None and policy.checkpointer.host is not None:
        found["pinned_gib"] = round(policy.checkpointer.host.arena.capacity / GIB, 4)
    if not math.isfinite(found["gradient_norm"]):
        raise RunError(f"{method.name}, {case.length} tokens: the gradient is not finite")
    found["tokens_per_s"] = round(case.rows * case.length / found["seconds"], 1)
    found["mfu"] = round(model_flops(model, case) / found["seconds"] / rate.flops, 4)
    return found


def _prepared(
    case: Case, method: Method, card: Card, files: Path | None = None, **changes: Any
) -> tuple[nn.Module, Callable[[Data], Callable[[], None]], Policy | None]:
    """The case's model, its update over given data, and our policy around it."""
    if method.peer:
        peer = PEERS[method.name]
        model = peer.build(case, card.device, card.dtype, files, **changes)
        return model, peer.update(model, case.rows, card.device), None
    model = build(case, card.device, card.dtype, **changes)
    policy = Policy(model, **dict(method.options))
    return model, lambda data: ours(policy, data), policy


def _timed(step: Callable[[], float], card: Card) -> Row:
    """The last of one or two steps, the second only after a quick first one."""
    count, seconds = 0, 0.0
    while count < 2 and seconds < AGAIN_BELOW:
        count += 1
        card.synchronize()
        start = time.perf_counter()
        norm = step()
        card.synchronize()
        seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 4), "steps": count, "gradient_norm": norm}


def _pin(policy: Policy | None, data: Data) -> float | None:
    """Seconds to pin the host memory of the coming step, which a run pays once; None where there is none."""
    host = policy.checkpointer.host if policy is not None and policy.checkpointer is not None else None
    if policy is None or host is None:
        return None
    start = time.perf_counter()
    like = policy.head.weight
    tokens = data.batches[0].input_ids.shape[0] + spare_rows(data.batches[0].segments, like)
    host.arena.reserve(len(policy.layers) - 1, tokens * like.shape[1] * like.element_size())
    return round(time.perf_counter() - start, 2)


def gradient_here(
    case: Case, method: Method, device: torch.device, files: Path | None = None, **changes: Any
) -> dict[str, Tensor]:
    """`gradients` of one step of a fresh model."""
    model, update, _ = _prepared(case, method, Card(device), files, **changes)
    return gradients(model, update(Data.make(case, device)))


def gradients(model: nn.Module, run: Callable[[], None]) -> dict[str, Tensor]:
    """Of the parameters after `run`, in float32 on the CPU, by name."""
    run()
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
