"""What a plan says to people: the table, the verdict, which knob moves the peak, and the smallest change that fits.

Every saving is found by planning again with that knob changed.
Left out: knobs that change what is learned from (num_generations, the objective), but for the length of completions.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.config import AdapterConfig, GRPOConfig, RunConfig
from grpo.errors import InputError
from grpo.plan_parts import CUDA_CONTEXT
from grpo.plan_rollout import Sequences
from grpo.planner import SLACK, Plan, Planner, longest_document
from grpo.sizes import GIB, format_bytes

WIDTH = 100
_TOGETHER = "\N{NO-BREAK SPACE}"  # a name and its size stay on one line
_WORTH_NAMING = 0.01  # of a phase's bytes
_MOST_KNOBS = 4  # in one change that is proposed
_SHORTEST = 64  # tokens of a completion that is worth proposing


@dataclass(frozen=True)
class Knob:
    """One change: how it is written on the command line, and the configuration with it."""

    text: str
    section: str | None
    changes: Mapping[str, Any]

    def applied(self, config: RunConfig) -> RunConfig:
        """A new configuration."""
        if self.section is None:
            return config.model_copy(update=dict(self.changes))
        section = getattr(config, self.section).model_copy(update=dict(self.changes))
        return config.model_copy(update={self.section: section})


@dataclass(frozen=True)
class Saving:
    """What a knob takes off the peak, bytes."""

    knob: Knob
    bytes: int


def knobs(config: RunConfig) -> Iterator[Knob]:
    """Changes that may help this configuration, the cheapest first: in time, then in what is learned."""
    update = config.update
    whole = update.fused_kernels and config.adapter is not None and config.adapter.dropout == 0
    for mode in ("recompute", "offload"):
        if update.activation_checkpointing not in (mode, "offload"):
            yield _knob("update", "activation_checkpointing", mode)
    longest = longest_document(config)
    if update.max_tokens_per_batch == "auto" or update.max_tokens_per_batch > longest:
        yield _knob("update", "max_tokens_per_batch", longest)
    if update.logprob_chunk_mb > 128:
        yield _knob("update", "logprob_chunk_mb", 128)
    if isinstance(config, GRPOConfig):
        yield from _rollout_knobs(config)
    if whole and not update.tiled_mlp:
        yield _knob("update", "tiled_mlp", True)
    yield from _weight_knobs(config)


def _weight_knobs(config: RunConfig) -> Iterator[Knob]:
    if "8bit" not in config.optimizer.name:
        yield _knob("optimizer", "name", "adamw_8bit")
    if config.adapter is not None and not config.model.load_in_4bit:
        yield _knob("model", "load_in_4bit", True)
    if config.adapter is None:
        yield Knob("adapter.r=16", None, {"adapter": AdapterConfig()})
        packed = config.model.model_copy(update={"load_in_4bit": True})
        yield Knob("adapter.r=16 model.load_in_4bit=true", None, {"adapter": AdapterConfig(), "model": packed})
    elif config.adapter.dtype == "float32":
        yield _knob("adapter", "dtype", "bfloat16")


def _rollout_knobs(config: GRPOConfig) -> Iterator[Knob]:
    rollout, at_once = config.rollout, Sequences.of(config).count
    if rollout.engine == "vllm" and rollout.kv_cache != "auto":
        yield _knob("rollout", "kv_cache", "auto")
    if rollout.engine != "server":
        yield from (_knob("rollout", "max_sequences", at_once >> n) for n in range(1, 8) if at_once >> n)


def _knob(section: str, name: str, value: Any) -> Knob:
    shown = str(value).lower() if isinstance(value, bool) else value
    return Knob(f"{section}.{name}={shown}", section, {name: value})


def savings(planner: Planner, plan: Plan) -> list[Saving]:
    """What each knob alone takes off the peak, the largest saving first; those under 1 MiB are left out. Lengths and
    numbers of sequences are halved; of other knobs it is the value that saves most."""
    config = _without_auto(plan)
    candidates = list(knobs(config))
    if isinstance(config, GRPOConfig):
        half = Sequences.of(config).count // 2
        candidates = [knob for knob in candidates if knob.changes.get("max_sequences", half) == half]
    if isinstance(config, GRPOConfig) and config.rollout.max_completion_length > 1:
        candidates.append(_shorter(config, config.rollout.max_completion_length // 2))
    best: dict[tuple[str | None, ...], Saving] = {}  # of several values the least change that saves most
    for knob in candidates:
        saved = plan.peak.bytes - planner.plan(knob.applied(config)).peak.bytes
        if saved >= 2**20 and (_key(knob) not in best or saved > best[_key(knob)].bytes):
            best[_key(knob)] = Saving(knob, saved)
    return sorted(best.values(), key=lambda saving: -saving.bytes)


def _without_auto(plan: Plan) -> RunConfig:
    """With `auto`, bins and cache would grow into whatever a knob frees."""
    config = _knob("update", "max_tokens_per_batch", plan.tokens_per_bin).applied(plan.config)
    if not isinstance(config, GRPOConfig) or config.rollout.engine != "vllm" or plan.gpu is None:
        return config
    return _knob("rollout", "kv_cache", str(plan.phase("rollout").parts["KV cache"])).applied(config)


def smallest_change(planner: Planner, plan: Plan) -> list[Knob] | None:
    """The fewest knobs with which it fits, the cheapest of as many; then shorter completions. None: nothing helps."""

    def fits(chosen: Sequence[Knob]) -> bool:
        return planner.plan(_all_applied(plan.config, chosen)).fits

    available = list(knobs(plan.config))
    leanest = list({_key(knob): knob for knob in available}.values())  # of several values the last saves most
    if not fits(leanest):
        shortened = _with_shorter_completions(planner, plan, leanest)
        return None if shortened is None else _pruned(shortened, fits)
    for count in range(1, _MOST_KNOBS + 1):
        for chosen in itertools.combinations(available, count):
            if len({_key(knob) for knob in chosen}) == count and fits(chosen):
                return list(chosen)
    return _pruned(leanest, fits)


def _key(knob: Knob) -> tuple[str | None, ...]:
    return knob.section, *knob.changes


def _pruned(chosen: list[Knob], fits: Callable[[Sequence[Knob]], bool]) -> list[Knob]:
    """Without what is not needed, the dearest given up first."""
    for knob in reversed(list(chosen)):
        fewer = [other for other in chosen if other is not knob]
        if fits(fewer):
            chosen = fewer
    return chosen


def _with_shorter_completions(planner: Planner, plan: Plan, leanest: list[Knob]) -> list[Knob] | None:
    """Every knob at its leanest, and the longest completion, a power of two times less, that then fits."""
    if not isinstance(plan.config, GRPOConfig):
        return None
    length = plan.config.rollout.max_completion_length // 2
    while length >= _SHORTEST:
        shorter = _shorter(plan.config, length)
        bins = _knob("update", "max_tokens_per_batch", longest_document(shorter.applied(plan.config)))
        chosen = [shorter, *(knob for knob in leanest if _key(knob) != _key(bins)), bins]
        if planner.plan(_all_applied(plan.config, chosen)).fits:
            return chosen
        length //= 2
    return None


def _shorter(config: GRPOConfig, length: int) -> Knob:
    return _knob("rollout", "max_completion_length", length)


def _all_applied(config: RunConfig, chosen: Sequence[Knob]) -> RunConfig:
    for knob in chosen:
        config = knob.applied(config)
    return config


# --- text ------------------------------------------------------------------------------------------------------------


def plan_lines(plan: Plan) -> list[str]:
    """The summary in two or three lines: the peak and what sets it, the verdict, host memory."""
    peak = plan.peak
    largest = sorted(peak.parts.items(), key=lambda part: -part[1])[:3]
    lines = [
        f"plan: peak {format_bytes(peak.bytes)} in {peak.name} ("
        + ", ".join(f"{name} {format_bytes(size)}" for name, size in largest)
        + f"), bins of {plan.tokens_per_bin:,} tokens"
    ]
    if plan.gpu is not None:
        lines.append("plan: " + _verdict(plan))
    if plan.host:
        lines.append("plan: " + _host(plan))
    return lines


def compare_line(plan: Plan, row: Mapping[str, Any]) -> str | None:
    """ "planned 18.70 GiB, measured 18.50 GiB (−1 %)" of the phase that took most in a row of metrics.jsonl.

    None where the row has no figures of a GPU, or none of a phase that was planned.
    """
    found: list[tuple[float, str, int]] = []
    for key, value in row.items():
        parts = key.split("/")
        if (
            len(parts) != 3
            or parts[0] != "phase"
            or parts[2] != "peak_gib"
            or f"phase/{parts[1]}/reserved_gib" not in row
        ):
            continue
        planned = plan.bytes_of(parts[1])
        if planned is not None:
            found.append((value, parts[1], planned))
    if not found:
        return None
    measured, name, planned = max(found)
    off = measured * GIB / planned - 1
    return (
        f"{name}: planned {format_bytes(planned)}, measured {format_bytes(measured * GIB)} "
        f"({'−' if off < 0 else '+'}{abs(off) * 100:.0f} %)"
    )


def plan_table(plan: Plan, planner: Planner) -> list[str]:
    """The whole plan as text, lines of at most 100 columns."""
    config = plan.config
    lines = [_title(config), ""]
    width = max(len(phase.name) for phase in plan.phases)
    lines.append(f"{'phase':<{width}}  {'peak':>10}  parts")
    for phase in plan.phases:
        lines += _phase_lines(phase.name, phase.bytes, phase.parts, width, marked=phase is plan.peak)
    lines += ["", *_wrapped(f"bins of {plan.tokens_per_bin:,} tokens, longest document {plan.longest_document:,}", "")]
    if plan.host:
        lines += _wrapped(_host(plan), "")
    lines += [line for note in plan.notes for line in _wrapped(f"note: {note}", "      ")]
    lines += ["", *_wrapped(_verdict(plan), "")]
    moves = savings(planner, plan)
    if moves:
        lines += ["", f"what lowers the peak ({plan.peak.name}):"]
        longest = max(len(saving.knob.text) for saving in moves)
        lines += [f"  {saving.knob.text:<{longest}}  −{format_bytes(saving.bytes)}" for saving in moves]
    if not plan.fits:
        lines += ["", *_wrapped(_proposal(planner, plan), "  ")]
    return lines


def _title(config: RunConfig) -> str:
    model, adapter = config.model, config.adapter
    how = "full fine-tuning" if adapter is None else f"LoRA r={adapter.r}"
    weights = "NF4" if model.load_in_4bit else model.dtype
    name = model.name_or_path or "model"
    room = WIDTH - 60
    shown = name if len(name) <= room else "…" + name[-room + 1 :]
    return f"{shown}: {weights}, {how}, {config.optimizer.name}, {config.update.activation_checkpointing}"


def _phase_lines(name: str, total: int, parts: Mapping[str, int], width: int, *, marked: bool) -> list[str]:
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    named = [(part, size) for part, size in ordered if size >= _WORTH_NAMING * total]
    if rest := total - sum(size for _, size in named):
        named.append(("rest", rest))
    text = ", ".join(f"{part} {format_bytes(size)}".replace(" ", _TOGETHER) for part, size in named)
    start = f"{name:<{width}}  {format_bytes(total):>10}{'*' if marked else ' '} "
    wrapped = textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
    return [line.replace(_TOGETHER, " ") for line in wrapped]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False)


def _verdict(plan: Plan) -> str:
    needed = (
        f"peak {format_bytes(plan.peak.bytes)} + {SLACK:.0%} for gaps + CUDA context {format_bytes(CUDA_CONTEXT)} = "
        f"{format_bytes(plan.needed)}"
    )
    if plan.gpu is None:
        return needed
    there = format_bytes(plan.gpu)
    if plan.fits_gpu:
        return f"fits: {needed} of {there}"
    return f"does not fit: {needed}, {format_bytes(plan.needed - plan.gpu)} more than the {there} there are"


def _host(plan: Plan) -> str:
    total = sum(plan.host.values())
    free = "" if plan.host_free is None else f", {format_bytes(plan.host_free)} free here"
    short = "" if plan.fits_host else ": too little"
    return f"host: {format_bytes(total)} pinned for layer inputs{free}{short}"


def _proposal(planner: Planner, plan: Plan) -> str:
    change = smallest_change(planner, plan)
    if change is None:
        return "no change of these knobs makes it fit (want a smaller model or a larger GPU)"
    fitting = planner.plan(_all_applied(plan.config, change))
    return f"smallest change that fits: {' '.join(knob.text for knob in change)} ({format_bytes(fitting.needed)})"


def planned(config: RunConfig, gpu: str | int | None, hf_config: Any = None) -> tuple[Plan, list[str]]:
    """The plan and its table, for the command line. Raises `InputError` as `grpo.plan` does."""
    from grpo.model.load import load_model_config

    planner = Planner(hf_config if hf_config is not None else load_model_config(config.model), gpu)
    if planner.gpu is not None and planner.gpu <= CUDA_CONTEXT:
        raise InputError(f"gpu: {format_bytes(planner.gpu)} is less than a CUDA context takes (want one like 24GB)")
    plan = planner.plan(config)
    return plan, plan_table(plan, planner)
