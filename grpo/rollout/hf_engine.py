"""`hf`: the policy samples from itself. A decode loop with a KV cache over any Hugging Face causal LM.

Prompts are padded on the left, positions and masks come from lengths, logits are float32, and the log-prob kept is
the one of the distribution that was really sampled: temperature, then top-k, top-p, min-p. A token is drawn by
inverting the CDF at one counter-based uniform, so a sample depends on its own seed and not on its batch.
Left out: continuous batching. Ended rows are dropped as they end; new ones start with the next batch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo.batch import Completion, Prompt, Rollouts
from grpo.model.policy import Policy
from grpo.rollout.engine import Phase, Progress, Sampling, SyncReport, unbilled, unseen
from grpo.seeds import uniforms

_COMPACT_WHEN_ENDED = 0.25  # share of ended rows at which dropping them pays for the copy of the cache


class HFEngine:
    """Samples with the trainer's own module; nothing to synchronise.

    Args:
        policy: the policy.
        tokenizer: decodes completions, once.
        max_sequences: sequences decoded at once; halved, for good, whenever so many run out of GPU memory. A sample
            depends on its own seed, so the tokens are the same up to rounding.
        say: told of that in one line.
    """

    def __init__(
        self, policy: Policy, tokenizer: Any, max_sequences: int = 256, say: Callable[[str], None] | None = None
    ) -> None:
        self._say = say or (lambda line: None)
        self.policy = policy
        self.tokenizer = tokenizer
        self.max_sequences = max_sequences
        self.policy_version = -1
        self.phase: Phase = unbilled
        self.progress: Progress = unseen

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Evaluation mode while sampling; the cache lives only inside `generate`."""
        with self.policy.evaluating():
            yield

    def load_weights(self, policy: Policy) -> SyncReport:
        """Nothing moves: the engine is the policy. The version counts on."""
        self.policy = policy
        self.policy_version += 1
        return SyncReport(self.policy_version, 0, 0.0)

    def unmapped_bytes(self) -> int:
        """None: nothing sleeps here."""
        return 0

    def release(self) -> None:
        """Nothing is elsewhere."""

    def close(self) -> None:
        """Nothing is held."""

    @torch.no_grad()
    def generate(self, prompts: list[Prompt], sampling: Sampling) -> Rollouts:
        """`num_generations` completions for each prompt. Raises RuntimeError before the first `load_weights`."""
        if self.policy_version < 0:
            raise RuntimeError("generate() before load_weights()")
        work = [(p, g) for p in range(len(prompts)) for g in range(sampling.num_generations)]
        total = len(work)
        completions: list[list[Completion]] = [[] for _ in prompts]
        with self.policy.evaluating():
            while work:
                chunk = work[: self.max_sequences]
                found = self._decode_if_it_fits(prompts, chunk, sampling)
                if found is None:
                    continue
                for (p, _), completion in zip(chunk, found, strict=True):
                    completions[p].append(completion)
                work = work[len(chunk) :]
                self.progress(total - len(work), total)
        return Rollouts(list(prompts), completions, self.policy_version)

    @torch.no_grad()
    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs at temperature 1 of tokens 1… of each sequence, by a plain forward pass."""
        scores = []
        with self.policy.evaluating():
            for sequence in sequences:
                ids = torch.tensor([sequence], device=self.policy.device)
                logits = self.policy.causal_lm(input_ids=ids, use_cache=False).logits[0, :-1].float()
                scores.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist())
        return scores

    def _decode_if_it_fits(
        self, prompts: Sequence[Prompt], chunk: list[tuple[int, int]], sampling: Sampling
    ) -> list[Completion] | None:
        """None after `max_sequences` was halved for want of memory; a single sequence that does not fit raises."""
        try:
            return self._decode(prompts, chunk, sampling)
        except torch.OutOfMemoryError:
            if len(chunk) == 1:
                raise
        gc.collect()  # outside the handler, which holds the frames and with them the cache
        torch.cuda.empty_cache()
        self.max_sequences = len(chunk) // 2
        self._say(f"out of GPU memory in the rollout: {self.max_sequences} sequences at a time from now on")
        return None

    def _decode(self, prompts: Sequence[Prompt], chunk: list[tuple[int, int]], sampling: Sampling) -> list[Completion]:
        unique = sorted({p for p, _ in chunk})
        state = self._prefill([prompts[p].token_ids for p in unique])
        state.select(torch.tensor([unique.index(p) for p, _ in chunk], device=self.policy.device))
        draws = _noise(prompts, chunk, sampling).to(self.policy.device)
        stop = torch.tensor(sampling.stop_token_ids, device=self.policy.device)
        num_rows, limit = len(chunk), sampling.max_completion_length
        tokens = torch.zeros(num_rows, limit, dtype=torch.int64, device=self.policy.device)
        logprobs = torch.zeros(num_rows, limit, dtype=torch.float32, device=self.policy.device)
        lengths = torch.full((num_rows,), limit, device=self.policy.device)
        rows = torch.arange(num_rows, device=self.policy.device)
        ended = torch.zeros(num_rows, dtype=torch.bool, device=self.policy.device)  # of the rows still in `state`
        for t in range(limit):
            drawn, drawn_logprobs = sample(state.logits, draws[rows, t], sampling)
            live = rows[~ended]
            tokens[live, t], logprobs[live, t] = drawn[~ended], drawn_logprobs[~ended]
            just_ended = torch.isin(drawn, stop) & ~ended
            lengths[rows[just_ended]] = t + 1
            ended |= just_ended
            num_ended = int(ended.sum())
            if num_ended == len(rows) or t + 1 == limit:
                break
            if num_ended >= _COMPACT_WHEN_ENDED * len(rows):
                keep = (~ended).nonzero()[:, 0]
                state.select(keep)
                rows, drawn, ended = rows[keep], drawn[keep], ended[keep]
            self._advance(state, drawn)
        return self._completions(tokens, logprobs, lengths, sampling)

    def _prefill(self, prompt_ids: Sequence[Sequence[int]]) -> _DecodeState:
        lengths = torch.tensor([len(ids) for ids in prompt_ids])
        width = int(lengths.max())
        input_ids = torch.zeros(len(prompt_ids), width, dtype=torch.int64)
        for row, ids in enumerate(prompt_ids):
            input_ids[row, width - len(ids) :] = torch.tensor(ids)
        place = torch.arange(width)[None] - (width - lengths)[:, None]  # negative on the left padding
        state = _DecodeState(
            attention_mask=(place >= 0).long().to(self.policy.device),
            next_position=lengths.to(self.policy.device),
        )
        self._forward(state, input_ids.to(self.policy.device), place.clamp_min(0).to(self.policy.device))
        return state

    def _advance(self, state: _DecodeState, drawn: Tensor) -> None:
        state.attention_mask = torch.cat([state.attention_mask, torch.ones_like(state.attention_mask[:, :1])], 1)
        self._forward(state, drawn[:, None], state.next_position[:, None])
        state.next_position = state.next_position + 1

    def _forward(self, state: _DecodeState, input_ids: Tensor, positions: Tensor) -> None:
        arguments: dict[str, Any] = {self.policy.cache_name: state.cache}
        if self.policy.takes_positions:
            arguments["position_ids"] = positions
        output = self.policy.backbone(
            input_ids=input_ids,
            attention_mask=state.attention_mask,
            use_cache=True,
            **arguments,
        )
        state.cache = output[self.policy.cache_name]
        state.logits = self.policy.head.logits(output.last_hidden_state[:, -1])

    def _completions(self, tokens: Tensor, logprobs: Tensor, lengths: Tensor, sampling: Sampling) -> list[Completion]:
        stop = set(sampling.stop_token_ids)
        ids = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            Completion(row, values[: len(row)], "stop" if row[-1] in stop else "length", text)
            for row, values, text in zip(ids, logprobs.tolist(), texts, strict=True)
        ]


@dataclass
class _DecodeState:
    """Rows being decoded: [B, past] mask, [B] next position, KV cache, [B, V] float32 logits of the next token."""

    attention_mask: Tensor
    next_position: Tensor
    cache: Any = None
    logits: Tensor = None  # type: ignore[assignment]

    def select(self, rows: Tensor) -> None:
        self.attention_mask = self.attention_mask[rows]
        self.next_position = self.next_position[rows]
        self.logits = self.logits[rows]
        self.cache.batch_select_indices(rows)


def _noise(prompts: Sequence[Prompt], chunk: list[tuple[int, int]], sampling: Sampling) -> Tensor:
    """[B, max_completion_length] float64 uniforms, one stream per sample."""
    seeds = np.array([sampling.seed_of(prompts[p], g) for p, g in chunk], dtype=np.uint64)
    counters = np.arange(sampling.max_completion_length, dtype=np.uint64)
    return torch.from_numpy(uniforms(seeds[:, None], counters[None]))


def sample(logits: Tensor, draws: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row and its log-prob under the distribution sampled from.

    Args:
        logits: [B, V] float32.
        draws: [B] float64 uniforms in [0, 1).
        sampling: temperature 0 takes the argmax and reports its log-prob at temperature 1.

    Returns:
        tokens [B] int64, log-probs [B] float32.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, _gather(logits.log_softmax(-1), tokens)
    logprobs = truncate_logits(logits / sampling.temperature, sampling).log_softmax(-1)
    cdf = logprobs.double().exp().cumsum(-1)
    total = cdf[:, -1:]
    target = torch.minimum(draws[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cdf, target, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
    return tokens, _gather(logprobs, tokens)


def truncate_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Set to −inf what top-k, then top-p (Holtzman et al. 2020), then min-p (Nguyen et al. 2024) exclude; [B, V]."""
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of all likelier tokens
        excluded = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= sampling.top_p)
        logits = logits.masked_fill(excluded, -torch.inf)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    return logits


def _gather(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(1, tokens[:, None])[:, 0].float()
