"""The result of a benchmark as cells: one line a method, at the longest length that trained.

"ended by" says why a search ended: "memory" (a length a little above failed), "budget", "tries" or "most tokens" (none
above was tried or failed closely, so the true longest may be longer).
"""

from __future__ import annotations

from typing import Any

COLUMNS = (
    "method",
    "longest completion",
    "fails at",
    "ended by",
    "s/step",
    "tokens/s",
    "MFU",
    "peak GiB",
    "reserved GiB",
    "pinned host GiB",
    "gradient error",
)


_SHORT = ("method", "completion", "fails at", "by", "s/step", "tokens/s", "MFU", "peak", "reserved", "pinned", "error")


def text_lines(entry: dict[str, Any]) -> list[str]:
    """The same for a terminal: columns that hold something, memory in GiB."""
    rows = [[str(cell) for cell in row] for row in (_SHORT, *result_rows(entry))]
    lines = []
    for row in rows:
        if row[1].startswith("– ("):  # one sentence in place of figures
            row[1:] = [row[1]]
    tabular = [row for row in rows if len(row) == len(COLUMNS)]
    widths = [max(map(len, column)) for column in zip(*tabular, strict=True)]
    filled = [any(column[1:]) for column in zip(*tabular, strict=True)]
    for row in rows:
        head, *cells = row
        shown = [cell.rjust(width) for cell, width, used in zip(cells, widths[1:], filled[1:], strict=False) if used]
        lines.append("  ".join([head.ljust(widths[0]), *(shown if len(row) == len(COLUMNS) else cells)]).rstrip())
    return lines


def result_rows(entry: dict[str, Any]) -> list[list[str]]:
    """Cells under COLUMNS of one search (or of given lengths: then one line a length)."""
    errors = entry.get("gradient_errors", {})
    found = [cells for method in entry["methods"] for cells in _method_rows(method, errors.get(method["method"]))]
    shown = {method["method"] for method in entry["methods"]}
    for name in errors.keys() - shown:
        found.append([name, *[""] * (len(COLUMNS) - 2), f"{errors[name]:.1e}"])
    return found


def _method_rows(method: dict[str, Any], error: float | None) -> list[list[str]]:
    name = method["method"]
    if "limited_by" not in method:
        reason = [[name, f"– ({method['skipped']})", *[""] * (len(COLUMNS) - 2)]] if "skipped" in method else []
        return [_cells(name, row, "", "", error) for row in method["rows"]] + reason
    fails = next((f"{r['completion']:,}" for r in method["rows"] if r["tokens"] == method["fails_at"]), "")
    if method["longest"] is None:
        return [[name, "none", fails, method["limited_by"], *[""] * 6, _scientific(error)]]
    row = next(r for r in method["rows"] if r["tokens"] == method["longest"] and "failed" not in r)
    return [_cells(name, row, fails, method["limited_by"], error)]


def _cells(name: str, row: dict[str, Any], fails: str, ended: str, error: float | None) -> list[str]:
    head = [name, f"{row['completion']:,}", fails, ended]
    if "failed" in row:
        return [name, f"{row['completion']:,} does not fit", *[""] * (len(COLUMNS) - 2)]
    memory = [
        f"{row[key]:.2f}" if row.get(key) is not None else "" for key in ("peak_gib", "reserved_gib", "pinned_gib")
    ]
    speed = [f"{row['seconds']:.3g}", f"{row['tokens_per_s']:,.0f}", f"{row['mfu']:.1%}"]
    return [*head, *speed, *memory, _scientific(error)]


def _scientific(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"
