"""`grpo bench`: the longest completion that trains on a card, and what a step costs at given lengths.

    result = find_longest(case, WAYS, Card(torch.device("cuda"), parse_bytes("24GB")), budget_s=600)
    result = at_lengths(case, WAYS, Card(torch.device("cuda")), [8192, 32768])

One try is a fresh model, a short warm-up step (so that kernels are compiled and optimizer state exists, as in the
middle of a run), then whole optimizer steps on one row: forward, GRPO loss, backward, clip, 8-bit AdamW (fp32 on a
CPU). Memory scales with the row: further rows of a group are further bins, one after the other.

bench_card.py has the card and the arithmetic, bench_search.py the search.
Left out: rollouts, and the engine that may share the card with training.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grpo.bench_card import FORMULA, Card, Rate, model_flops
from grpo.bench_models import MAX_POSITIONS, TRAINING_METHODS, Case, build, model_config
from grpo.bench_peers import PEERS
from grpo.bench_search import Row, Search
from grpo.bench_step import Data, Method, num_prompt, ours
from grpo.config import OptimizerConfig
from grpo.errors import InputError, RunError, clip
from grpo.ledger import GIB
from grpo.model.attention import spare_rows
from grpo.model.load import resolve_device
from grpo.model.policy import Policy
from grpo.optim import make_optimizer
from grpo.sizes import parse_card
from grpo.trainer.metrics import environment_facts

WAYS = (
    Method("ours, recompute", (("activation_checkpointing", "recompute"),)),
    Method("ours, offload", (("activation_checkpointing", "offload"),)),
    Method("ours, offload, tiled MLP", (("activation_checkpointing", "offload"), ("tiled_mlp", True))),
    *(Method(name, peer=True) for name in PEERS),
)
PLAIN = "stock layers, no savings"
WARM_UP = 2048  # tokens
AGAIN_BELOW = 20.0  # seconds: a step that takes less is timed a second time
Say = Callable[[str], None]


# --- one try ---------------------------------------------------------------------------------------------------------


def attempt(case: Case, method: Method, card: Card, rate: Rate) -> Row:
    """One step at `case.length` from a clean allocator: its figures, or `failed` with what ran out.

    Raises:
        RuntimeError: anything but memory that ran out.
    """
    row: Row = {"tokens": case.length, "completion": case.length - num_prompt(case.length)}
    card.clean()
    start = time.perf_counter()
    try:
        row |= _steps(case, method, card, rate)
    except RuntimeError as error:
        if not _ran_out(error):
            raise
        row["failed"] = clip(error, 160)
    card.clean()
    return row | {"wall_s": round(time.perf_counter() - start, 2)}


def _ran_out(error: RuntimeError) -> bool:
    of_host = isinstance(error, RunError) and "host memory" in str(error)
    return of_host or isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def _steps(case: Case, method: Method, card: Card, rate: Rate) -> Row:
    model = build(case, card.device, card.dtype)
    facts: Row = {"weights_gib": card.held_gib()}
    update, policy = _update(model, case, method, card)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(
        parameters, OptimizerConfig(name="adamw_8bit" if card.device.type == "cuda" else "adamw")
    )

    def step(run: Callable[[], None]) -> float:
        run()
        norm = nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    short = min(case.length, WARM_UP)
    step(update(Data.make(replace(case, length=short, bin_tokens=short), card.device)))
    data = Data.make(case, card.device)
    card.clean()
    facts |= {"pin_seconds": _pin(policy, data)}
    run = update(data)
    found = _timed(lambda: step(run), card) | card.peaks() | facts
    if policy is not None and policy.checkpointer is not None and policy.checkpointer.host is not None:
        found["pinned_gib"] = round(policy.checkpointer.host.arena.capacity / GIB, 4)
    if not math.isfinite(found["gradient_norm"]):
        raise RunError(f"{method.name}, {case.length} tokens: the gradient is not finite")
    found["tokens_per_s"] = round(case.rows * case.length / found["seconds"], 1)
    found["mfu"] = round(model_flops(model, case) / found["seconds"] / rate.flops, 4)
    return found


def _update(
    model: nn.Module, case: Case, method: Method, card: Card
) -> tuple[Callable[[Data], Callable[[], None]], Policy | None]:
    if method.peer:
        return PEERS[method.name](model, case.rows, card.device), None
    policy = Policy(model, **dict(method.options))
    return lambda data: ours(policy, data), policy


def _timed(step: Callable[[], float], card: Card) -> Row:
    """The last of one or two steps, the second only after a quick first one."""
    count, seconds = 0, 0.0
    while count < 2 and seconds < AGAIN_BELOW:
        count += 1
        card.synchronize()
        start = time.perf_counter()
        norm = step()
        card.synchronize()
        seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 4), "steps": count, "gradient_norm": norm}


def _pin(policy: Policy | None, data: Data) -> float | None:
    """Seconds to pin the host memory of the coming step, which a run pays once; None where there is none."""
    host = policy.checkpointer.host if policy is not None and policy.checkpointer is not None else None
    if policy is None or host is None:
        return None
    start = time.perf_counter()
    like = policy.head.weight
    tokens = data.batches[0].input_ids.shape[0] + spare_rows(data.batches[0].segments, like)
    host.arena.reserve(len(policy.layers) - 1, tokens * like.shape[1] * like.element_size())
    return round(time.perf_counter() - start, 2)


# --- all of it -------------------------------------------------------------------------------------------------------


def find_longest(
    case: Case,
    methods: Sequence[Method],
    card: Card,
    *,
    budget_s: float,
    probes: tuple[int, int] = (4096, 8192),
    most: int = 2**20,
    say: Say = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """For each method its tries, `longest`, `fails_at` and `limited_by`, or why it was `skipped`.

    Each method may use an equal share of what is left of the budget.
    """
    check_lengths(card, None)
    end = time.perf_counter() + budget_s
    with card:
        rate = Rate.of(card)
        for place, method in enumerate(methods):
            share = (end - time.perf_counter()) / (len(methods) - place)
            if share <= 0:
                yield {"method": method.name, "skipped": "no seconds of the budget left", "rows": []}
                continue
            search = Search(card.capacity_gib, share, most, step=min(512, probes[0]))

            def try_one(tokens: int, method: Method = method, rate: Rate = rate) -> Row:
                row = attempt(replace(case, length=tokens, bin_tokens=tokens), method, card, rate)
                say(describe(method, row))
                return row

            entry: dict[str, Any] = {"method": method.name, "gemm_tflops": round(rate.flops / 1e12, 1)}
            try:
                search.run(try_one, probes, time.perf_counter)
            except (ImportError, InputError) as error:
                yield entry | {"skipped": clip(error, 160), "rows": []}
                continue
            yield entry | {
                "rows": search.rows,
                "longest": search.longest,
                "fails_at": search.fails_at,
                "limited_by": search.limited_by,
                "peak_line_gib": search.line(),
            }


def at_lengths(
    case: Case, methods: Sequence[Method], card: Card, lengths: Sequence[int], *, say: Say = lambda text: None
) -> Iterator[dict[str, Any]]:
    """The same figures at given lengths, ascending; a method's lengths end with the first that fails."""
    with card:
        rate = Rate.of(card)
        for method in methods:
            entry: dict[str, Any] = {"method": method.name, "gemm_tflops": round(rate.flops / 1e12, 1), "rows": []}
            try:
                for tokens in sorted(lengths):
                    row = attempt(replace(case, length=tokens, bin_tokens=tokens), method, card, rate)
                    entry["rows"].append(row)
                    say(describe(method, row))
                    if "failed" in row:
                        break
            except (ImportError, InputError) as error:
                entry["skipped"] = clip(error, 160)
            yield entry


def describe(method: Method, row: Row) -> str:
    """One line of progress."""
    head = f"{method.name}: {row['tokens']:,} tokens: "
    if "failed" in row:
        return f"{head}does not fit ({row['failed']})"
    return f"{head}{row['seconds']:.3g} s, peak {row['peak_gib']:.2f} GiB, {row['tokens_per_s']:,.0f} tokens/s"


def check_lengths(card: Card, lengths: Sequence[int] | None) -> None:
    """Raises `InputError` where there is nothing to search, or a length that is no row."""
    if not lengths and math.isinf(card.capacity_gib):
        raise InputError(
            f"nothing to search on {card.device}: memory has no cap there (want lengths, or a CUDA device)"
        )
    for tokens in lengths or ():
        if tokens < 8:
            raise InputError(f"tokens is {tokens} (want at least 8: prompt and completion)")


def benchmark(
    model: str | None = None,
    training: str = "lora",
    *,
    gpu: str | None = None,
    tokens: Sequence[int] = (),
    device: str = "auto",
    budget_s: float = 600.0,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """What `grpo bench` prints and writes: the longest completion on a card of size `gpu`, or figures at `tokens`.

    Args:
        model: a name of bench_models.SHAPES or a model's folder (its weights are not read); None: qwen3-1.7b, and on a
            CPU the toy at 256 and 512 tokens.
        training: full, lora or qlora.

    Raises:
        InputError: one line, naming what is not understood.
    """
    where = resolve_device(device)
    if model is None:
        model, tokens = ("qwen3-1.7b", tokens) if where.type == "cuda" else ("toy", tokens or (256, 512))
    if training not in TRAINING_METHODS:
        raise InputError(f"method is {clip(training)!r} (want {', '.join(TRAINING_METHODS)})")
    try:
        card = Card(where, None if gpu is None else parse_card(gpu))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"gpu is {clip(gpu)!r}: it {str(error).partition(' ')[2]}") from None
    check_lengths(card, tokens)
    model_config(model)
    case = Case("bench", model, 1, MAX_POSITIONS, MAX_POSITIONS, training == "qlora", 0 if training == "full" else 16)
    methods = [way for way in WAYS if not way.peer or importlib.util.find_spec("trl")]
    if tokens:
        found = at_lengths(case, methods, card, tokens, say=say)
    else:
        found = find_longest(case, methods, card, budget_s=budget_s, say=say)
    return {
        "shape": model,
        "training": training,
        "card_gb": card.size and card.size / 1e9,
        "flops": FORMULA,
        "environment": environment_facts(),
        "methods": list(found),
        "gradient_errors": gradient_errors(case, methods, card.device),
    }


# --- how exact it is -------------------------------------------------------------------------------------------------


def gradient_errors(
    case: Case, methods: Sequence[Method], device: torch.device, length: int = 1024
) -> dict[str, float]:
    """‖g − g*‖ / ‖g*‖ over all gradients, two rows, two layers of the case's widths; g* in float32 without any saving.

    With 4-bit weights g* uses the dequantised ones. PLAIN is the stock model in the case's dtype: what rounding alone
    does. Peers that cannot run here are left out.
    """
    length = min(case.length, length)
    small = replace(case, rows=2, length=length, bin_tokens=2 * length, options=())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    data = Data.make(small, device)
    dense = _dense_weights(build(small, device, dtype, num_hidden_layers=2))
    exact = build(replace(small, four_bit=False), device, torch.float32, num_hidden_layers=2)
    exact.load_state_dict(dense, strict=False)
    del dense
    truth = _gradient(exact, ours(Policy(exact, fused_kernels=False), data))
    del exact
    errors = {}
    for method in (Method(PLAIN, (("fused_kernels", False),)), *methods):
        with _peers_may_be_absent(method):
            model = build(small, device, dtype, num_hidden_layers=2)
            update, _ = _update(model, small, method, Card(device))
            found = _gradient(model, update(data))
            errors[method.name] = float((found - truth).norm() / truth.norm())
    return errors


@contextmanager
def _peers_may_be_absent(method: Method) -> Iterator[None]:
    try:
        yield
    except (ImportError, InputError):
        if not method.peer:
            raise


def _gradient(model: nn.Module, run: Callable[[], None]) -> Tensor:
    run()
    return torch.cat([p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None])


def _dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight as a plain float32 tensor under its name in the state dict."""
    from grpo.kernels.nf4 import NF4Weight, dequantize

    found = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            key = f"{name}.{leaf}" if name else leaf
            quantised = hasattr(parameter, "quant_state") and parameter.quant_state is not None
            found[key] = (dequantize(NF4Weight.of(parameter)) if quantised else parameter.detach()).float().clone()
    return found
