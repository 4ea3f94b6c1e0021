"""The run folder, read: metrics as columns, the configuration, the summary, a few rollouts.

Nothing here may end a report: a missing, torn or damaged file becomes a note, and what else is there is still read.
Left out: what it means and how it is drawn (report.py, charts.py); checkpoints and weights, which no page shows.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grpo.errors import InputError
from grpo.trainer.text import as_float, counted


@dataclass
class Run:
    """What was found in a run folder. `columns[key]` is [rows] float64, NaN where absent or null.

    Every `phase/<name>/seconds` has its `own_seconds` beside it, which can be added up.
    """

    name: str
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # file name -> its text, for the end of the page
    samples: list[tuple[int, list[dict[str, Any]]]] = field(default_factory=list)  # (step, rollout rows)
    notes: list[str] = field(default_factory=list)  # what was missing or damaged

    @property
    def steps(self) -> np.ndarray:
        """[rows] step numbers, rising."""
        return self.columns.get("step", np.empty(0))

    def finite(self, key: str) -> np.ndarray:
        """The finite values of a column, in order; empty if there is no such column."""
        values = self.columns.get(key, np.empty(0))
        return values[np.isfinite(values)]


def read_run(run_dir: Path) -> Run:
    """Read everything the report shows. A missing or damaged file becomes a note.

    Raises:
        InputError: there is no such folder.
    """
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such run folder")
    run = Run(run_dir.resolve().name)
    _read_metrics(run_dir / "metrics.jsonl", run)
    run.config = _read_mapping(run_dir / "config.yaml", yaml.safe_load, run)
    _read_mapping(run_dir / "environment.json", json.loads, run)
    if (run_dir / "summary.json").exists():
        run.summary = _read_mapping(run_dir / "summary.json", json.loads, run)
    _read_samples(run_dir / "rollouts", run)
    return run


def _read_mapping(path: Path, parse: Callable[[str], Any], run: Run) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        run.notes.append(f"{path.name} is missing")
        return {}
    run.texts[path.name] = text
    try:
        value = parse(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        run.notes.append(f"{path.name} cannot be parsed; its text is shown as it is")
        return {}
    return value if isinstance(value, dict) else {}


@dataclass
class _Table:
    """Metrics rows as columns of float64, so that 100,000 rows stay small."""

    rows: int = 0
    columns: dict[str, array[float]] = field(default_factory=dict)
    nulls: dict[str, list[int]] = field(default_factory=dict)  # key -> steps where it is null or not finite
    valued: set[str] = field(default_factory=set)  # not null somewhere
    unmeasured: set[str] = field(default_factory=set)  # null in a row where no null stands for a NaN

    def add(self, row: Mapping[str, Any]) -> None:
        unmeasured = self.unmeasured if not row.get("nonfinite") else set()
        for key, value in row.items():
            (self.valued if value is not None else unmeasured).add(key)
            measured = value if type(value) is float else as_float(value)
            column = self.columns.setdefault(key, array("d"))
            if len(column) < self.rows:
                column.extend([math.nan] * (self.rows - len(column)))
            column.append(measured)
            if not math.isfinite(measured) and not isinstance(value, str):
                self.nulls.setdefault(key, []).append(int(row["step"]))
        self.rows += 1

    def arrays(self) -> dict[str, np.ndarray]:
        for column in self.columns.values():
            column.extend([math.nan] * (self.rows - len(column)))
        return {key: np.asarray(column) for key, column in self.columns.items()}


def _read_metrics(path: Path, run: Run) -> None:
    table, bad, line_number, line = _Table(), [], 0, b""
    try:
        with path.open("rb") as lines:
            for line_number, line in enumerate(lines, 1):
                row = _parse_row(line)
                table.add(row) if row is not None else bad.append(line_number)
    except OSError:
        run.notes.append("metrics.jsonl is missing")
        return
    if bad and bad[-1] == line_number and not line.endswith(b"\n"):
        bad.pop()
        run.notes.append(
            f"the last line of metrics.jsonl (line {line_number}) is torn, as after a crash; it is ignored"
        )
    if bad:
        run.notes.append(f"metrics.jsonl: {counted(len(bad), 'unreadable line')} ignored (first: line {bad[0]})")
    absent = table.unmeasured - table.valued  # such as kl without a reference: named under "not drawn"
    for key, steps in table.nulls.items():
        if key in absent:
            continue
        run.notes.append(f"{key} is null or not finite at {counted(len(steps), 'step')} (first: step {steps[0]})")
    run.columns = _with_own_seconds(_with_first_evaluation(_by_step(table.arrays(), run)))


def _parse_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return row if isinstance(row, dict) and math.isfinite(as_float(row.get("step"))) else None


def _by_step(columns: dict[str, np.ndarray], run: Run) -> dict[str, np.ndarray]:
    """Rows in rising order of step; of rows with the same step the later line counts."""
    if not columns:
        return {}
    steps = columns["step"]
    _, last = np.unique(steps[::-1], return_index=True)
    if len(last) < len(steps):
        run.notes.append(
            f"metrics.jsonl: {counted(len(steps) - len(last), 'row')} written again later; the later row counts"
        )
    return {key: column[len(steps) - 1 - last] for key, column in columns.items()}


def _with_first_evaluation(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`initial_eval_…` in the first row was measured before it: it becomes a row of its own, one step earlier."""
    initial = {key: column[0] for key, column in columns.items() if key.startswith("initial_eval_")}
    if not any(math.isfinite(value) for value in initial.values()):
        return columns
    before = {key.removeprefix("initial_"): value for key, value in initial.items()} | {"step": columns["step"][0] - 1}
    empty = np.full(len(columns["step"]), np.nan)
    kept = [key for key in columns if key not in initial]
    return {
        key: np.concatenate([[before.get(key, np.nan)], columns.get(key, empty)])
        for key in dict.fromkeys([*kept, *before])
    }


def _with_own_seconds(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A phase with none inside it has no `own_seconds` in its row: all its seconds are its own."""
    own = {}
    for key, seconds in columns.items():
        if key.startswith("phase/") and key.endswith("/seconds"):
            name = f"{key.removesuffix('/seconds')}/own_seconds"
            found = columns.get(name, np.full(len(seconds), np.nan))
            own[name] = np.where(np.isnan(found), seconds, found)
    return columns | own


def _read_samples(folder: Path, run: Run) -> None:
    """Rollout rows of the first, the middle and the last step that were kept."""
    found = sorted(folder.glob("step_*.parquet"))
    if not found:
        run.notes.append("rollouts/ holds no step_*.parquet: no sample completions")
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in dict.fromkeys([found[0], found[(len(found) - 1) // 2], found[-1]]):
        try:
            rows = pq.read_table(path).to_pylist()
            step = int(path.stem.removeprefix("step_"))
        except (OSError, ValueError, pa.ArrowException):
            run.notes.append(f"rollouts/{path.name} cannot be read")
            continue
        run.samples.append((step, rows))
