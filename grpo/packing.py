"""Variable-length samples → packed bins under a token budget, and the divisors of the whole optimizer step.

A document is prompt + completion without its last token, which predicts nothing. Row t of a bin predicts the token
after it, so a document of P prompt and c completion tokens takes P − 1 + c places and the last c of them are scored.
Positions restart at 0 in each document. Everything comes from lengths; no token value is ever compared with a pad id.

With shared prompts the documents of a group that lie in one bin take P − 1 + Σ c places instead of Σ (P − 1 + c): the
first P − 1 prompt tokens are one unscored segment, the prefix of the completions' segments. The last prompt token opens
each of those, since it predicts a completion's first token: one scored row a completion token, shared or not.
Left out: padding. A bin is [1, T] with `cu_seqlens`, never a rectangle.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending: the first that is large enough is the fullest
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect.bisect_left(room, (lengths[item], 0))
        if place < len(room):
            left, target = room.pop(place)
            bins[target].append(item)
        else:
            left, target = capacity, len(bins)
            bins.append([item])
        bisect.insort(room, (left - lengths[item], target))
    return bins


def balanced_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """As many bins as `best_fit` needs, none larger than its largest, and about equally full.

    The largest bin sets the peak of memory, and a small tail costs as many launches as a full bin. Items go, longest
    first, into the emptiest bin (Graham 1969, longest processing time); where that overflows, into the fullest bin
    with room, under the smallest limit found by halving that needs no further bin (Coffman, Garey and Johnson 1978,
    MULTIFIT, here with best fit). Items longer than `capacity` stand alone. Deterministic from the lengths.
    Returns the item indices of each bin.
    """
    alone = [[item] for item, length in enumerate(lengths) if length > capacity]
    items = [item for item, length in enumerate(lengths) if length <= capacity]
    short = [lengths[item] for item in items]
    bins = _evened(short, best_fit(short, capacity)) if items else []
    return alone + [[items[index] for index in indices] for indices in bins]


def _evened(lengths: Sequence[int], bins: list[list[int]]) -> list[list[int]]:
    """The division of the items into `len(bins)` bins whose largest is smallest, of three: given, LPT, MULTIFIT."""

    def largest(found: list[list[int]]) -> int:
        return max(sum(lengths[item] for item in indices) for indices in found)

    best = min(bins, _longest_first(lengths, len(bins)), key=largest)
    low, high = -(-sum(lengths) // len(bins)), largest(best) - 1  # no division beats the rounded-up mean
    while low <= high:
        limit = (low + high) // 2
        found = best_fit(lengths, limit)
        if len(found) <= len(bins) and largest(found) <= limit:
            best, high = found, limit - 1
        else:
            low = limit + 1
    return best


def _longest_first(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, index) for index in range(num_bins)]
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        load, index = heapq.heappop(heap)
        bins[index].append(item)
        heapq.heappush(heap, (load + lengths[item], index))
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
    """Bins of at most `tokens_per_batch` tokens (a longer document stands alone). Documents are never split.

    Raises:
        ValueError: a prompt or a completion is empty.
    """
    return _pack_items([[document] for document in documents], tokens_per_batch)


def pack(
    scored: ScoredRollouts,
    advantages: Sequence[Sequence[float | None]],
    tokens_per_batch: int,
    *,
    skip_zero_advantage: bool,
    share_prompts: bool = False,
) -> tuple[list[TokenBatch], Totals]:
    """Rollouts with their advantages [P][G] → bins and the counts of the optimizer step.

    An advantage of None leaves the completion out of bins and counts. With `skip_zero_advantage` (right only when
    neither KL nor entropy acts on such rows) a completion with A == 0 is not forwarded but still counted, so the
    gradient is that of forwarding it. With `share_prompts` a bin holds the prompt of a group once; a group that does
    not fit into one bin is divided over several. Totals do not depend on either.

    Raises:
        ValueError: the prompt of a completion that is packed is empty.
    """
    packed: list[list[Document]] = []
    tokens = sequences = groups = 0
    for p, (prompt, completions) in enumerate(zip(scored.rollouts.prompts, scored.rollouts.completions, strict=True)):
        group: list[Document] = []
        counted = 0
        for g, (completion, advantage) in enumerate(zip(completions, advantages[p], strict=True)):
            if advantage is None or not completion.token_ids:
                continue
            counted += 1
            tokens += len(completion.token_ids)
            if advantage == 0 and skip_zero_advantage:
                continue
            row_id = p * len(completions) + g
            group.append(
                Document(row_id, prompt.token_ids, completion.token_ids, completion.sampler_logprobs, advantage)
            )
        sequences += counted
        groups += counted > 0
        packed += _divided(group, tokens_per_batch) if share_prompts else [[document] for document in group]
    return _pack_items(packed, tokens_per_batch), Totals(tokens, sequences, groups)


def smaller_bins(batches: Sequence[TokenBatch], tokens_per_batch: int) -> list[TokenBatch]:
    """The same documents in bins of at most `tokens_per_batch` rows, for a device that the bins do not fit.

    A bin that is small enough stays as it is. In one that is not each document gets its own prompt again; one that is
    longer than the limit stands alone. The gradient of a step does not depend on any of this.
    """
    found: list[TokenBatch] = []
    for batch in batches:
        if sum(batch.segments.lengths) <= tokens_per_batch:
            found.append(batch)
            continue
        rows = _rows_of_documents(batch)
        for documents in balanced_bins([len(index) for index in rows], tokens_per_batch):
            found.append(_of_documents(batch, sorted(documents), rows))
    return found


_PER_ROW = (
    "input_ids", "targets", "positions", "loss_mask", "advantages", "sampler_logprobs", "old_logprobs",
    "reference_logprobs",
)  # fmt: skip


def _rows_of_documents(batch: TokenBatch) -> list[torch.Tensor]:
    """Rows of each document of a bin: its shared prefix, if it has one, and its own."""
    starts = itertools.accumulate(batch.segments.lengths, initial=0)
    rows = []
    for start, length, (first, count) in zip(starts, batch.segments.lengths, batch.segments.prefixes, strict=False):
        if batch.loss_mask[start : start + length].any():  # else it is a prefix
            rows.append(torch.cat([torch.arange(first, first + count), torch.arange(start, start + length)]))
    return rows


def _of_documents(batch: TokenBatch, documents: Sequence[int], rows: Sequence[torch.Tensor]) -> TokenBatch:
    index = torch.cat([rows[d] for d in documents])
    columns: dict[str, Any] = {
        name: None if (column := getattr(batch, name)) is None else column.index_select(0, index) for name in _PER_ROW
    }
    counts = batch.completion_cu_seqlens.diff()[list(documents)]
    return TokenBatch(
        scored_index=columns["loss_mask"].nonzero().squeeze(1),
        completion_cu_seqlens=torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=counts.dtype)]),
        row_ids=batch.row_ids[list(documents)],
        segments=segments([len(rows[d]) for d in documents]),
        **columns,
    )


def packing_metrics(batches: Sequence[TokenBatch]) -> dict[str, float]:
    """How full the bins of a step are: the numbers that a row of metrics.jsonl keeps.

    `packing/tokens` rows in `packing/num_bins` bins; `packing/tokens_unshared` rows if every completion had its own
    prompt; `packing/utilization` = tokens / (bins × largest bin), in (0, 1], left out when there is no bin.
    """
    sizes = [sum(batch.segments.lengths) for batch in batches]
    metrics = {
        "packing/num_bins": float(len(sizes)),
        "packing/tokens": float(sum(sizes)),
        "packing/tokens_unshared": float(sum(_tokens_unshared(batch.segments) for batch in batches)),
    }
    return {**metrics, "packing/utilization": sum(sizes) / (len(sizes) * max(sizes))} if sizes else metrics


def _tokens_unshared(layout: Segments) -> int:
    """Every segment with its prefix in front, less the prefixes' own rows."""
    return sum(layout.key_lengths) - sum(count for _, count in set(layout.prefixes))


def _divided(group: Sequence[Document], tokens_per_batch: int) -> list[list[Document]]:
    """A group's documents in pieces that fit into a bin with their prompt once (a longer document stands alone)."""
    if not group:
        return []
    room = tokens_per_batch - (len(group[0].prompt_ids) - 1)
    pieces = best_fit([len(document.completion_ids) for document in group], room)
    return [[group[index] for index in sorted(indices)] for indices in pieces]


def _pack_items(items: Sequence[Sequence[Document]], tokens_per_batch: int) -> list[TokenBatch]:
    """Items are one or more documents with the same prompt; they are never split."""
    for document in itertools.chain.from_iterable(items):
        if not document.prompt_ids or not document.completion_ids:
            raise ValueError(f"document {document.row_id} has an empty prompt or completion (want at least one token)")
    sizes = [len(item[0].prompt_ids) - 1 + sum(len(document.completion_ids) for document in item) for item in items]
    return [_token_batch([items[index] for index in indices]) for indices in balanced_bins(sizes, tokens_per_batch)]


def _token_batch(items: Sequence[Sequence[Document]]) -> TokenBatch:
    rows = _Rows()
    for item in items:
        prompt_ids = item[0].prompt_ids
        prefix = (len(rows.ids), len(prompt_ids) - 1) if len(prompt_ids) > 1 else (0, 0)
        rows.add_prompt(prompt_ids)
        for document in item:
            rows.add_completion(document)
        counts = [len(document.completion_ids) for document in item]
        if len(item) == 1 or not prefix[1]:
            rows.add_segments([prefix[1] + count for count in counts], (0, 0))
        else:
            rows.add_segments([prefix[1]], (0, 0))
            rows.add_segments(counts, prefix)
    return rows.batch()


class _Rows:
    """The columns of a bin while it is filled."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.targets: list[int] = []
        self.positions: list[int] = []
        self.scored: list[int] = []
        self.completion_starts = [0]
        self.advantages: list[float] = []
        self.sampler: list[float] = []
        self.row_ids: list[int] = []
        self.lengths: list[int] = []
        self.prefixes: list[tuple[int, int]] = []

    def add_prompt(self, prompt_ids: Sequence[int]) -> None:
        """All of the prompt but its last token: rows that are not scored."""
        count = len(prompt_ids) - 1
        self.ids += prompt_ids[:-1]
        self.targets += prompt_ids[1:]
        self.positions += range(count)
        self.advantages += [0.0] * count
        self.sampler += [0.0] * count

    def add_completion(self, document: Document) -> None:
        """The last prompt token and the completion without its last token: the rows that predict the completion."""
        count, first = len(document.completion_ids), len(document.prompt_ids) - 1
        self.scored += range(len(self.ids), len(self.ids) + count)
        self.completion_starts.append(len(self.scored))
        self.ids += [document.prompt_ids[-1], *document.completion_ids[:-1]]
        self.targets += document.completion_ids
        self.positions += range(first, first + count)
        self.advantages += [document.advantage] * count
        self.sampler += document.sampler_logprobs or [0.0] * count
        self.row_ids.append(document.row_id)

    def add_segments(self, lengths: Sequence[int], prefix: tuple[int, int]) -> None:
        self.lengths += lengths
        self.prefixes += [prefix] * len(lengths)

    def batch(self) -> TokenBatch:
        index = torch.tensor(self.scored, dtype=torch.int64)
        loss_mask = torch.zeros(len(self.ids), dtype=torch.bool)
        loss_mask[index] = True
        return TokenBatch(
            input_ids=torch.tensor(self.ids, dtype=torch.int64),
            targets=torch.tensor(self.targets, dtype=torch.int64),
            positions=torch.tensor(self.positions, dtype=torch.int64),
            loss_mask=loss_mask,
            advantages=torch.tensor(self.advantages, dtype=torch.float32),
            sampler_logprobs=torch.tensor(self.sampler, dtype=torch.float32),
            scored_index=index,
            completion_cu_seqlens=torch.tensor(self.completion_starts, dtype=torch.int32),
            row_ids=torch.tensor(self.row_ids, dtype=torch.int64),
            segments=segments(self.lengths, self.prefixes),
        )
