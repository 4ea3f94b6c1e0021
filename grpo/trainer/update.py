"""The update, the second screen: for each bin log-probs → loss / totals → backward; then clip, step.

Divisors were counted before the first backward, so each bin's graph is freed before the next one is built: peak
memory depends on the largest bin, not on the number of generations. With several steps on the same rollouts, the old
log-probs are those of the first step's own forward pass: its ratio is exactly 1 and no second pass is paid.
Left out: the formulas (grpo/algorithm) and the head (grpo/kernels).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo.algorithm import combine_metrics, entropy_quantile, policy_loss
from grpo.batch import RolloutBuffer, TokenBatch, Totals
from grpo.config import GRPOConfig
from grpo.model.policy import Policy
from grpo.optim import Schedule

Phase = Callable[[str], AbstractContextManager[Any]]
BatchLoss = Callable[[TokenBatch, Totals], tuple[Tensor, dict[str, Tensor], Tensor]]


def no_phase(name: str) -> AbstractContextManager[None]:
    """Bills nothing."""
    return nullcontext()


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. `applied` is false when weights and optimizer state were left untouched."""

    metrics: dict[str, float]
    applied: bool
    finite: bool
    logprobs: list[Tensor]  # [N] per bin, detached


def optimizer_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    batches: list[TokenBatch],
    totals: Totals,
    batch_loss: BatchLoss,
    phase: Phase = no_phase,
) -> StepResult:
    """Backward of every bin, then clip and step. The supervised stage runs through here too.

    `phase` is entered as "forward" and "backward" once per bin, and as "optimizer" once.
    A non-finite loss or gradient norm leaves weights, optimizer state and schedule bitwise as they were. With no bins
    (nothing to learn from) weights and optimizer state stay too, and the schedule moves on.
    """
    parameters = list(policy.trainable().values())
    learning_rate = schedule.apply(optimizer)
    optimizer.zero_grad(set_to_none=True)
    policy.module.train()
    losses, parts, logprobs = [], [], []
    for batch in batches:
        with phase("forward"):
            loss, batch_metrics, batch_logprobs = batch_loss(batch.to(policy.device), totals)
        with phase("backward"):
            loss.backward()
        losses.append(loss.detach())
        parts.append(batch_metrics)
        logprobs.append(batch_logprobs)
    with phase("optimizer"):
        loss_value, grad_norm = _clipped(parameters, losses, schedule.config.max_grad_norm)
        finite = math.isfinite(loss_value) and math.isfinite(grad_norm)
        if batches and finite:
            optimizer.step()
    if finite:
        schedule.position += 1
    optimizer.zero_grad(set_to_none=True)
    metrics: dict[str, float] = combine_metrics(parts) if any(parts) else {}
    metrics |= {"loss": loss_value, "grad_norm": grad_norm, "learning_rate": learning_rate}
    return StepResult(metrics, bool(batches) and finite, finite, logprobs)


def _clipped(parameters: Sequence[Tensor], losses: list[Tensor], max_norm: float) -> tuple[float, float]:
    """Clip the gradients; the step's loss and the norm before clipping, in one transfer to the host."""
    if not losses:
        return 0.0, 0.0
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    loss, grad_norm = torch.stack([torch.stack(losses).sum().double(), norm.double()]).tolist()
    return loss, grad_norm


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    config: GRPOConfig,
    knobs: Mapping[str, Any],
    buffer: RolloutBuffer,
    *,
    phase: Phase = no_phase,
) -> tuple[StepResult, RolloutBuffer]:
    """One GRPO optimizer step on `buffer`. Returns its result and the buffer one iteration on.

    `phase` is that of `optimizer_step`: a ledger's `phase` bills forward, backward and optimizer apart.
    """
    entropy = "grad" if config.objective.entropy_coef else True
    threshold = _entropy_threshold(policy, config, buffer)

    def batch_loss(batch: TokenBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        output = policy.logprobs(batch, config.rollout.temperature, return_entropy=entropy)

        def scored(values: Any) -> Any:
            return None if values is None else values.index_select(0, batch.scored_index)

        loss, metrics = policy_loss(
            config.objective.recipe,
            output.logprobs,
            scored(batch.advantages),
            batch.completion_cu_seqlens,
            old_logprobs=scored(batch.old_logprobs),
            reference_logprobs=scored(batch.reference_logprobs),
            sampler_logprobs=scored(batch.sampler_logprobs),
            entropy=output.entropy,
            totals=totals,
            max_completion_length=config.rollout.max_completion_length,
            entropy_threshold=threshold,
            **knobs,
        )
        return loss, metrics, output.logprobs.detach()

    result = optimizer_step(policy, optimizer, schedule, buffer.batches, buffer.totals, batch_loss, phase)
    batches = buffer.batches
    if buffer.iteration == 0 and config.objective.num_iterations > 1:
        batches = [_with_old(batch, values) for batch, values in zip(batches, result.logprobs, strict=True)]
    return result, replace(buffer, batches=batches, iteration=buffer.iteration + 1)


def add_reference_logprobs(policy: Policy, batches: list[TokenBatch], temperature: float) -> list[TokenBatch]:
    """The bins with the reference's log-probs: the same scorer and bins, adapter off or frozen copy."""
    with policy.reference() as reference:
        return [
            replace(
                batch,
                reference_logprobs=_scatter(batch, reference.logprobs(batch.to(policy.device), temperature).logprobs),
            )
            for batch in batches
        ]


def _with_old(batch: TokenBatch, logprobs: Tensor) -> TokenBatch:
    return replace(batch, old_logprobs=_scatter(batch, logprobs))


def _scatter(batch: TokenBatch, logprobs: Tensor) -> Tensor:
    """[N] at the scored places → [T], on the CPU with the rest of the batch."""
    full = torch.zeros(batch.input_ids.shape[0], dtype=torch.float32)
    full[batch.scored_index] = logprobs.detach().float().cpu()
    return full


def _entropy_threshold(policy: Policy, config: GRPOConfig, buffer: RolloutBuffer) -> float | None:
    """The step's entropy quantile (all bins), which needs a pass of its own before the first backward."""
    if config.objective.top_entropy_quantile >= 1.0 or not buffer.batches:
        return None
    with policy.evaluating(), torch.no_grad():
        entropies = [
            policy.logprobs(batch.to(policy.device), config.rollout.temperature, return_entropy=True).entropy
            for batch in buffer.batches
        ]
    return float(
        entropy_quantile(torch.cat([e for e in entropies if e is not None]), config.objective.top_entropy_quantile)
    )
