"""Random steps as tensors [T] and as rows of the float64 reference, for one and the same numbers."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import torch

from grpo.batch import Totals
from tests import reference

LENGTHS = ([1, 2, 300], [3], [1, 1, 1], [5, 0, 7, 2], [4, 9, 1, 6, 12], [2, 40, 3, 3])


@dataclass
class Case:
    """A step: S completions end to end. `mask` false means: outside the loss."""

    lengths: list[int]
    logprobs: torch.Tensor
    advantages: torch.Tensor  # [T]
    mask: torch.Tensor
    old: torch.Tensor | None
    reference: torch.Tensor
    sampler: torch.Tensor
    entropy: torch.Tensor

    @property
    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor([0, *torch.tensor(self.lengths).cumsum(0).tolist()], dtype=torch.int32)

    @property
    def totals(self) -> Totals:
        counts = [int(part.sum()) for part in self.mask.split(self.lengths)]
        return Totals(sum(counts), sum(n > 0 for n in counts), 1)

    def to(self, dtype: torch.dtype) -> Case:
        moved = {
            name: value.to(dtype)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        return replace(self, **moved)

    def rows(self) -> list[reference.Row]:
        def lists(values):
            return [None] * len(self.lengths) if values is None else [v.tolist() for v in values.split(self.lengths)]

        names = ("logprobs", "advantages", "mask", "old", "reference", "sampler", "entropy")
        columns = [lists(getattr(self, name)) for name in names]
        return [reference.Row(*row) for row in zip(*columns, strict=True)]

    def select(self, places: list[int]) -> Case:
        """Some completions in another order."""
        chosen = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                parts = value.split(self.lengths)
                chosen[name] = torch.cat([parts[i] for i in places])
        return replace(self, lengths=[self.lengths[i] for i in places], **chosen)


def make_case(
    seed: int,
    lengths: list[int] | None = None,
    *,
    drift: float = 0.3,
    noise: float = 0.3,
    masked: bool = True,
    per_token: bool = False,
) -> Case:
    """`drift`: of the policy from the old one; `noise`: of the sampler against the old one."""
    pick = random.Random(seed)
    lengths = lengths or pick.choice(LENGTHS)
    total = sum(lengths)
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(total, dtype=torch.float64, generator=generator)

    old = -normal().abs() - 0.05
    mask = torch.rand(total, generator=generator) < 0.8 if masked else torch.ones(total, dtype=torch.bool)
    if masked and len(lengths) > 2:
        mask[: lengths[0]] = pick.random() < 0.5  # at times a whole row is outside
    one_each = [pick.choice([-1.5, -0.4, 0.0, 0.7, 1.3]) for _ in lengths]
    advantages = torch.tensor(
        [a for a, n in zip(one_each, lengths, strict=True) for _ in range(n)], dtype=torch.float64
    )
    if per_token:
        advantages = advantages + normal(0.5)
    logprobs = old + normal(drift)
    sampler = old + normal(noise)
    return Case(lengths, logprobs, advantages, mask, old, logprobs + normal(0.4), sampler, normal().abs())


def run(recipe: str, case: Case, *, split: bool = False, **extra):
    """policy_loss on a case: (loss, ∂loss/∂ℓ, ∂loss/∂H, metrics)."""
    from grpo.algorithm import policy_loss

    logprobs = case.logprobs.clone().requires_grad_()
    entropy = case.entropy.clone().requires_grad_()
    given = {
        "old_logprobs": case.old,
        "sampler_logprobs": case.sampler,
        "entropy": entropy,
        "loss_mask": case.mask,
        "max_completion_length": 17,
        **extra,
    }
    loss, metrics = policy_loss(recipe, logprobs, case.advantages, case.cu_seqlens, **given)
    loss.backward()
    zero = torch.zeros_like(logprobs)
    return (
        loss.detach(),
        zero if logprobs.grad is None else logprobs.grad,
        zero if entropy.grad is None else entropy.grad,
        metrics,
    )


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


def worst(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value where that is above 1."""
    if value.numel() == 0:
        return 0.0
    difference = (value.double() - expected.double()).abs().max()
    return float(difference) / max(1.0, float(expected.double().abs().max()))


def finite(value: float) -> bool:
    return math.isfinite(value)
