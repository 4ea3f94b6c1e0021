"""Completions laid end to end: T tokens of S completions, and sums over each without a loop or a host sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Where each completion lies, and which of its tokens are in the loss."""

    ids: Tensor  # [T] int64, the completion of each token
    lengths: Tensor  # [S] int64, tokens
    loss_mask: Tensor  # [T] bool
    num_tokens: Tensor  # [S] float64, tokens in the loss (n_i)

    @classmethod
    def from_bounds(cls, cu_seqlens: Tensor, loss_mask: Tensor) -> Segments:
        """cu_seqlens [S+1], loss_mask [T] bool, on one device."""
        lengths = cu_seqlens.diff().long()
        order = torch.arange(lengths.shape[0], device=lengths.device)
        ids = torch.repeat_interleave(order, lengths, output_size=loss_mask.shape[0])
        return cls(ids, lengths, loss_mask, _segment_sum(loss_mask.double(), lengths))

    def sum(self, values: Tensor) -> Tensor:
        """[T] → [S]. `values` are 0 outside the loss mask."""
        return _segment_sum(values, self.lengths)

    def mean(self, values: Tensor) -> Tensor:
        """[T] → [S], over the tokens in the loss; 0 where there is none."""
        return self.sum(values) / self.num_tokens.clamp(min=1).to(values.dtype)

    def spread(self, values: Tensor) -> Tensor:
        """[S] → [T]."""
        return values.index_select(0, self.ids)


def _segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    # deterministic on a GPU, which adding by index is not; unsafe skips a check that would wait for the device
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0)
