"""Tables of update.json: one for each case with the command that gave it, and one for each card size."""

from __future__ import annotations

from typing import Any

from grpo.bench import PLAIN
from profiling.measure import origin


def line(case: str, found: dict[str, Any], errors: dict[str, float]) -> str:
    """One row of the table."""
    if "skipped" in found:
        return f"| {case} | {found['method']} | – ({found['skipped']}) |  |  |  |  |  |"
    time_ = found["forward_backward"]
    error = errors.get(found["method"])
    return (
        f"| {case} | {found['method']} | {time_['median_ms'] / 1e3:.3f} | {found['tokens_per_s']:,.0f} "
        f"| {found.get('peak_gib', '')} | {found['weights_gib']} | {found.get('pinned_gib', '')} "
        f"| {'' if error is None else f'{error:.1e}'} |"
    )


HEADER = (
    "| case | method | forward + backward, s | tokens/s | peak GiB | weights GiB | pinned host GiB | gradient error |\n"
    + "|---" * 8
    + "|"
)


def table(data: dict[str, Any]) -> str:
    """Markdown of one results file: each case with the command that gave it."""
    lines = []
    for name, entry in data["cases"].items():
        lines += ["", origin(entry["environment"]), "", HEADER]
        lines += [line(name, found, entry.get("gradient_errors", {})) for found in entry["rows"]]
        stock = entry.get("gradient_errors", {}).get(PLAIN)
        if stock is not None:
            lines.append(f"| {name} | {PLAIN} |  |  |  |  |  | {stock:.1e} |")
    for entry in data["longest"]:
        note = f" ({entry['note']})" if "note" in entry else ""
        lines += ["", origin(entry["environment"]) + note, ""]
        lines += ["| card GB | tokens | seconds | peak GiB | reserved GiB | pinned host GiB |", "|---" * 6 + "|"]
        lines += [
            f"| {r['card_gb']:g} | {r['tokens']:,} | {r.get('seconds', 'does not fit')} | {r.get('peak_gib', '')} "
            f"| {r.get('reserved_gib', '')} | {r.get('pinned_gib', '')} |"
            for r in entry["rows"]
        ]
    return "\n".join(lines[1:])
