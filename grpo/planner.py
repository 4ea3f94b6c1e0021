"""The planner: bytes that a run will take, phase by phase, before anything is loaded.

    plan = grpo.plan(GRPOConfig.from_file("run.yaml"), gpu="24GB")
    plan.fits, plan.peak.name, plan.peak.parts          # False, "backward", {"weights": 16060522496, …}

A phase's bytes are what torch's allocator counts at its peak, as in the ledger, and CUDA graphs; the CUDA context and
5 % for the gaps of the allocator come on top before a card is said to be large enough. The formulas are in
plan_parts.py (what stays), plan_update.py (a bin) and plan_rollout.py (sampling); advice and text in plan_report.py.
Left out: several GPUs, share_prompts (a bin holds as many rows), evaluation on longer prompts than training has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from grpo.config import AdapterConfig, GRPOConfig, RunConfig
from grpo.errors import InputError
from grpo.model.host_arena import available_host_bytes
from grpo.model.load import load_model_config
from grpo.plan_parts import (
    CUDA_CONTEXT,
    CUDA_GRAPHS,
    Facts,
    ModelFacts,
    Parts,
    gradient_bytes,
    kv_bytes_per_token,
    optimizer_bytes,
    optimizer_scratch,
    resident_parts,
    weight_bytes,
)
from grpo.plan_rollout import (
    Sequences,
    cache_room,
    engine_parts,
    engine_sampling,
    engine_weights,
    hf_parts,
    kv_cache_of,
    usable_kv_cache,
)
from grpo.plan_update import Bin, Pass, Path
from grpo.sizes import parse_card

SLACK = 0.05  # of the peak: gaps of the allocator
TOKENS_WITHOUT_GPU = 16_384
ENOUGH_TOKENS = 65_536  # a bin of a few 10K tokens fills a GPU; a larger one only costs memory
HOST_SHARE = 0.8  # of the host's free memory, for pinned layer inputs
TOKEN_STEP = 1_024


@dataclass(frozen=True)
class Phase:
    """One phase of a run and its bytes on the GPU, by part, at its worst moment."""

    name: str
    parts: Parts

    @property
    def bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """Predicted memory. All sizes in bytes.

    Attributes:
        phases: load, rollout, score, reference (if beta > 0), forward, backward, optimizer, save.
        host: pinned memory on the host, by part.
        gpu: memory of the card; None: not known.
        host_free: what this machine's memory still has; None: not known.
        tokens_per_bin: the bin that was planned with, at least the longest document.
        notes: what was assumed, one line each.
    """

    phases: tuple[Phase, ...]
    host: Parts
    gpu: int | None
    host_free: int | None
    tokens_per_bin: int
    longest_document: int
    notes: tuple[str, ...] = ()
    config: RunConfig = field(default_factory=GRPOConfig, repr=False)

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def needed(self) -> int:
        """Memory of a card on which the run fits: the peak, 5 % of it, and the CUDA context."""
        return int(self.peak.bytes * (1 + SLACK)) + CUDA_CONTEXT

    @property
    def fits_gpu(self) -> bool | None:
        """None where the card is not known."""
        return None if self.gpu is None else self.needed <= self.gpu

    @property
    def fits_host(self) -> bool:
        """Whether the pinned memory is there; true where that is not known."""
        return self.host_free is None or sum(self.host.values()) <= self.host_free

    @property
    def fits(self) -> bool:
        """Nothing known speaks against it."""
        return self.fits_gpu is not False and self.fits_host

    def phase(self, name: str) -> Phase:
        """By name; KeyError if the run has no such phase."""
        found = {phase.name: phase for phase in self.phases}
        return found[name]

    def bytes_of(self, name: str) -> int | None:
        """Peak of a phase as the ledger has it: its "update" is three phases, and CUDA graphs are not counted."""
        names = ("forward", "backward", "optimizer") if name == "update" else (name,)
        found = [phase.bytes - phase.parts.get(CUDA_GRAPHS, 0) for phase in self.phases if phase.name in names]
        return max(found, default=None)


def plan(config: RunConfig, gpu: str | int | None = None, *, hf_config: Any = None) -> Plan:
    """Predict the memory of a run. Reads the model's configuration, no weights.

    Args:
        config: a GRPOConfig or SFTConfig.
        gpu: memory of the card ("24GB", bytes); None: of the GPU here, and where there is none the plan has no verdict.
        hf_config: the model's configuration, in place of `model.name_or_path`.

    Raises:
        InputError: no such model, no causal LM, or `gpu` is no size.
    """
    return Planner(hf_config if hf_config is not None else load_model_config(config.model), gpu).plan(config)


class Planner:
    """Plans variants of one model's run; its widths are read once."""

    def __init__(self, hf_config: Any, gpu: str | int | None = None) -> None:
        self.hf_config = hf_config
        self.gpu = gpu_bytes(gpu)
        self.facts = Facts(hf_config)

    def plan(self, config: RunConfig) -> Plan:
        """See `plan`."""
        facts = self.facts.of(config)
        longest = longest_document(config)
        notes: list[str] = []
        resident = self._resident(config, facts)
        tokens = self._tokens(config, facts, resident, notes)
        phases = self._phases(config, facts, resident, Bin.full(tokens, longest))
        one = Pass(facts, Path.of(config, facts), Bin.full(tokens, longest))
        if not facts.widths.known:
            notes.append("layers of this architecture are not of a known form: their working set is an estimate")
        if self.gpu is None:
            notes.append("no GPU here: pass --gpu SIZE for a verdict")
        if isinstance(config, GRPOConfig) and config.rollout.engine == "hf":
            notes.append("rollout: the hf engine halves max_sequences by itself where memory runs out")
        host = {"layer inputs": one.host_bytes()} if one.host_bytes() else {}
        if facts.adapted and isinstance(config, GRPOConfig) and config.rollout.engine == "vllm":
            asleep = engine_weights(config, facts)  # where they are not shared; of full fine-tuning they are dropped
            host |= {"engine weights": asleep} if asleep else {}
        return Plan(phases, host, self.gpu, available_host_bytes(), tokens, longest, tuple(notes), config)

    def update(self, config: RunConfig, lengths: tuple[int, ...], *, several_bins: bool) -> list[Phase]:
        """forward, backward and optimizer of one bin of documents of these lengths, whatever `config` says of them.

        `several_bins`: an earlier bin's gradients stand already. Optimizer state is there, as after the first step.
        """
        facts = self.facts.of(config)
        return self._update(config, facts, self._resident(config, facts), Bin(lengths), several=several_bins)

    def largest_bin(self, config: RunConfig, free: int) -> int:
        """Tokens of the largest bin, up to `ENOUGH_TOKENS`, whose update, and 5 %, fits into what is loaded already and
        `free` bytes more, and whose layer inputs fit into most of the host's memory where they are offloaded."""
        facts, longest = self.facts.of(config), longest_document(config)
        resident = self._resident(config, facts)
        low = -(-longest // TOKEN_STEP)
        most = min(documents_per_step(config) * longest, ENOUGH_TOKENS)
        high = max(low, -(-most // TOKEN_STEP))
        host = available_host_bytes()
        room = int((free + sum(resident.values())) / (1 + SLACK))

        def fits(steps: int) -> bool:
            tokens = steps * TOKEN_STEP
            bin_ = Bin.full(tokens, longest)
            several = documents_per_step(config) * longest > tokens
            phases = self._update(config, facts, resident, bin_, several=several)
            pinned = Pass(facts, Path.of(config, facts), bin_).host_bytes()
            return max(phase.bytes for phase in phases) <= room and (host is None or pinned <= HOST_SHARE * host)

        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low * TOKEN_STEP

    def _tokens(self, config: RunConfig, facts: ModelFacts, resident: Parts, notes: list[str]) -> int:
        longest, asked = longest_document(config), config.update.max_tokens_per_batch
        if asked == "auto":
            if self.gpu is None:
                return max(longest, TOKENS_WITHOUT_GPU)
            free = self.gpu - CUDA_CONTEXT - sum(resident.values())
            found = self.largest_bin(config, max(0, free))
            notes.append(f"update.max_tokens_per_batch: auto is {found:,} tokens on this card")
            return found
        most = documents_per_step(config) * longest
        if asked < longest:
            notes.append(
                f"update.max_tokens_per_batch is {asked:,}, the longest document has {longest:,} tokens (prompt + "
                "completion): planned with that, since a document is never cut"
            )
        elif asked > most:
            notes.append(f"one step has {most:,} tokens at most: planned with a bin of that size")
        return max(longest, min(asked, most))

    def _resident(self, config: RunConfig, facts: ModelFacts) -> Parts:
        """What is there before the first step and stays."""
        parts = resident_parts(facts, config)
        if isinstance(config, GRPOConfig) and config.rollout.engine == "vllm":
            asleep = engine_parts(config, facts)
            if engine_weights(config, facts):  # they sleep, and the engine's buffers with them
                asleep.pop("engine")
            parts |= asleep
        return parts

    def _phases(self, config: RunConfig, facts: ModelFacts, resident: Parts, bin_: Bin) -> tuple[Phase, ...]:
        state = {"optimizer state": optimizer_bytes(facts, config)}
        held = resident | state
        one = Pass(facts, Path.of(config, facts), bin_)
        matrix = max(facts.counts.packed, default=0) * facts.element if config.model.load_in_4bit else 0
        loading = {"one matrix before packing": matrix} if matrix else {}
        phases = [Phase("load", resident | loading)]
        if isinstance(config, GRPOConfig):
            rollout = Phase("rollout", held | self._rollout(config, facts, held))
            if config.rollout.engine == "vllm":  # it starts awake, and samples once for practice
                started = {name: size for name, size in rollout.parts.items() if name not in state}
                phases = [Phase("load", started | loading)]
            phases += [rollout, Phase("score", held)]
            if config.objective.beta > 0:
                phases.append(Phase("reference", held | one.forward(gradient=False)))
        several = documents_per_step(config) * longest_document(config) > bin_.tokens
        return (*phases, *self._update(config, facts, resident, bin_, several=several), Phase("save", held))

    def _update(
        self, config: RunConfig, facts: ModelFacts, resident: Parts, bin_: Bin, *, several: bool
    ) -> list[Phase]:
        state = {"optimizer state": optimizer_bytes(facts, config)}
        one = Pass(facts, Path.of(config, facts), bin_)
        whole = gradient_bytes(facts)
        standing = {"gradients": whole} if several else {}
        step = {"gradients": whole}
        if scratch := optimizer_scratch(facts, config):
            step["optimizer's own"] = scratch
        return [
            Phase("forward", resident | state | standing | one.forward()),
            Phase("backward", resident | state | one.backward(earlier_bins=several)),
            Phase("optimizer", resident | state | step),
        ]

    def _rollout(self, config: GRPOConfig, facts: ModelFacts, held: Parts) -> Parts:
        per_token = kv_bytes_per_token(self.hf_config, config.model.dtype)
        if config.rollout.engine == "hf":
            return hf_parts(facts, Path.of(config, facts), per_token, Sequences.of(config))
        if config.rollout.engine == "server":
            return {}
        own = engine_parts(config, facts) | {"sampling": engine_sampling(config, facts)}
        if size := engine_weights(config, facts):
            own["engine weights"] = size  # they leave when it sleeps
        if self.gpu is None and (config.rollout.kv_cache == "auto" or isinstance(config.rollout.kv_cache, float)):
            return own | {"KV cache": usable_kv_cache(config, per_token)}
        beside = sum(size for name, size in held.items() if name not in ("engine", CUDA_GRAPHS))
        room = max(0, int((((self.gpu or 0) - CUDA_CONTEXT) / (1 + SLACK) - beside) / (1 - SLACK)))
        try:
            return own | {"KV cache": kv_cache_of(config, facts, per_token, room, self.gpu)}
        except InputError:  # it does not fit, and the verdict says so
            return own | {"KV cache": longest_document(config) * per_token}


# --- what `auto` means -----------------------------------------------------------------------------------------------


def auto_tokens_per_batch(config: RunConfig, hf_config: Any, free_bytes: int | None) -> int:
    """Tokens for `update.max_tokens_per_batch: auto`.

    The largest multiple of 1,024, at least the longest document and at most 65,536 or a whole step, whose update
    (forward, backward, optimizer), with 5 % for gaps of the allocator, fits beside the model that is loaded already
    into `free_bytes`, and whose offloaded layer inputs fit into most of the host's memory; optimizer state and
    gradients are not there yet. None: no GPU, 16,384.
    """
    if free_bytes is None:
        return TOKENS_WITHOUT_GPU
    return Planner(hf_config, 1).largest_bin(config, free_bytes)


def auto_kv_cache(config: GRPOConfig, hf_config: Any, free_bytes: int, *, model_loaded: bool = False) -> int:
    """Bytes of vLLM's KV cache for `rollout.kv_cache: auto`, with `free_bytes` on the GPU before the engine is made:

        min(0.95 · (free − trainer) − engine weights (0 if shared) − engine working set,
            1.05 · max_sequences · (P + R) · per token)

    trainer: weights (0 if `model_loaded`: free memory lacks them already), adapter, optimizer state, reference copy.

    Raises:
        InputError: that is less than one sequence takes.
    """
    facts = Facts(hf_config).of(config)
    free = _beside_trainer(config, facts, free_bytes, model_loaded)
    chosen = config.rollout.model_copy(update={"kv_cache": "auto"})
    per_token = kv_bytes_per_token(hf_config, config.model.dtype)
    return kv_cache_of(config.model_copy(update={"rollout": chosen}), facts, per_token, free, None)


def kv_cache_room(config: GRPOConfig, hf_config: Any, free_bytes: int, *, model_loaded: bool = False) -> int:
    """The largest cache that would fit, however much of it is used; 0 or less: none. Arguments as `auto_kv_cache`."""
    facts = Facts(hf_config).of(config)
    return cache_room(config, facts, _beside_trainer(config, facts, free_bytes, model_loaded))


def _beside_trainer(config: GRPOConfig, facts: ModelFacts, free_bytes: int, model_loaded: bool) -> int:
    trainer = sum(resident_parts(facts, config).values()) + optimizer_bytes(facts, config)
    return free_bytes - trainer + (weight_bytes(facts, config) if model_loaded else 0)


def longest_document(config: RunConfig) -> int:
    """Tokens of the longest prompt with the longest completion."""
    limits: Any = config.rollout if isinstance(config, GRPOConfig) else config
    return config.data.max_prompt_length + int(limits.max_completion_length)


def documents_per_step(config: RunConfig) -> int:
    """Documents in one optimizer step."""
    if isinstance(config, GRPOConfig):
        return config.prompts_per_step * config.rollout.num_generations
    return getattr(config, "examples_per_step", 1)


def free_gpu_bytes(device: torch.device) -> int | None:
    """What torch can still allocate on `device`: free on the card, and what its allocator keeps; None without CUDA."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def plan_of_run(
    config: RunConfig, hf_config: Any, device: torch.device, *, adapted: bool, four_bit: bool
) -> tuple[int, Plan | None]:
    """Tokens of a bin of a run whose model is on `device`, and its plan (None without CUDA).

    A model that the caller has made may be `adapted` by an adapter that the configuration does not know, planned as a
    LoRA of rank 16, or have `four_bit` weights.
    """
    if adapted and config.adapter is None:
        config = config.model_copy(update={"adapter": AdapterConfig()})
    if four_bit:
        config = config.model_copy(update={"model": config.model.model_copy(update={"load_in_4bit": True})})
    asked = config.update.max_tokens_per_batch
    tokens = auto_tokens_per_batch(config, hf_config, free_gpu_bytes(device)) if asked == "auto" else int(asked)
    if device.type != "cuda":
        return tokens, None
    update = config.update.model_copy(update={"max_tokens_per_batch": tokens})
    try:
        return tokens, plan(config.model_copy(update={"update": update}), hf_config=hf_config)
    except InputError:  # a model of a class that transformers does not know: it trains, unplanned
        return tokens, None


def gpu_bytes(gpu: str | int | None) -> int | None:
    """`gpu` as bytes; None: of the present GPU, or None without one. Raises `InputError` for what is no size."""
    if gpu is None:
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    try:
        return parse_card(gpu) if isinstance(gpu, str) else gpu
    except ValueError as error:
        raise InputError(f"gpu: {error}") from None
