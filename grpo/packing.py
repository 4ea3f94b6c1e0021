"""Variable-length samples → packed bins under a token budget, and the divisors of the whole optimizer step.

A document is prompt + completion without its last token, which predicts nothing. Row t of a bin predicts the token
after it, so a document of p prompt and c completion tokens takes p + c − 1 places and the last c of them are scored.
Positions restart at 0 in each document. Everything comes from lengths; no token value is ever compared with a pad id.
Left out: padding. A bin is [1, T] with `cu_seqlens`, never a rectangle.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grpo.batch import ScoredRollouts, Segments, TokenBatch, Totals


@dataclass(frozen=True)
class Document:
    """One prompt with one completion, on its way into a bin. `sampler_logprobs` may be empty (supervised data)."""

    row_id: int
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    sampler_logprobs: Sequence[float] = ()
    advantage: float = 0.0

    @property
    def length(self) -> int:
        """Places it takes in a bin."""
        return len(self.prompt_ids) + len(self.completion_ids) - 1


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item goes into the fullest bin that still has room, else into a new one.

    An item longer than `capacity` gets a bin of its own. Deterministic: ties keep the order of `lengths`.
    Returns the item indices of each bin.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [index for index, left in enumerate(room) if left >= lengths[item]]
        if fitting:
            target = min(fitting, key=lambda index: room[index])
            bins[target].append(item)
            room[target] -= lengths[item]
        else:
            bins.append([item])
            room.append(capacity - lengths[item])
    return bins


def segments(lengths: Sequence[int], prefixes: Sequence[tuple[int, int]] | None = None) -> Segments:
    """Segments of the given numbers of rows; `prefixes` as in `Segments` (default: none)."""
    prefixes = tuple(prefixes or [(0, 0)] * len(lengths))
    starts = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    if not any(count for _, count in prefixes):
        return Segments(tuple(lengths), prefixes, cu_seqlens)
    keys: list[int] = []
    key_starts = [0]
    for start, length, (first, count) in zip(starts, lengths, prefixes, strict=False):
        keys += [*range(first, first + count), *range(start, start + length)]
        key_starts.append(len(keys))
    return Segments(
        tuple(lengths), prefixes, cu_seqlens, torch.tensor(key_starts, dtype=torch.int32), torch.tensor(keys)
    )


def pack_documents(documents: Sequence[Document], tokens_per_batch: int) -> list[TokenBatch]:
    """Bins of at most `tokens_per_batch` tokens (a longer document stands alone). Documents are never split."""
    for document in documents:
        if not document.prompt_ids or not document.completion_ids:
            raise ValueError(f"document {document.row_id} has an empty prompt or completion (want at least one token)")
    bins = best_fit([document.length for document in documents], tokens_per_batch)
    return [_token_batch([documents[index] for index in indices]) for indices in bins]


def pack(
    scored: ScoredRollouts,
    advantages: Sequence[Sequence[float | None]],
    tokens_per_batch: int,
    *,
    skip_zero_advantage: bool,
) -> tuple[list[TokenBatch], Totals]:
    """Rollouts with their advantages [P][G] → bins and the counts of the optimizer step.

    An advantage of None leaves the completion out of bins and counts. With `skip_zero_advantage` (right only when
    neither KL nor entropy acts on such rows) a completion with A == 0 is not forwarded but still counted, so the
    gradient is that of forwarding it.
    """
    documents: list[Document] = []
    tokens = sequences = groups = 0
    for p, (prompt, completions) in enumerate(zip(scored.rollouts.prompts, scored.rollouts.completions, strict=True)):
        counted = 0
        for g, (completion, advantage) in enumerate(zip(completions, advantages[p], strict=True)):
            if advantage is None or not completion.token_ids:
                continue
            counted += 1
            tokens += len(completion.token_ids)
            if advantage == 0 and skip_zero_advantage:
                continue
            row_id = p * len(completions) + g
            documents.append(
                Document(row_id, prompt.token_ids, completion.token_ids, completion.sampler_logprobs, advantage)
            )
        sequences += counted
        groups += counted > 0
    return pack_documents(documents, tokens_per_batch), Totals(tokens, sequences, groups)


def _token_batch(documents: Sequence[Document]) -> TokenBatch:
    ids: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    scored: list[int] = []
    completion_starts = [0]
    advantages: list[float] = []
    sampler: list[float] = []
    for document in documents:
        tokens = [*document.prompt_ids, *document.completion_ids]
        num_prompt, num_completion = len(document.prompt_ids), len(document.completion_ids)
        first = len(ids) + num_prompt - 1  # the last prompt token predicts the first completion token
        ids += tokens[:-1]
        targets += tokens[1:]
        positions += range(document.length)
        scored += range(first, first + num_completion)
        completion_starts.append(len(scored))
        advantages += [0.0] * (num_prompt - 1) + [document.advantage] * num_completion
        sampler += [0.0] * (num_prompt - 1) + list(document.sampler_logprobs or [0.0] * num_completion)
    index = torch.tensor(scored, dtype=torch.int64)
    loss_mask = torch.zeros(len(ids), dtype=torch.bool)
    loss_mask[index] = True
    return TokenBatch(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        loss_mask=loss_mask,
        advantages=torch.tensor(advantages, dtype=torch.float32),
        sampler_logprobs=torch.tensor(sampler, dtype=torch.float32),
        scored_index=index,
        completion_cu_seqlens=torch.tensor(completion_starts, dtype=torch.int32),
        row_ids=torch.tensor([document.row_id for document in documents], dtype=torch.int64),
        segments=segments([document.length for document in documents]),
    )
