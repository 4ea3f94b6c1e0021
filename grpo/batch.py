"""The data that flows through a GRPO step: Python lists until `pack`, tensors after it.

    Prompt -- engine.generate --> Rollouts -- score --> ScoredRollouts
    ScoredRollouts + advantages -- pack --> list[TokenBatch], Totals

P prompts, G generations a prompt, T tokens in one packed bin, D documents in it (one prompt + completion each).
Left out: any behaviour. A function that works on these types lives in the room that owns the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Record = TypeVar("Record")
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Prompt:
    """One row of the dataset, encoded. `id` is its row (from 0); `example` holds every column of that row."""

    id: int
    token_ids: list[int]
    example: Mapping[str, Any]
    epoch: int = 0


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    `token_ids` includes the EOS that ended it. `sampler_logprobs` (float, one per token) belong to the distribution
    that was really sampled, after temperature and truncation. `finish_reason` is the only sign of truncation:
    "stop" ended by EOS, "length" cut at the limit. `text` is decoded once, without special tokens.
    """

    token_ids: list[int]
    sampler_logprobs: list[float]
    finish_reason: FinishReason
    text: str

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.sampler_logprobs):
            raise ValueError(
                f"{len(self.token_ids)} tokens but {len(self.sampler_logprobs)} sampler log-probs in a completion"
            )


@dataclass(frozen=True)
class Rollouts:
    """P prompts and their G completions each, in prompt order, sampled under weights `policy_version`."""

    prompts: list[Prompt]
    completions: list[list[Completion]]  # [P][G]
    policy_version: int


@dataclass(frozen=True)
class ScoredRollouts:
    """Rollouts with their rewards.

    `rewards` [P][G] is the weighted total; None means "no valid reward": the completion leaves the loss and its
    group's baseline. `parts` keeps each function's own values (None: not applicable, or a fault), `weights` what
    they were multiplied by, `columns` what reward functions logged per completion, `metrics` their scalars.
    """

    rollouts: Rollouts
    rewards: list[list[float | None]]
    parts: dict[str, list[list[float | None]]]
    weights: dict[str, float] = field(default_factory=dict)
    columns: dict[str, list[list[Any]]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Totals:
    """Counts over one whole optimizer step, all bins and ranks: the divisors of the loss.

    Completion tokens in the loss, completions with at least one of them, groups with at least one of those.
    Rows whose forward pass is skipped to save time (zero advantage) are counted; masked rows are not.
    """

    tokens: int
    sequences: int
    groups: int


@dataclass(frozen=True)
class Segments:
    """Which rows of a bin see which, in numbers the host knows (reading them from the device would stall it).

    A bin is S segments laid end to end. The rows of a segment attend causally to each other and, before that, to all
    rows of its prefix: (first row, number of rows) of an earlier segment, (0, 0) for none. Without prefixes a segment
    is a document. The keys of segment s, prefix rows first, are rows `key_index[key_cu_seqlens[s]:key_cu_seqlens[s+1]]`
    of the bin; both are None when no segment has a prefix, since keys are then the rows themselves.
    """

    lengths: tuple[int, ...]  # S
    prefixes: tuple[tuple[int, int], ...]  # S
    cu_seqlens: Tensor  # [S+1] int32
    key_cu_seqlens: Tensor | None = None  # [S+1] int32
    key_index: Tensor | None = None  # [K] int64

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Keys that each segment sees: its prefix and itself."""
        return tuple(length + prefix[1] for length, prefix in zip(self.lengths, self.prefixes, strict=True))

    def to(self, device: Any) -> Segments:
        """The same with every tensor on `device`."""
        return _moved(self, device)


@dataclass(frozen=True)
class TokenBatch:
    """One packed bin. Row t of the hidden states predicts `targets[t]`; all of [T] unless said otherwise.

    loss_mask is true exactly where targets[t] is a completion token. `scored_index` [N] lists those places in order
    (built from lengths on the CPU: a boolean mask on the device would cost a host sync), and
    `completion_cu_seqlens` [D+1] bounds the D completions within the N scored tokens. `row_ids` [D] says which
    completion (p * G + g) each document is.
    """

    input_ids: Tensor  # [T] int64
    targets: Tensor  # [T] int64
    positions: Tensor  # [T] int64, restarting at 0 in each document
    loss_mask: Tensor  # [T] bool
    advantages: Tensor  # [T] float32, 0 outside the loss mask
    sampler_logprobs: Tensor  # [T] float32
    scored_index: Tensor  # [N] int64
    completion_cu_seqlens: Tensor  # [D+1] int32
    row_ids: Tensor  # [D] int64
    segments: Segments
    old_logprobs: Tensor | None = None  # [T] float32
    reference_logprobs: Tensor | None = None  # [T] float32

    @property
    def cu_seqlens(self) -> Tensor:
        """[S+1] int32 bounds of the segments; S = D unless prompts are shared."""
        return self.segments.cu_seqlens

    def to(self, device: Any) -> TokenBatch:
        """The same batch with every tensor on `device`."""
        return _moved(self, device)


def _moved(record: Record, device: Any) -> Record:
    moved = {
        name: value.to(device) if isinstance(value, Segments) else value.to(device, non_blocking=True)
        for name, value in vars(record).items()
        if hasattr(value, "to")
    }
    return replace(record, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class RolloutBuffer:
    """Scored and packed rollouts while `num_iterations` optimizer steps use them.

    `iteration` counts the steps that have used it; `metrics` (of the rollouts, not of the update) appear in the row
    of each of them. `old_logprobs` of the batches are those of the first of these steps.
    """

    batches: list[TokenBatch]
    totals: Totals
    metrics: dict[str, float]
    iteration: int = 0
