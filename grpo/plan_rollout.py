"""Bytes of sampling: the KV cache, and what the engine takes beside it.

hf     decode: cache of B sequences of P + R tokens, one layer of it twice (it grows by concatenation), keys and values
       of one layer repeated to all query heads, and 24·B·V of logits (float32 twice, float64 twice: `sample`);
       prefill: the distinct prompts, padded to one length, through one layer with a mask.
vllm   cache as `rollout.kv_cache` says, weights of its own unless shared; the larger of three float32 logits
       [sequences, V] and the activations of one scheduler step; an int32 penalty table [sequences, V], the adapter's
       slot and buffers, which sleep with weights of its own and stay beside shared ones; CUDA graphs, which always stay
       (two of each size and layer with an adapter).
server nothing here.
Left out: prefix sharing in vLLM's cache (it makes the cache smaller), speculative decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo.config import GRPOConfig
from grpo.errors import InputError
from grpo.plan_parts import CUDA_GRAPHS, ModelFacts, Parts, weight_bytes
from grpo.plan_update import Bin, Pass, Path
from grpo.sizes import format_bytes, parse_bytes

BATCHED_TOKENS = 8192  # of one scheduler step of vLLM: what the engine is started with
_GRAPH = 174_000  # bytes of one layer in one captured graph: Qwen3-1.7B, 108 graphs; Qwen2.5-0.5B, 172: 117,000
_BUFFERS = int(0.2 * 2**30)  # the engine's own input and state buffers, measured with 128 sequences
_LARGEST_GRAPH = 512  # sequences
_KV_MARGIN = 1.05  # blocks that are not full


@dataclass(frozen=True)
class Sequences:
    """What is sampled at once: `count` sequences from `prompts` distinct prompts."""

    count: int
    prompts: int
    prompt: int  # tokens
    completion: int  # tokens

    @staticmethod
    def of(config: GRPOConfig) -> Sequences:
        """The largest chunk of a step's rollout."""
        rollout = config.rollout
        count = min(rollout.max_sequences, config.prompts_per_step * rollout.num_generations)
        prompts = min(config.prompts_per_step, -(-count // rollout.num_generations))
        return Sequences(count, prompts, config.data.max_prompt_length, rollout.max_completion_length)

    @property
    def tokens(self) -> int:
        """At the end of decoding."""
        return self.count * (self.prompt + self.completion)


def hf_parts(facts: ModelFacts, path: Path, kv_per_token: int, sequences: Sequences) -> Parts:
    """The larger of prefill and decoding."""
    w, s = facts.widths, sequences
    one_layer = s.tokens * facts.element * (max(w.keys, 2 * w.queries) if w.num_heads > w.num_key_heads else w.keys)
    decode = {
        "KV cache": s.tokens * kv_per_token,
        "one layer's keys and values again": one_layer,
        "logits": logit_bytes(s.count, w.vocabulary) + 28 * s.count * s.completion,
    }
    whole = Pass(facts, path, Bin((s.prompts * s.prompt,)))
    mask = s.prompts * s.prompt**2 * (1 + facts.element)
    prefill = {
        "KV cache": s.prompts * s.prompt * kv_per_token,
        "prefill": whole.layer_input() + whole.layer_forward() + mask,
    }
    return max(decode, prefill, key=lambda parts: sum(parts.values()))


def logit_bytes(rows: int, vocabulary: int) -> int:
    """What `hf_engine.sample` holds at its peak without truncation: logits and log-probs, float64 terms and sums."""
    return rows * vocabulary * (4 + 4 + 8 + 8)


def engine_parts(config: GRPOConfig, facts: ModelFacts) -> Parts:
    """vLLM beside weights and cache, whether it samples or not."""
    w, rollout = facts.widths, config.rollout
    slot = facts.counts.trained * facts.element if facts.adapted else 0
    parts = {"engine": rollout.max_sequences * w.vocabulary * 4 + slot + _BUFFERS}
    if rollout.cuda_graphs:
        parts[CUDA_GRAPHS] = num_graphs(rollout.max_sequences, adapted=facts.adapted) * w.layers * _GRAPH
    return parts


def engine_sampling(config: GRPOConfig, facts: ModelFacts) -> int:
    """What vLLM takes beside that while it samples: logits, or one scheduler step's activations before them."""
    w, sequences = facts.widths, config.rollout.max_sequences
    step = min(BATCHED_TOKENS, sequences * (config.data.max_prompt_length + config.rollout.max_completion_length))
    return max(sequences * w.vocabulary * 3 * 4, step * (2 * w.hidden + 2 * w.mlp) * 2)


def num_graphs(sequences: int, *, adapted: bool) -> int:
    """Graphs that vLLM captures: of mixed batches up to twice `sequences`, and of decoding; with an adapter also
    without it."""

    def sizes(most: int) -> int:
        return sum(size <= most for size in (1, 2, 4, *range(8, 256, 8), *range(256, _LARGEST_GRAPH + 1, 16)))

    return (sizes(2 * sequences) + sizes(sequences)) * (2 if adapted else 1)


def engine_weights(config: GRPOConfig, facts: ModelFacts) -> int:
    """What the engine loads for itself: nothing where the frozen base is shared."""
    shared = facts.adapted and config.rollout.share_weights in (True, "auto") and not config.model.load_in_4bit
    return 0 if shared else weight_bytes(facts, config)


def usable_kv_cache(config: GRPOConfig, kv_per_token: int) -> int:
    """More cache than this is never filled: max_sequences · (prompt + completion), and 5 %."""
    longest = config.data.max_prompt_length + config.rollout.max_completion_length
    return int(_KV_MARGIN * config.rollout.max_sequences * longest * kv_per_token)


def kv_cache_of(config: GRPOConfig, facts: ModelFacts, kv_per_token: int, free: int, total: int | None) -> int:
    """Bytes of vLLM's cache: the size or share that was asked for, or what `free` bytes leave.

    Raises:
        InputError: `auto`, and not even one sequence fits.
    """
    asked: Any = config.rollout.kv_cache
    if isinstance(asked, float) and asked < 1:
        return int(asked * (total or 0))
    if asked != "auto":
        return parse_bytes(asked)
    room = cache_room(config, facts, free)
    one = (config.data.max_prompt_length + config.rollout.max_completion_length) * kv_per_token
    if room < one:
        short = format_bytes(one - room)
        raise InputError(
            f"rollout.kv_cache is auto: the cache of one sequence takes {format_bytes(one)}, {short} more than is left "
            "(want a smaller rollout.max_completion_length or max_sequences, or rollout.share_weights)"
        )
    return min(room, usable_kv_cache(config, kv_per_token))


def cache_room(config: GRPOConfig, facts: ModelFacts, free: int) -> int:
    """What the cache may take of `free` bytes beside the engine's weights and working set; 5 % stay for gaps."""
    beside = sum(engine_parts(config, facts).values()) + engine_sampling(config, facts)
    return int(free * 0.95) - engine_weights(config, facts) - beside
