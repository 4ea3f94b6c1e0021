"""Token log-probs and their hidden gradient: ours, the bound of two bare GEMMs in the same run, and other libraries.

    python -m profiling.bench_logprobs                     # the three shapes, on the first CUDA device
    python -m profiling.bench_logprobs --toy --device cpu  # seconds; checks the program, not the machine
    python -m profiling.bench_logprobs --table             # rewrite the tables of profiling/README.md from the JSON

Writes profiling/results/<device>/logprobs.json after every row. Every method gets the same inputs and has to give
∂L/∂hidden of L = Σ c_i·logp_i with a frozen head; errors are against float64 on some of the rows (tests' own oracle).
A peer that is not installed, or runs out of memory, is a row with the reason in it.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo.kernels import resolve_backend, token_logprobs
from profiling.measure import GIB, Measurement, device_slug, earlier_results, environment, measure
from tests.kernels.oracle import oracle

HERE = Path(__file__).parent
Shapes = tuple[tuple[int, int, int], ...]
SHAPES: Shapes = ((20_480, 4096, 128_256), (163_840, 4096, 128_256), (32_768, 2048, 151_936))
TOY_SHAPES: Shapes = ((96, 32, 512),)
SEQUENCES = 8
CHECKED_ROWS = 256
MARKERS = ("<!-- logprobs: begin -->", "<!-- logprobs: end -->")


@dataclass(frozen=True)
class Case:
    """hidden [N, H], weight [V, H] (bfloat16; float32 on the CPU), targets [N], coefficients c [N] float32."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor  # [SEQUENCES]; c_i = −advantage / N, so that a loss with a 1/N in it has the same gradient

    @property
    def coefficients(self) -> Tensor:
        total = len(self.targets)
        return -self.advantages.repeat_interleave(total // SEQUENCES) / total

    @staticmethod
    def make(shape: tuple[int, int, int], device: torch.device) -> Case:
        """Logits of standard deviation 3; every second target is its row's most likely token."""
        n, h, v = shape
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device, dtype=dtype)

        hidden, weight = normal(n, h), normal(v, h).mul_(3 / h**0.5)
        targets = torch.randint(0, v, (n,), generator=generator, device=device)
        for start in range(0, n, 2048):
            rows = slice(start, min(start + 2048, n), 2)
            targets[rows] = (hidden[rows] @ weight.T).argmax(1)
        return Case(hidden, weight, targets, torch.randn(SEQUENCES, generator=generator, device=device))


@dataclass(frozen=True)
class Method:
    """One row of the table. `logprobs(case, hidden)` [N], or for a fused loss `loss(case, hidden)` alone."""

    name: str
    logprobs: Callable[[Case, Tensor], Tensor] | None = None
    loss: Callable[[Case, Tensor], Tensor] | None = None
    needs: str | None = None  # module, else the row is skipped
    at_most: int | None = None  # rows; beyond, one call takes seconds

    def backward(self, case: Case, hidden: Tensor) -> tuple[Tensor | None, Tensor]:
        """(log-probs or None, ∂L/∂hidden)."""
        if self.loss is not None:
            return None, torch.autograd.grad(self.loss(case, hidden), hidden)[0]
        assert self.logprobs is not None
        logprobs = self.logprobs(case, hidden)
        return logprobs.detach(), torch.autograd.grad((logprobs * case.coefficients).sum(), hidden)[0]

    def forward(self, case: Case) -> Tensor:
        with torch.no_grad():
            run = self.logprobs or self.loss
            assert run is not None
            return run(case, case.hidden)


# --- methods ---------------------------------------------------------------------------------------------------------


def ours(backend: str, chunk_mb: float) -> Method:
    def run(case: Case, hidden: Tensor) -> Tensor:
        return token_logprobs(hidden, case.weight, case.targets, backend=backend, chunk_mb=chunk_mb).logprobs

    return Method(f"ours, {backend}, chunk_mb={chunk_mb:g}", run)


def float32_log_softmax(case: Case, hidden: Tensor) -> Tensor:
    logits = (hidden @ case.weight.T).float()
    return logits.log_softmax(-1).gather(1, case.targets[:, None])[:, 0]


def selective_log_softmax(case: Case, hidden: Tensor) -> Tensor:
    logits = hidden @ case.weight.T
    return logits.gather(1, case.targets[:, None])[:, 0] - logits.logsumexp(-1)


def _chunk_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


@functools.cache
def _compiled_chunk() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_chunk_logprobs)


def chunk_compile_checkpoint(case: Case, hidden: Tensor, rows: int = 1024) -> Tensor:
    compiled = _compiled_chunk()
    pieces = zip(hidden.split(rows), case.targets.split(rows), strict=True)
    return torch.cat([checkpoint(compiled, h, case.weight, y, use_reentrant=False) for h, y in pieces])


def trl_chunked_head(case: Case, hidden: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    # 32,768 columns is what its trainer passes; no optional output, so that it computes nothing ours does not.
    return ChunkedLogProbFunction.apply(hidden, case.weight, None, case.targets, 1.0, 32_768, None, 1.0, ())[0]


def liger_grpo_loss(case: Case, hidden: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")
    batch = (SEQUENCES, len(case.targets) // SEQUENCES)
    mask = torch.ones(batch, device=hidden.device)
    return loss(hidden.view(*batch, -1), case.weight, case.targets.view(batch), mask, case.advantages)[0]


def apple_cce(filter_eps: str | None) -> Callable[[Case, Tensor], Tensor]:
    def run(case: Case, hidden: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(hidden, case.weight, case.targets, reduction="none", filter_eps=filter_eps)

    return run


def methods() -> list[Method]:
    """All rows, ours first."""
    return [
        ours("triton", 512),
        ours("triton", 128),
        ours("triton", 32),
        ours("torch", 512),
        Method("TRL chunked head", trl_chunked_head, needs="trl"),
        Method("bf16 selective log-softmax", selective_log_softmax),
        Method("float32 log_softmax", float32_log_softmax),
        Method("torch.compile chunk + checkpoint", chunk_compile_checkpoint),
        Method("Apple CCE", apple_cce("high"), needs="cut_cross_entropy"),
        Method("Apple CCE, no gradient filter", apple_cce(None), needs="cut_cross_entropy", at_most=40_000),
        Method("Liger fused linear GRPO", loss=liger_grpo_loss, needs="liger_kernel", at_most=40_000),
    ]


def bare_gemms(case: Case, rows: int, *, backward: bool) -> Callable[[], None]:
    """h·Wᵀ and, for `backward`, its product with W: what no exact method can do without, in chunks of `rows`."""
    hidden = case.hidden.detach()
    n, v = len(case.targets), len(case.weight)
    tile = torch.empty(min(rows, n), v, dtype=case.hidden.dtype, device=case.hidden.device)
    gradient = torch.empty_like(hidden) if backward else None

    def run() -> None:
        for start in range(0, n, rows):
            chunk = hidden[start : start + rows]
            logits = torch.mm(chunk, case.weight.T, out=tile[: len(chunk)])
            if gradient is not None:
                torch.mm(logits, case.weight, out=gradient[start : start + rows])

    return run


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    device: torch.device
    seconds: float

    def measure(self, *functions: Callable[[], Any]) -> list[Measurement]:
        return measure(functions, self.device, seconds=self.seconds)


def fastest_chunk(case: Case, settings: Settings, *, backward: bool) -> int:
    """Rows at which the bare GEMMs are fastest."""
    sizes = (2048, 4096, 8192)
    found = settings.measure(*(bare_gemms(case, rows, backward=backward) for rows in sizes))
    return min(zip(found, sizes, strict=True), key=lambda pair: pair[0].median_ms)[1]


@dataclass(frozen=True)
class Bound:
    """Rows per chunk at which the bare GEMMs are fastest: one GEMM, two GEMMs."""

    forward: int
    forward_backward: int

    @staticmethod
    def of(case: Case, settings: Settings) -> Bound:
        return Bound(*(fastest_chunk(case, settings, backward=backward) for backward in (False, True)))


def row(method: Method, case: Case, reference: Reference, bound: Bound, settings: Settings) -> dict[str, Any]:
    """Figures of one method, each with the bound measured in turn with it; or the reason why there are none."""
    result: dict[str, Any] = {"name": method.name}
    if method.at_most is not None and len(case.targets) > method.at_most:
        return result | {"skipped": "not measured: seconds a call"}
    try:
        if method.needs:
            importlib.import_module(method.needs)
        _resolve(method, settings.device)
        hidden = case.hidden.requires_grad_()
        result |= reference.errors(*method.backward(case, hidden))
        gemms = bare_gemms(case, bound.forward_backward, backward=True)
        both, limit = settings.measure(lambda: method.backward(case, hidden), gemms)
        result |= {"forward_backward": both.as_json(), "limit_forward_backward_ms": round(limit.median_ms, 4)}
        gemms = bare_gemms(case, bound.forward, backward=False)
        forward, limit = settings.measure(lambda: method.forward(case), gemms)
        result |= {"forward": forward.as_json(), "limit_forward_ms": round(limit.median_ms, 4)}
    except torch.OutOfMemoryError:
        result["skipped"] = "out of memory"
    except Exception as error:  # a peer's own failure is a result too, and must not end the run
        if method.name.startswith("ours") and "backend" not in str(error):
            raise
        result["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    finally:
        case.hidden.requires_grad_(False)
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def _resolve(method: Method, device: torch.device) -> None:
    if method.name.startswith("ours, triton"):
        resolve_backend("triton", device)


@dataclass(frozen=True)
class Reference:
    """float64 log-probs and ∂L/∂hidden of some rows."""

    rows: Tensor
    logprobs: Tensor
    gradient: Tensor

    @staticmethod
    def of(case: Case) -> Reference:
        n = len(case.targets)
        rows = torch.arange(0, n, max(1, n // CHECKED_ROWS), device=case.hidden.device)[:CHECKED_ROWS]
        hidden = case.hidden[rows].double().requires_grad_()
        logprobs = oracle(hidden, case.weight, case.targets[rows]).logprobs
        (gradient,) = torch.autograd.grad((logprobs * case.coefficients[rows]).sum(), hidden)
        return Reference(rows, logprobs.detach(), gradient)

    def errors(self, logprobs: Tensor | None, gradient: Tensor) -> dict[str, float]:
        """Largest |Δlogp|; relative error of the gradient, over all checked rows and in the worst of them."""
        difference = gradient[self.rows].double() - self.gradient
        by_row = difference.norm(dim=1) / self.gradient.norm(dim=1)
        found = {
            "gradient_error": float(difference.norm() / self.gradient.norm()),
            "worst_row_gradient_error": float(by_row.max()),
        }
        if logprobs is not None:
            found["max_logprob_error"] = float((logprobs[self.rows] - self.logprobs).abs().max())
        return found


def run(shapes: Shapes, chosen: list[Method], settings: Settings, results: dict[str, Any], out: Path) -> None:
    """Measure every method on every shape; the JSON grows row by row, and rows of an earlier run stay."""
    for shape in shapes:
        case = Case.make(shape, settings.device)
        reference, bound = Reference.of(case), Bound.of(case, settings)
        entry = _entry(results, shape)
        print(f"N={shape[0]:,} H={shape[1]:,} V={shape[2]:,}", flush=True)
        for method in chosen:
            line = row(method, case, reference, bound, settings)
            print("  ".join(cell for cell in _cells(entry, line) if cell), flush=True)
            entry["rows"] = [old for old in entry["rows"] if old["name"] != method.name] + [line]
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=1) + "\n")


def _entry(results: dict[str, Any], shape: tuple[int, int, int]) -> dict[str, Any]:
    for entry in results["shapes"]:
        if (entry["N"], entry["H"], entry["V"]) == shape:
            return entry
    results["shapes"].append({"N": shape[0], "H": shape[1], "V": shape[2], "rows": []})
    return results["shapes"][-1]


# --- the table -------------------------------------------------------------------------------------------------------

COLUMNS = (
    "method | forward+backward ms (p20–p80) | × limit | forward ms | × limit | peak GiB | beside [N,H] | "
    "max abs Δlogp | gradient error (worst row)"
)


def _cells(entry: dict[str, Any], line: dict[str, Any]) -> list[str]:
    if "skipped" in line:
        return [line["name"], f"– ({line['skipped']})", *[""] * 7]
    both, forward = line["forward_backward"], line["forward"]
    peak = both["peak_gib"]
    gradient_gib = 2 * entry["N"] * entry["H"] / GIB
    return [
        line["name"],
        f"{both['median_ms']:.4g} ({both['p20_ms']:.4g}–{both['p80_ms']:.4g})",
        f"{both['median_ms'] / line['limit_forward_backward_ms']:.2f}",
        f"{forward['median_ms']:.4g}",
        f"{forward['median_ms'] / line['limit_forward_ms']:.2f}",
        "" if peak is None else f"{peak:.2f}",
        "" if peak is None else f"{peak - gradient_gib:.2f}",
        f"{line['max_logprob_error']:.1e}" if "max_logprob_error" in line else "",
        f"{line['gradient_error']:.1e} ({line['worst_row_gradient_error']:.1e})",
    ]


def _limits(entry: dict[str, Any]) -> str:
    """The range of the bound over the rows it was measured with."""
    parts = []
    for name, key in (("two GEMMs", "limit_forward_backward_ms"), ("one GEMM", "limit_forward_ms")):
        found = [line[key] for line in entry["rows"] if key in line]
        if found:
            parts.append(f"{name} {min(found):.4g}–{max(found):.4g} ms")
    return ", ".join(parts)


def table(results: Path = HERE / "results") -> str:
    """Markdown of every results/<device>/logprobs.json."""
    lines = []
    for path in sorted(results.glob("*/logprobs.json")):
        data = json.loads(path.read_text())
        env = data["environment"]
        versions = f"driver {env['driver']}, CUDA {env['cuda']}, torch {env['torch']}, triton {env['triton']}"
        lines += [
            f"### {env['device']}",
            "",
            f"{versions}; commit {env['commit']}; {env['date']}; `{env['command']}`",
            "",
        ]
        for entry in data["shapes"]:
            lines += [f"**N = {entry['N']:,}, H = {entry['H']:,}, V = {entry['V']:,}**: {_limits(entry)}", ""]
            lines += [f"| {COLUMNS} |", "|---" * 9 + "|"]
            lines += ["| " + " | ".join(_cells(entry, line)) + " |" for line in entry["rows"]]
            lines.append("")
    return "\n".join(lines)


def write_table(readme: Path = HERE / "README.md") -> None:
    """Put the table between its two markers."""
    text = readme.read_text()
    before, rest = text.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    readme.write_text(f"{before}{MARKERS[0]}\n{table()}{MARKERS[1]}{after}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="a tiny shape, for checking this program")
    parser.add_argument("--shape", type=int, action="append", help="index of a shape (default: all)")
    parser.add_argument("--only", action="append", help="methods whose name contains this (default: all)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per figure")
    parser.add_argument("--out", type=Path, help="default: profiling/results/<device>/logprobs.json")
    parser.add_argument("--update", action="store_true", help="keep the other rows of an earlier run's JSON")
    parser.add_argument("--commit", help="recorded in the JSON where the checkout has no git")
    parser.add_argument(
        "--table", action="store_true", help="rewrite profiling/README.md from the JSON, measure nothing"
    )
    given = parser.parse_args(arguments)
    if given.table:
        write_table()
        return
    shapes = TOY_SHAPES if given.toy else SHAPES
    if given.shape:
        shapes = tuple(shapes[index] for index in given.shape)
    chosen = [m for m in methods() if not given.only or any(part in m.name for part in given.only)]
    out = given.out or HERE / "results" / device_slug(given.device) / "logprobs.json"
    settings = Settings(torch.device(given.device), given.seconds)
    env = environment(given.device, given.commit)
    earlier = earlier_results(out, env) if given.update else None
    run(shapes, chosen, settings, earlier or {"environment": env, "shapes": []}, out)


if __name__ == "__main__":
    main()
