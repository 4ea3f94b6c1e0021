"""The longest completion that trains on a card of a given size: ours beside TRL, with what a step costs on the way.

    python -m profiling.long_context --shape llama-3.1-8b --method qlora --gpu 24GB --budget 540
    python -m profiling.long_context --method lora --tokens 8192 32768          # these lengths, no search
    python -m profiling.long_context --toy --device cpu                         # seconds; checks the program
    python -m profiling.long_context --table      # rewrite the tables of profiling/README.md from the JSON
    python -m profiling.long_context --plot       # the same as results/<device>/long_context.png

The search itself is `grpo.bench` (`grpo bench` runs it for an installed user). Two short tries predict the length that
fits; it is tried, then one above that fails; both stay in the JSON. Attention over 300,000 tokens takes minutes a step:
no try is begun that would outlast `--budget`, which the methods share (give it to one of them by `--only`), and a
search that ended so says "budget". Setting
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before the command changes what fits; the JSON records it.

Every method's gradient is held against float32 without savings at the widths of the shape (see bench_update). TRL runs
with gradient checkpointing, one row a micro-batch and its chunked head; a second row puts the activation offloading of
its other trainers around it. Unsloth runs as it loads a model by itself, with an adapter. Both are tried in processes
of their own (grpo/bench_process.py); Unsloth reads a checkpoint, which is written to the temporary folder (16 GB for
8B). It wants an older TRL than is measured here: with an environment for each, `--update` joins what they give.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from grpo.bench import WAYS, at_lengths, check_lengths, find_longest, gradient_errors
from grpo.bench_card import FORMULA, Card
from grpo.bench_models import SHAPES, TRAINING_METHODS, Case
from grpo.bench_table import COLUMNS, result_rows
from grpo.errors import InputError
from grpo.sizes import parse_bytes
from profiling.measure import device_slug, environment, origin, write_json, write_tables

HERE = Path(__file__).parent
ERROR_LENGTH = 4096
SAME = ("shape", "training", "rank", "card_gb", "allocator")  # what a picture has in one row
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def title(entry: dict[str, Any]) -> str:
    """What one search was about."""
    card = "the whole card" if entry["card_gb"] is None else f"{entry['card_gb']:g} GB"
    rank = f" rank {entry['rank']}" if entry["rank"] else ""
    setting = f", {entry['allocator']}" if entry["allocator"] else ""
    return f"{entry['shape']}, {entry['training']}{rank}, {card}{setting}"


def table(data: dict[str, Any]) -> str:
    """Markdown of one results file."""
    lines: list[str] = []
    for entry in merged(data["searches"]):
        lines += ["", f"**{title(entry)}**", "", *entry["origins"], ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        lines += ["| " + " | ".join(cells) + " |" for cells in result_rows(entry)]
    return "\n".join(lines[1:])


# --- the picture -----------------------------------------------------------------------------------------------------


def plot(data: dict[str, Any], out: Path) -> None:
    """Peak memory and tokens/s against the length, one row of panels a search; × is a length that did not fit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    searches = merged(data["searches"])
    figure, panels = pyplot.subplots(
        len(searches), 2, figsize=(12, 4.2 * len(searches)), squeeze=False, layout="constrained"
    )
    for (memory, speed), entry in zip(panels, searches, strict=True):
        for place, found in enumerate(entry["methods"]):
            _draw(memory, speed, found, f"C{place}", _limit(entry))
        if entry["card_gb"] is not None:
            memory.axhline(_limit(entry), color="grey", linestyle="--", linewidth=1)
            memory.annotate(
                f"{entry['card_gb']:g} GB", (0.01, _limit(entry)), xycoords=("axes fraction", "data"), va="bottom"
            )
        memory.set(title=title(entry), xlabel="tokens of the row", ylabel="peak allocated, GiB")
        memory.set_ylim(0, 1.12 * max(_limit(entry), 1e-3))
        speed.set(title=entry["environment"]["device"], xlabel="tokens of the row", ylabel="tokens/s", ylim=(0, None))
        speed.yaxis.set_major_formatter("{x:,.0f}")
        for axis in (memory, speed):
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.set_xlim(0, None)
            axis.locator_params(axis="x", nbins=5)
            axis.grid(alpha=0.3)
        if any("failed" in row for found in entry["methods"] for row in found["rows"]):
            memory.plot([], [], "x", color="grey", label="did not fit")
        memory.legend(fontsize=8, loc="best")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def merged(searches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Searches of one setting, made by several commands, as one; `origins` says which command gave which method."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in searches:
        first = found.setdefault(_setting(entry), entry | {"methods": [], "gradient_errors": {}, "origins": []})
        first["methods"] = [*first["methods"], *entry["methods"]]
        first["gradient_errors"] = {**first["gradient_errors"], **entry["gradient_errors"]}
        names = "; ".join(method["method"] for method in entry["methods"])
        first["origins"].append(f"- {names}: {origin(entry['environment'])}")
    return list(found.values())


def _limit(entry: dict[str, Any]) -> float:
    """Where a length that did not fit is drawn: at the card's size, GiB; without a cap at the highest peak."""
    if entry["card_gb"] is not None:
        return entry["card_gb"] * 1e9 / 2**30
    peaks = [row["peak_gib"] for found in entry["methods"] for row in found["rows"] if "failed" not in row]
    return max(peaks, default=0.0)


def _draw(memory: Any, speed: Any, found: dict[str, Any], color: str, limit: float) -> None:
    passed = sorted((r for r in found["rows"] if "failed" not in r), key=lambda row: row["tokens"])
    failed = [row["tokens"] for row in found["rows"] if "failed" in row]
    tokens = [row["tokens"] for row in passed]
    style = {"color": color, "marker": "o", "markersize": 4, "label": found["method"]}
    if passed:
        memory.plot(tokens, [row["peak_gib"] for row in passed], **style)
        speed.plot(tokens, [row["tokens_per_s"] for row in passed], **style)
    memory.plot(failed, [limit] * len(failed), color=color, marker="x", linestyle="none")


# --- running ---------------------------------------------------------------------------------------------------------


def run(given: argparse.Namespace, case: Case, card: Card) -> Iterator[dict[str, Any]]:
    """One search, or the given lengths, as it stands in the JSON: again after each method."""
    start = time.perf_counter()
    methods = [method for method in WAYS if not given.only or method.name in given.only]
    check_lengths(card, given.tokens)
    errors = {} if given.no_errors else gradient_errors(case, methods, card.device, length=ERROR_LENGTH, say=_say)
    entry: dict[str, Any] = {
        "shape": case.shape,
        "training": case.training,
        "rank": case.rank,
        "card_gb": card.size and card.size / 1e9,
        "allocator": next((os.environ[name] for name in ALLOCATOR if name in os.environ), None),
        "flops": FORMULA,
        "environment": environment(card.device, given.commit),
        "gradient_errors": errors,
        "methods": [],
    }
    if given.tokens:
        found = at_lengths(case, methods, card, given.tokens, say=_say)
    else:
        probes = tuple(given.probes)
        left = given.budget - (time.perf_counter() - start)
        found = find_longest(case, methods, card, budget_s=left, probes=probes, most=given.most, say=_say)
    for method in found:
        entry["methods"].append(method)
        yield entry


def remaining(others: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Earlier searches without the methods that `entry` has measured anew."""
    again = {method["method"] for method in entry["methods"]}
    found = []
    for old in others:
        if _setting(old) == _setting(entry):
            old = old | {"methods": [method for method in old["methods"] if method["method"] not in again]}
        if old["methods"]:
            found.append(old)
    return found


def _setting(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[key] for key in SAME)


def _say(text: str) -> None:
    print(text, flush=True)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="a tiny shape at two lengths, for checking this program")
    parser.add_argument("--shape", default="llama-3.1-8b", help=f"{', '.join(SHAPES)}, or a model's folder")
    parser.add_argument("--method", default="qlora", choices=TRAINING_METHODS)
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--gpu", help="card size, e.g. 24GB (default: the whole device)")
    parser.add_argument("--tokens", type=int, nargs="*", help="measure these lengths instead of searching")
    parser.add_argument("--probes", type=int, nargs=2, default=(8192, 16_384), help="lengths that predict the longest")
    parser.add_argument("--most", type=int, default=2**20, help="try no length above this")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for the whole program")
    parser.add_argument("--only", action="append", help=f"of {', '.join(m.name for m in WAYS)} (default: all)")
    parser.add_argument("--no-errors", action="store_true", help="leave the gradient errors out")
    parser.add_argument("--out", type=Path, help="default: profiling/results/<device>/long_context.json")
    parser.add_argument("--update", action="store_true", help="keep the other searches of an earlier run's JSON")
    parser.add_argument("--commit", help="recorded in the JSON where the checkout has no git")
    parser.add_argument("--table", action="store_true", help="rewrite profiling/README.md, measure nothing")
    parser.add_argument("--plot", action="store_true", help="draw the JSON (or that of --out), measure nothing")
    return parser.parse_args(arguments)


def _case(given: argparse.Namespace) -> Case:
    rank = 0 if given.method == "full" else given.rank
    return Case("long-context", given.shape, 1, 2**20, 2**20, four_bit=given.method == "qlora", rank=rank)


def main(arguments: list[str] | None = None) -> None:
    given = _arguments(arguments)
    if given.toy:
        given.shape, given.tokens = "toy", given.tokens or [128, 256]
    out = given.out or HERE / "results" / device_slug(given.device) / "long_context.json"
    if given.table:
        write_tables("long_context", table)
    if given.plot:
        files = [given.out] if given.out else sorted(HERE.glob("results/*/long_context.json"))
        for path in files:
            plot(json.loads(path.read_text()), path.with_suffix(".png"))
    if given.table or given.plot:
        return
    try:
        case, card = _case(given), Card(torch.device(given.device), parse_bytes(given.gpu) if given.gpu else None)
        others = json.loads(out.read_text())["searches"] if given.update and out.exists() else []
        for entry in run(given, case, card):
            write_json(out, {"searches": [*remaining(others, entry), entry]})
    except (InputError, ValueError) as error:
        sys.exit(f"profiling.long_context: {error}")
    print(table({"searches": [entry]}))


if __name__ == "__main__":
    main()
