"""`grpo bench`: the longest completion that trains on a card, and what a step costs at given lengths.

    result = find_longest(case, WAYS, Card(torch.device("cuda"), parse_bytes("24GB")), budget_s=600)
    result = at_lengths(case, WAYS, Card(torch.device("cuda")), [8192, 32768])

A try is some optimizer steps on one row (bench_try.py); other trainers are tried in processes of their own
(bench_process.py). Memory scales with the row: further rows of a group are further bins, one after the other.
bench_card.py has the card and the arithmetic, bench_search.py the search.
Left out: rollouts, and the engine that may share the card with training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grpo.bench_card import FORMULA, Card, Rate
from grpo.bench_models import MAX_POSITIONS, TRAINING_METHODS, Case, build, model_config
from grpo.bench_peers import PEERS
from grpo.bench_process import PeerProcess
from grpo.bench_search import Row, Search
from grpo.bench_step import Data, Method, ours
from grpo.bench_try import attempt_here, gradient_here, gradients
from grpo.errors import InputError, RunError, clip
from grpo.model.load import resolve_device
from grpo.model.policy import Policy
from grpo.sizes import parse_card
from grpo.trainer.metrics import environment_facts

WAYS = (
    Method("ours, recompute", (("activation_checkpointing", "recompute"),)),
    Method("ours, offload", (("activation_checkpointing", "offload"),)),
    Method("ours, offload, tiled MLP", (("activation_checkpointing", "offload"), ("tiled_mlp", True))),
    *(Method(name, peer=True) for name in PEERS),
)
PLAIN = "stock layers, no savings"
Say = Callable[[str], None]
TryOne = Callable[[int], Row]


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
    rate = Rate.of(card)
    for place, method in enumerate(methods):
        entry = _entry(method, rate)
        share = (end - time.perf_counter()) / (len(methods) - place)
        if share <= 0:
            yield entry | {"skipped": "no seconds of the budget left"}
            continue
        search = Search(card.capacity_gib, share, most, step=min(512, probes[0]), rows=entry["rows"])

        def seek(try_one: TryOne, search: Search = search) -> dict[str, Any]:
            search.run(try_one, probes, time.perf_counter)
            return {
                "longest": search.longest,
                "fails_at": search.fails_at,
                "limited_by": search.limited_by,
                "peak_line_gib": search.line(),
            }

        yield entry | _measured(seek, case, method, card, rate, say)


def at_lengths(
    case: Case, methods: Sequence[Method], card: Card, lengths: Sequence[int], *, say: Say = lambda text: None
) -> Iterator[dict[str, Any]]:
    """The same figures at given lengths, ascending; a method's lengths end with the first that fails."""
    rate = Rate.of(card)
    for method in methods:
        entry = _entry(method, rate)

        def go_up(try_one: TryOne, rows: list[Row] = entry["rows"]) -> dict[str, Any]:
            for tokens in sorted(lengths):
                rows.append(try_one(tokens))
                if "failed" in rows[-1]:
                    break
            return {}

        yield entry | _measured(go_up, case, method, card, rate, say)


def _entry(method: Method, rate: Rate) -> dict[str, Any]:
    return {"method": method.name, "gemm_tflops": round(rate.flops / 1e12, 1), "rows": []}


def _measured(
    run: Callable[[TryOne], dict[str, Any]], case: Case, method: Method, card: Card, rate: Rate, say: Say
) -> dict[str, Any]:
    """What `run` finds with tries on the card, or why a peer cannot be measured."""
    try:
        with PeerProcess(method, card) if method.peer else nullcontext() as process:
            if process is not None:
                process.prepare(case)

            def try_one(tokens: int) -> Row:
                tried = replace(case, length=tokens, bin_tokens=tokens)
                row = process.attempt(tried, rate) if process else attempt_here(tried, method, card, rate)
                say(describe(method, row))
                return row

            with card:
                return run(try_one)
    except (InputError, RunError) as error:
        if not method.peer:
            raise
        say(f"{method.name}: {clip(error, 160)}")
        return {"skipped": clip(error, 160)}


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
    methods = [way for way in WAYS if not way.peer or PEERS[way.name].installed]
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
        "gradient_errors": gradient_errors(case, methods, card.device, say=say),
    }


# --- how exact it is -------------------------------------------------------------------------------------------------


def gradient_errors(
    case: Case,
    methods: Sequence[Method],
    device: torch.device,
    length: int = 1024,
    *,
    say: Say = lambda text: None,
) -> dict[str, float]:
    """‖g − g*‖ / ‖g*‖ over all gradients, two rows, two layers of the case's widths; g* in float32 without any saving.

    With 4-bit weights g* uses the dequantised ones. PLAIN is the stock model in the case's dtype: what rounding alone
    does. A peer that cannot run here is left out, and said.
    """
    length = min(case.length, length)
    small = replace(case, rows=2, length=length, bin_tokens=2 * length, options=())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dense = _dense_weights(build(small, device, dtype, num_hidden_layers=2))
    exact = build(replace(small, four_bit=False), device, torch.float32, num_hidden_layers=2)
    exact.load_state_dict(dense, strict=False)
    del dense
    truth = gradients(exact, ours(Policy(exact, fused_kernels=False), Data.make(small, device)))
    del exact
    size = _norm(truth.values())
    errors = {}
    for method in (Method(PLAIN, (("fused_kernels", False),)), *methods):
        try:
            found = _gradient_of(small, method, device)
            if found.keys() != truth.keys():
                raise RunError("it trains other parameters than are trained here")
        except (InputError, RunError) as error:
            if not method.peer:
                raise
            say(f"{method.name}: no gradient ({clip(error, 160)})")
            continue
        errors[method.name] = _norm(found[name] - truth[name] for name in truth) / size
    return errors


def _gradient_of(small: Case, method: Method, device: torch.device) -> dict[str, Tensor]:
    if not method.peer:
        return gradient_here(small, method, device, num_hidden_layers=2)
    with PeerProcess(method, Card(device)) as process:
        process.prepare(small, num_hidden_layers=2)
        return process.gradients(small, num_hidden_layers=2)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.norm()) ** 2 for tensor in tensors))


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
