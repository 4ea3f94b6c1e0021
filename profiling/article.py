"""The table of the article behind this project, with its arithmetic, beside what is measured here.

    python -m profiling.article                        # measures on the first CUDA device, about 4 minutes
    python -m profiling.article --toy --device cpu     # seconds; checks the program
    python -m profiling.article --table                # rewrite the table of profiling/README.md from the JSON

Its case: 8 generations of 20,480 tokens, a vocabulary of 128,256, Llama-3.1-8B. Its "GB" are 2^30 bytes, and "20K" is
20,480 (20,000 would give 76.4 instead of 78.3). Of its figures some follow from a formula, some are straight lines
through a table of longest contexts drawn on to 163,840 tokens, and the two totals are sums of such figures: no run that
needs that memory is behind them. Measured here: what the log-prob kernel takes beside the [N, H] gradient that every
method has to return, and the highest memory of whole optimizer steps over the 8 rows.

Where results/<device>/article.json is missing, the table takes what logprobs.json and update.json hold of it.
Left out: the rollout's KV cache, which does not exist while the policy is updated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from grpo.bench import WAYS
from grpo.bench_card import Card, Rate
from grpo.bench_models import Case, model_config
from grpo.bench_try import attempt_here
from grpo.kernels import token_logprobs
from profiling.measure import GIB, device_slug, environment, origin, peak_gib, write_between, write_json

HERE = Path(__file__).parent
CASE = Case("article", "llama-3.1-8b", rows=8, length=20_480, bin_tokens=20_480)
TOY = Case("article-toy", "toy", rows=2, length=64, bin_tokens=64, rank=4)
WAY = "ours, offload"
WITH_TILES = "ours, offload, tiled MLP"


# --- its figures -----------------------------------------------------------------------------------------------------


def logits_gib(case: Case, vocabulary: int) -> float:
    """Policy and reference logits of all tokens at once, two bytes each."""
    return 2 * 2 * case.rows * case.length * vocabulary / GIB


def cache_gib(case: Case, config: Any) -> float:
    """Keys and values of one row, two bytes each."""
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * case.length / GIB


def inputs_gib(case: Case, config: Any) -> float:
    """Layer inputs of all rows, two bytes each: what checkpointing keeps."""
    return 2 * config.num_hidden_layers * case.rows * case.length * config.hidden_size / GIB


def weights_gib(case: Case) -> float:
    """The model's weights, two bytes each."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(case.shape), dtype=torch.bfloat16)
    return 2 * sum(parameter.numel() for parameter in model.parameters()) / GIB


@dataclass(frozen=True)
class Figure:
    """One published figure: GiB, how it comes about, and of what nature it is. `beside`: which of ours stands there."""

    name: str
    published: float
    arithmetic: str
    nature: str
    beside: str = ""


def line_at(intercept: float, slope: float, tokens: int) -> float:
    """GiB of a straight line through a published table of longest contexts."""
    return intercept + slope * tokens


def figures() -> list[Figure]:
    """The article's figures. Each number in `arithmetic` is computed here, not copied."""
    config, tokens = model_config(CASE.shape), CASE.rows * CASE.length
    logits = logits_gib(CASE, config.vocab_size)
    lean, plain = line_at(7.370, 2.1191e-4, tokens), line_at(9.697, 2.4708e-3, tokens)
    return [
        Figure(
            "logits, standard",
            78.3,
            f"policy and reference: 2 × 2 B × {CASE.rows} × {CASE.length:,} × {config.vocab_size:,} = {logits:.2f}",
            "formula",
        ),
        Figure(
            "logits, chunked", 9.8, f"the same / {CASE.rows}, one row at a time = {logits / 8:.2f}", "formula", "head"
        ),
        Figure(
            "training memory, lean",
            42.0,
            f"7.370 + 2.1191e-4 × {tokens:,} = {lean:.1f}",
            "our inference: a line through a published table of longest contexts, extended",
        ),
        Figure(
            "training memory, standard",
            414.0,
            f"9.697 + 2.4708e-3 × {tokens:,} = {plain:.1f}",
            "the same; its slope is mostly an older loss's logits",
        ),
        Figure("weights", 16.0, f"in bf16: {weights_gib(CASE):.2f}", "formula"),
        Figure(
            "KV cache",
            2.5,
            f"one sequence of {CASE.length:,}: {cache_gib(CASE, config):.2f}; {CASE.rows} need "
            f"{CASE.rows * cache_gib(CASE, config):.0f}",
            "formula",
        ),
        Figure(
            "saved by offloading",
            372.0,
            f"414 − 42; the layer inputs themselves are {inputs_gib(CASE, config):.1f}",
            "difference of the two lines",
            "pinned",
        ),
        Figure("**total, lean**", 54.3, f"42 + 9.8 + 0 + 2.5 = {42 + 9.8 + 0 + 2.5:.1f}", "**sum**: no run", "step"),
        Figure(
            "**total, standard**",
            510.8,
            f"414 + 78.3 + 16 + 2.5 = {414 + 78.3 + 16 + 2.5:.1f}",
            "**sum**: no run, no such card",
        ),
    ]


# --- ours ------------------------------------------------------------------------------------------------------------


def head_beside_gradient(case: Case, device: torch.device) -> dict[str, Any]:
    """Bytes of log-probs and their hidden gradient, frozen head, all rows at once, beside the gradient itself."""
    config, dtype = model_config(case.shape), torch.bfloat16 if device.type == "cuda" else torch.float32
    count, width = case.rows * case.length, config.hidden_size
    hidden = torch.randn(count, width, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(config.vocab_size, width, device=device, dtype=dtype) * 0.02
    targets = torch.randint(0, config.vocab_size, (count,), device=device)

    def run() -> None:
        hidden.grad = None
        token_logprobs(hidden, weight, targets).logprobs.sum().backward()

    run()  # compiles
    hidden.grad = None
    peak = peak_gib(run) if device.type == "cuda" else None
    gradient = hidden.nbytes / GIB
    return {
        "N": count,
        "H": width,
        "V": config.vocab_size,
        "peak_gib": peak,
        "beside_gradient_gib": None if peak is None else peak - gradient,
    }


def whole_steps(case: Case, card: Card, ways: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Whole optimizer steps over the case's rows: bf16 LoRA and QLoRA, layer inputs on the host."""
    rate = Rate.of(card)
    for four_bit in (False, True):
        for way in (way for way in WAYS if way.name in ways):
            chosen = replace(case, four_bit=four_bit)
            row = attempt_here(chosen, way, card, rate)
            yield {"training": chosen.training, "method": way.name, "rows": case.rows, **row}


# --- the table -------------------------------------------------------------------------------------------------------


def measured(folder: Path) -> dict[str, Any] | None:
    """{"head": …, "steps": […], "sources": […]} of one device, from article.json or from the other programs' JSON."""
    own = folder / "article.json"
    if own.exists():
        data = json.loads(own.read_text())
        return {"head": data["head"], "steps": data["steps"], "sources": [origin(data["environment"])]}
    found: dict[str, Any] = {"head": None, "steps": [], "sources": []}
    if (folder / "logprobs.json").exists():
        _take_head(found, json.loads((folder / "logprobs.json").read_text()))
    if (folder / "update.json").exists():
        _take_step(found, json.loads((folder / "update.json").read_text()))
    return found if found["sources"] else None


def _take_head(found: dict[str, Any], data: dict[str, Any]) -> None:
    config = model_config(CASE.shape)
    size = (CASE.rows * CASE.length, config.hidden_size, config.vocab_size)
    for shape in data["shapes"]:
        rows = [row for row in shape["rows"] if row["name"] == "ours, triton, chunk_mb=512"]
        if (shape["N"], shape["H"], shape["V"]) == size and rows:
            peak = rows[0]["forward_backward"]["peak_gib"]
            found["head"] = {"beside_gradient_gib": peak - 2 * shape["N"] * shape["H"] / GIB}
            found["sources"].append(origin(data["environment"]))


def _take_step(found: dict[str, Any], data: dict[str, Any]) -> None:
    entry = data["cases"].get("llama-8b-lora-group")  # forward + backward of 8 × 20,480, no optimizer
    rows = [row for row in entry["rows"] if row["method"] == WAY and "skipped" not in row] if entry else []
    if entry and rows:
        facts = {"training": "lora", "rows": CASE.rows, "tokens": CASE.length, "covers": "forward + backward"}
        found["steps"].append(facts | rows[0])
        found["sources"].append(origin(entry["environment"]))


def table(found: dict[str, Any]) -> str:
    """Markdown: the article's figures with their arithmetic, ours beside them; then our steps; then where from."""
    lines = ["| | published, GiB | arithmetic | what it is | here, measured |", "|---" * 5 + "|"]
    for figure in figures():
        lines.append(
            f"| {figure.name} | {figure.published:g} | {figure.arithmetic} | {figure.nature} "
            f"| {_beside(figure.beside, found)} |"
        )
    if any(_is_its_case(step) for step in found["steps"]):
        lines += ["", f"Over {CASE.rows} × {CASE.length:,} tokens, one bin a row:", ""]
        lines += ["| training | method | covers | peak GiB | reserved GiB | pinned host GiB | s |", "|---" * 7 + "|"]
        lines += [_step_line(step) for step in found["steps"] if _is_its_case(step)]
    return "\n".join([*lines, "", *(f"- {source}" for source in dict.fromkeys(found["sources"]))])


def _is_its_case(step: dict[str, Any]) -> bool:
    return (step["rows"], step["tokens"]) == (CASE.rows, CASE.length)


def _beside(kind: str, found: dict[str, Any]) -> str:
    steps = [step for step in found["steps"] if "failed" not in step and step["method"] == WAY and _is_its_case(step)]
    if kind == "head" and found["head"] and found["head"]["beside_gradient_gib"] is not None:
        return f"{found['head']['beside_gradient_gib']:.2f} beside the [N, H] gradient, all rows at once"
    if kind == "step" and steps:
        return "; ".join(f"{step['peak_gib']:.1f} ({step['training']})" for step in steps)
    if kind == "pinned" and steps:
        return f"{steps[0]['pinned_gib']:.2f} on the host, one row at a time" if steps[0].get("pinned_gib") else ""
    return ""


def _step_line(step: dict[str, Any]) -> str:
    head = f"| {step['training']} | {step['method']} | {step.get('covers', 'whole step')} | "
    if "failed" in step:
        return f"{head}does not fit |  |  |  |"
    seconds = step["seconds"] if "seconds" in step else step["forward_backward"]["median_ms"] / 1e3
    sizes = (step.get(f"{kind}_gib") for kind in ("peak", "reserved", "pinned"))
    return head + " | ".join("" if size is None else f"{size:.2f}" for size in sizes) + f" | {seconds:.1f} |"


def write_table(readme: Path = HERE / "README.md", results: Path = HERE / "results") -> None:
    """Put the tables of all devices between the markers."""
    found = {folder.name: measured(folder) for folder in sorted(results.iterdir()) if folder.is_dir()}
    write_between(readme, "article", "\n\n".join(table(entry) for entry in found.values() if entry is not None))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="a tiny shape, for checking this program")
    parser.add_argument("--out", type=Path, help="default: profiling/results/<device>/article.json")
    parser.add_argument("--commit", help="recorded in the JSON where the checkout has no git")
    parser.add_argument("--table", action="store_true", help="rewrite profiling/README.md, measure nothing")
    given = parser.parse_args(arguments)
    if given.table:
        write_table()
        return
    case, card = TOY if given.toy else CASE, Card(torch.device(given.device))
    if not given.toy and card.device.type != "cuda":
        raise SystemExit("profiling.article: no CUDA device (want a GPU, or --toy to check the program)")
    data: dict[str, Any] = {
        "environment": environment(card.device, given.commit),
        "head": head_beside_gradient(case, card.device),
        "steps": [],
    }
    card.clean()
    for step in whole_steps(case, card, (WAY,) if given.toy else (WAY, WITH_TILES)):
        data["steps"].append(step)
        write_json(given.out or HERE / "results" / device_slug(card.device) / "article.json", data)
        print(json.dumps(step), flush=True)
    print(table({"head": data["head"], "steps": data["steps"], "sources": [origin(data["environment"])]}))


if __name__ == "__main__":
    main()
