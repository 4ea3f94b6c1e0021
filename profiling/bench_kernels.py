"""Rotary embedding, RMS norm and gated linear units: ours, eager formulas, torch.compile of them, Liger kernels.

    python -m profiling.bench_kernels                     # all cases, on the first CUDA device
    python -m profiling.bench_kernels --toy --device cpu  # seconds; checks the program, not the machine
    python -m profiling.bench_kernels --table             # rewrite the tables of profiling/README.md from the JSON

Writes profiling/results/<device>/kernels.json after every case. Every method gets the same inputs and upstream
gradients; errors are relative, against float64 on some of the rows. A share of copy bandwidth is the bytes that any
method must move (each input read once, each result written once), over time, over the bandwidth of a large copy in the
same run. Small cases are bound by launches, and timed that way: calls queue on an idle device. Rows "in place" write
over their own inputs again and again, so their numbers are checked once and their timed values are meaningless; Liger's
rotation also writes over its inputs and the upstream gradient.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo.kernels.backend import resolve_backend
from profiling.kernel_cases import EAGER, Case, Method, Reference, cases, methods
from profiling.measure import GIB, device_slug, environment, measure

HERE = Path(__file__).parent
MARKERS = ("<!-- kernels: begin -->", "<!-- kernels: end -->")


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Where, and how long a figure is measured."""

    device: torch.device
    seconds: float
    copy_bytes: int

    def copy_bandwidth(self) -> float:
        """Bytes read and written per second by `copy_` of one large tensor."""
        source = torch.ones(self.copy_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        (found,) = measure([lambda: target.copy_(source)], self.device, seconds=self.seconds)
        return 2 * self.copy_bytes / found.median_ms * 1e3


def measure_case(case: Case, chosen: list[Method], settings: Settings) -> dict[str, Any]:
    """All figures of a case; methods that work are timed in turn."""
    reference, bandwidth = Reference.of(case), settings.copy_bandwidth()
    rows = [_first_call(method, case, reference, settings.device) for method in chosen]
    working = [(method, row) for method, row in zip(chosen, rows, strict=True) if "skipped" not in row]
    moved = (case.bytes_forward, case.bytes_forward + case.bytes_backward)
    for key, run, base in zip(("forward", "forward_backward"), (Method.only_forward, Method.both), moved, strict=True):
        calls = [functools.partial(run, method, case, *case.copies()) for method, _ in working]
        for (method, row), found in zip(
            working, measure(calls, settings.device, seconds=settings.seconds), strict=True
        ):
            must = base + (method.extra_bytes if key == "forward_backward" else 0)
            row[key] = found.as_json()
            row[f"{key}_share"] = round(must / (found.median_ms / 1e3) / bandwidth, 4)
        del calls
    sizes = {"bytes_forward": moved[0], "bytes_forward_backward": moved[1]}
    return {"name": case.name, "copy_gb_per_s": round(bandwidth / 1e9, 1), **sizes, "rows": rows}


def _first_call(method: Method, case: Case, reference: Reference, device: torch.device) -> dict[str, Any]:
    """Errors of the first call, or why there is none."""
    row: dict[str, Any] = {"name": method.name}
    try:
        if method.name.startswith("ours, triton"):
            resolve_backend("triton", device)
        row |= reference.errors(*method.both(case, *case.copies()))
    except torch.OutOfMemoryError:
        row["skipped"] = "out of memory"
    except Exception as error:  # a peer's own failure is a result too, and must not end the run
        if method.name.startswith("ours") and "backend" not in str(error):
            raise
        row["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return row


def run(
    keys: list[str],
    only: list[str],
    settings: Settings,
    made: dict[str, Callable[[], Case]],
    env: dict[str, Any],
    out: Path,
) -> None:
    """Measure every case; the JSON grows case by case."""
    results: dict[str, Any] = {"environment": env, "cases": []}
    for key in keys:
        case = made[key]()
        print(case.name, flush=True)
        chosen = [m for m in methods(case) if not only or any(part in m.name for part in only)]
        entry = {"key": key} | measure_case(case, chosen, settings)
        results["cases"].append(entry)
        for row in entry["rows"]:
            if "skipped" in row:
                print(f"  {row['name']}: skipped, {row['skipped']}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
        del case
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
    print("\n" + "\n".join(_case_table(results["cases"])))


# --- the table -------------------------------------------------------------------------------------------------------

COLUMNS = (
    "method | forward ms | × faster than eager | of copy bandwidth | forward+backward ms (p20–p80) | "
    "× faster than eager | of copy bandwidth | peak GiB | output error | gradient error"
)


def _cells(entry: dict[str, Any], row: dict[str, Any]) -> list[str]:
    if "skipped" in row:
        return [row["name"], f"– ({row['skipped']})", *[""] * 8]
    peak = row["forward_backward"]["peak_gib"]
    both = row["forward_backward"]
    return [
        row["name"],
        f"{row['forward']['median_ms']:.4g}",
        _speedup(entry, row, "forward"),
        f"{row['forward_share']:.0%}",
        f"{both['median_ms']:.4g} ({both['p20_ms']:.4g}–{both['p80_ms']:.4g})",
        _speedup(entry, row, "forward_backward"),
        f"{row['forward_backward_share']:.0%}",
        "" if peak is None else f"{peak:.2f}",
        f"{row['output_error']:.1e}",
        f"{row['gradient_error']:.1e}",
    ]


def _speedup(entry: dict[str, Any], row: dict[str, Any], key: str) -> str:
    for other in entry["rows"]:
        if other["name"] == EAGER and key in other:
            return f"{other[key]['median_ms'] / row[key]['median_ms']:.2f}"
    return ""


def _case_table(entries: list[dict[str, Any]]) -> list[str]:
    lines = []
    for entry in entries:
        size = f"{entry['bytes_forward'] / GIB:.3g} GiB forward, {entry['bytes_forward_backward'] / GIB:.3g} in all"
        lines += [f"**{entry['name']}**: {size}; copy {entry['copy_gb_per_s']:,.0f} GB/s", ""]
        lines += [f"| {COLUMNS} |", "|---" * 10 + "|"]
        lines += ["| " + " | ".join(_cells(entry, row)) + " |" for row in entry["rows"]]
        lines.append("")
    return lines


def table(results: Path = HERE / "results") -> str:
    """Markdown of every results/<device>/kernels.json."""
    lines = []
    for path in sorted(results.glob("*/kernels.json")):
        data = json.loads(path.read_text())
        env = data["environment"]
        names = ("driver", "cuda", "torch", "triton", "transformers", "liger_kernel")
        versions = ", ".join(f"{name} {env[name]}" for name in names)
        about = f"{versions}; commit {env['commit']}; {env['date']}; `{env['command']}`"
        lines += [f"### {env['device']}", "", about, "", *_case_table(data["cases"])]
    return "\n".join(lines)


def write_table(readme: Path = HERE / "README.md", results: Path = HERE / "results") -> None:
    """Put the table between its two markers; print it where there are none."""
    text = readme.read_text()
    if MARKERS[0] not in text:
        print(table(results))
        return
    before, rest = text.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    readme.write_text(f"{before}{MARKERS[0]}\n{table(results)}{MARKERS[1]}{after}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, for checking this program")
    parser.add_argument("--case", action="append", help="cases whose key contains this (default: all)")
    parser.add_argument("--only", action="append", default=[], help="methods whose name contains this (default: all)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing per group of figures")
    parser.add_argument("--out", type=Path, help="default: profiling/results/<device>/kernels.json")
    parser.add_argument("--commit", help="recorded in the JSON where the checkout has no git")
    parser.add_argument(
        "--table", action="store_true", help="rewrite profiling/README.md from the JSON, measure nothing"
    )
    given = parser.parse_args(arguments)
    if given.table:
        write_table()
        return
    device = torch.device(given.device)
    made = cases(device, toy=given.toy)
    keys = [key for key in made if not given.case or any(part in key for part in given.case)]
    out = given.out or HERE / "results" / device_slug(device) / "kernels.json"
    settings = Settings(device, given.seconds, 2**20 if given.toy else 2**30)
    run(keys, given.only, settings, made, environment(device, given.commit), out)


if __name__ == "__main__":
    main()
