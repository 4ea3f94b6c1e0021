"""report.html: one self-contained page that shows whether a run learned, what it wrote, and what it cost.

It is drawn from the run folder alone, so it can be written during a run, after a crash, or again years later.
Curves are inline SVG (they follow the light or dark theme and need no plotting library); nothing is fetched, and a
content policy inside the page forbids it. Text from models and datasets is untrusted and always escaped.
Left out: comparing runs. Trackers do that. Longer than most files, because style, script and drawing are in it
instead of in a plotting library; its parts are reading, what is drawn, drawing, the page.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grpo.errors import InputError
from grpo.trainer.console import as_float, duration, middle_out, number, percent, visible

MAX_BINS = 200  # points drawn per curve: about two pixels each
MAX_TEXT = 4000  # characters of a prompt or completion
WIDTH, HEIGHT = 390, 202  # one panel, in px at 1280 px page width
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 24, 24
COLOURS = 8  # --c0 … --c7 in STYLE


# ---------------------------------------------------------------------------------------------- reading


@dataclass
class Run:
    """What was found in a run folder. `columns[key]` is [rows] float64, NaN where absent or null."""

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

    def add(self, row: Mapping[str, Any]) -> None:
        for key, value in row.items():
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
        run.notes.append(f"metrics.jsonl: {_count(len(bad), 'unreadable line')} ignored (first: line {bad[0]})")
    for key, steps in table.nulls.items():
        run.notes.append(f"{key} is null or not finite at {_count(len(steps), 'step')} (first: step {steps[0]})")
    run.columns = _with_first_evaluation(_by_step(table.arrays(), run))


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
            f"metrics.jsonl: {_count(len(steps) - len(last), 'row')} written again later; the later row counts"
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


def _count(n: int, thing: str) -> str:
    return f"{n:,} {thing}" + ("" if n == 1 else "s")


# ---------------------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class Series:
    """One curve: a metrics key, its label, the key of its standard deviation (drawn as a band), its colour."""

    key: str
    label: str
    std: str = ""
    colour: int = 0


@dataclass(frozen=True)
class Panel:
    """One chart. Values are multiplied by `scale` (100: shares in %); the axis includes `bounds`.

    `stacked`: the curves add up. `log`: a logarithmic axis if the largest value is over 30 × the median.
    """

    title: str
    unit: str
    series: tuple[Series, ...]
    hint: str = ""
    scale: float = 1.0
    bounds: tuple[float, ...] = (0.0,)
    stacked: bool = False
    log: bool = False


def _lines(**labels: str) -> tuple[Series, ...]:
    """Series from label="key" pairs; _ in a label is a hyphen."""
    return tuple(Series(key, label.replace("_", "-"), colour=i) for i, (label, key) in enumerate(labels.items()))


def panels(run: Run) -> dict[str, list[Panel]]:
    """Section title -> its panels, whether or not the run has their columns."""
    names = [key[len("rewards/") : -len("/mean")] for key in run.columns if _parts(key, "rewards", "mean")]
    rewards = [("Reward", "reward", "reward_std")]
    rewards += [(f"Reward: {name}", f"rewards/{name}/mean", f"rewards/{name}/std") for name in names]
    learning = [Panel("Held-out accuracy", "%", _lines(accuracy="eval_accuracy"), scale=100, bounds=(0, 1))]
    learning += [
        Panel(title, "reward", (Series(mean, "mean", std),), "± std", bounds=()) for title, mean, std in rewards
    ]
    learning += [Panel("Held-out reward", "reward", _lines(mean="eval_reward"), bounds=())]
    length, clip, gap = "completions", "clip_ratio", "sampling/sampling_logp_difference"
    lengths = _lines(mean=f"{length}/mean_length", max=f"{length}/max_length", held_out=f"eval_{length}/mean_length")
    cut, zero = _lines(share=f"{length}/clipped_ratio"), _lines(share="frac_reward_zero_std")
    clipped = _lines(low=f"{clip}/low_mean", high=f"{clip}/high_mean")
    return {
        "Is it learning?": learning,
        "What it writes": [
            Panel("Completion length", "tokens", lengths),
            Panel("Cut off at the limit", "% of completions", cut, scale=100),
            Panel("Zero-variance groups", "% of groups", zero, "all rewards equal: no signal", scale=100),
        ],
        "How it is optimised": [
            Panel("Loss", "loss", _lines(train="loss", held_out="eval_loss"), bounds=()),
            Panel("KL to the reference", "nats per token", _lines(KL="kl"), log=True),
            Panel("Entropy", "nats per token", _lines(mean="entropy")),
            Panel("Gradient norm", "L2 norm", _lines(norm="grad_norm"), "before clipping", log=True),
            Panel("Learning rate", "per step", _lines(rate="learning_rate")),
            Panel("Clipped ratios", "% of tokens", clipped, scale=100),
            Panel("Policy − sampler", "nats", _lines(mean=f"{gap}/mean", max=f"{gap}/max"), "|Δ log-prob|", log=True),
        ],
        "What it costs": [
            Panel("Seconds per phase", "seconds per step", _phases(run, "seconds"), stacked=True),
            Panel("Memory peak per phase", "GiB", _phases(run, "peak_gib"), "peaks do not add up"),
            Panel("Throughput", "tokens per second", _lines(mean="tokens_per_second")),
        ],
    }


def _parts(key: str, first: str, last: str) -> bool:
    return key.startswith(f"{first}/") and key.endswith(f"/{last}") and len(key) > len(first) + len(last) + 2


def _phases(run: Run, kind: str) -> tuple[Series, ...]:
    """A phase keeps its colour over all panels."""
    names = [key.split("/")[1] for key in run.columns if key.startswith("phase/")]
    order = enumerate(dict.fromkeys(names))
    return tuple(Series(f"phase/{name}/{kind}", name, colour=i % COLOURS) for i, name in order)


# ---------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Axis:
    """A map from values to pixels, linear or logarithmic, with its ticks."""

    low: float
    high: float
    start: float  # px of low
    end: float  # px of high
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, values: Any) -> np.ndarray:
        """Pixels of `values` (float or array); a logarithmic axis holds what is below it at its foot."""
        low, high, at = self.low, self.high, np.asarray(values, dtype=float)
        if self.log:
            low, high, at = math.log10(low), math.log10(high), np.log10(np.maximum(at, low))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def nice_axis(values: np.ndarray, start: float, end: float, count: int, pad: float = 0.0) -> Axis:
    """A linear axis over finite `values`. Its ticks are 1, 2 or 5 × 10^k apart, 2 to `count` + 1 of them (count ≥ 5).

    `pad` is the share of the range left free at both ends, but not below a least value of 0.
    """
    low, high = float(values.min()), float(values.max())
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-100):
        margin = max(abs(low), abs(high)) * 0.1 or 1.0
        low, high = low - (margin if low else 0.0), high + margin
    room = (high - low) * pad
    low, high = low - (room if low else 0.0), high + room
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    gap = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    ticks = np.arange(math.ceil(low / gap - 1e-6), math.floor(high / gap + 1e-6) + 1) * gap
    return Axis(low, high, start, end, tuple(ticks))


def log_axis(values: np.ndarray, start: float, end: float) -> Axis:
    """A logarithmic axis in whole decades around the positive `values`, with at most five ticks."""
    low, high = math.floor(math.log10(values.min())), math.ceil(math.log10(values.max()))
    high = max(high, low + 1)
    ticks = tuple(10.0**k for k in range(low, high + 1, math.ceil((high - low) / 4)))
    return Axis(10.0**low, 10.0**high, start, end, ticks, log=True)


@dataclass(frozen=True)
class Curve:
    """A series in at most MAX_BINS points: `mean` [bins], its band from `low` to `high` [bins], `std` [bins]."""

    series: Series
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    std: np.ndarray | None = None


def _bin(values: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, minimum and maximum of the finite values of each bin; NaN where a bin has none."""
    known = np.isfinite(values)
    counts = np.add.reduceat(known.astype(float), starts)
    counts[counts == 0] = np.nan
    mean = np.add.reduceat(np.where(known, values, 0.0), starts) / counts
    low = np.minimum.reduceat(np.where(known, values, np.inf), starts)
    high = np.maximum.reduceat(np.where(known, values, -np.inf), starts)
    return mean, np.where(np.isnan(counts), np.nan, low), np.where(np.isnan(counts), np.nan, high)


def bin_panel(panel: Panel, run: Run) -> tuple[np.ndarray, list[Curve]]:
    """Steps [3, bins] (mean, first, last of each bin) and the curves of a panel that have a finite value.

    The band of a curve with a standard deviation is mean ± std. Else, where a bin holds several steps, it is their
    minimum and maximum, so that a spike is seen in a long run too.
    """
    shown = [s for s in panel.series if len(run.finite(s.key))]
    columns = {key: _drawable(run.columns[key]) for s in shown for key in (s.key, s.std) if key in run.columns}
    rows = np.arange(len(run.steps))
    if all(_sparse(s) for s in shown):  # only the steps that were evaluated
        rows = rows[np.any([np.isfinite(run.columns[s.key]) for s in shown], axis=0)]
    starts = np.unique(np.linspace(0, len(rows), min(MAX_BINS, len(rows)), endpoint=False).astype(int))
    curves = []
    for s in shown:
        values = columns[s.key][rows] * panel.scale
        if panel.stacked:  # a phase that a step did not have took no time
            values = np.nan_to_num(values)
        mean, low, high = _bin(values, starts)
        std = _bin(columns[s.std][rows] * panel.scale, starts)[0] if len(run.finite(s.std)) else None
        curves.append(Curve(s, mean, low, high) if std is None else Curve(s, mean, mean - std, mean + std, std))
    return np.stack(_bin(_drawable(run.steps[rows]), starts)), curves


def _drawable(values: np.ndarray) -> np.ndarray:
    """Within ±1e100, and 0 below 1e-100, so that no later sum or logarithm overflows."""
    return np.where(np.abs(values) < 1e-100, 0.0, np.clip(values, -1e100, 1e100))


def _sparse(series: Series) -> bool:
    """Measured at some steps only: its points are joined over the rows between."""
    return series.key.startswith("eval_")


def _stack(curves: Sequence[Curve]) -> list[Curve]:
    """Each curve as the band between the sum of those before it and that sum plus itself."""
    tops = np.cumsum([np.nan_to_num(c.mean) for c in curves], axis=0)
    floors = [np.zeros_like(tops[0]), *tops[:-1]]
    return [Curve(c.series, top, floor, top) for c, floor, top in zip(curves, floors, tops, strict=True)]


def draw(panel: Panel, run: Run) -> str:
    """A <figure>: title, legend with the values of the last step (or of the one under the pointer), and the SVG."""
    (steps, first, last), curves = bin_panel(panel, run)
    shapes = _stack(curves) if panel.stacked else curves
    y = _y_axis(panel, shapes)
    pad = max(1.0, abs(first[0]) * 0.01) if first[0] == last[-1] else 0.0
    x = nice_axis(np.array([first[0], last[-1]]), LEFT, WIDTH - RIGHT, 5)
    x = replace(x, low=first[0] - pad, high=last[-1] + pad)
    at = x(steps)
    edges = np.concatenate([[x.start], (at[1:] + at[:-1]) / 2, [x.end]])
    body = _grid(x, y, panel.unit + (" (log)" if y.log else ""))
    body += "".join(_band(c, at, edges, y, panel.stacked) for c in shapes)
    body += "" if panel.stacked else "".join(_path(c, at, y) for c in shapes)
    suffix = " %" if panel.unit.startswith("%") else ""
    names = [f"step {a:,.0f}" if a == b else f"steps {a:,.0f}–{b:,.0f}" for a, b in zip(first, last, strict=True)]
    readings = [[name, *(_reading(c, i, suffix) for c in curves)] for i, name in enumerate(names)]
    body += "".join(
        f'<rect class="strip" x="{a:.1f}" y="{TOP}" width="{b - a:.2f}" height="{HEIGHT - TOP - BOTTOM}" '
        f'data-v="{"|".join(reading)}"/>'
        for a, b, reading in zip(edges[:-1], edges[1:], readings, strict=True)
    )
    label = html.escape(f"{panel.title} ({panel.unit}), step {first[0]:.0f} to {last[-1]:.0f}")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{body}</svg>'
    return f"<figure>{_caption(panel, curves, readings[-1])}{svg}</figure>"


def _y_axis(panel: Panel, shapes: Sequence[Curve]) -> Axis:
    values = np.concatenate([a for c in shapes for a in (c.mean, c.low, c.high)])
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    if panel.log and len(positive) and positive.max() > 30 * np.median(positive):
        return log_axis(positive, HEIGHT - BOTTOM, TOP)
    bounds = np.array(panel.bounds) * panel.scale
    fixed = len(bounds) == 2  # both ends are known
    return nice_axis(np.concatenate([values, bounds]), HEIGHT - BOTTOM, TOP, 5, pad=0.0 if fixed else 0.04)


def _grid(x: Axis, y: Axis, unit: str) -> str:
    lines = [f'<text x="2" y="10">{html.escape(unit)}</text><text x="2" y="{HEIGHT - 8}">step</text>']
    lines.append(f'<path class="grid" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    for tick in y.ticks:
        at = float(y(tick))
        lines.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        lines.append(f'<text class="y" x="{LEFT - 6}" y="{at + 3.5:.1f}">{number(tick, 6)}</text>')
    for tick in x.ticks:
        if x.low <= tick <= x.high and tick == round(tick):
            lines.append(f'<text class="x" x="{float(x(tick)):.1f}" y="{HEIGHT - 8}">{number(tick, 6)}</text>')
    return "".join(lines)


def _runs(known: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of each unbroken run of True."""
    where = np.flatnonzero(known)
    yield from (run for run in np.split(where, np.flatnonzero(np.diff(where) > 1) + 1) if len(run))


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return "L".join(f"{a:.1f} {b:.2f}" for a, b in zip(x, y, strict=True))


def _band(curve: Curve, at: np.ndarray, edges: np.ndarray, y: Axis, stacked: bool) -> str:
    """The area from `low` to `high`; stacked areas are bars as wide as their bin."""
    areas = []
    for run in _runs(np.isfinite(curve.low) & np.isfinite(curve.high) & (curve.high > curve.low)):
        x, low, high = at[run], y(curve.low[run]), y(curve.high[run])
        if stacked:
            x, low, high = np.stack([edges[run], edges[run + 1]], 1).ravel(), np.repeat(low, 2), np.repeat(high, 2)
        elif len(run) == 1:  # would have no width
            x, low, high = np.array([x[0] - 3, x[0] + 3]), np.repeat(low, 2), np.repeat(high, 2)
        areas.append(f"M{_points(x, high)}L{_points(x[::-1], low[::-1])}Z")
    kind = "stack" if stacked else "band"
    return f'<path class="{kind} c{curve.series.colour}" d="{"".join(areas)}"/>' if areas else ""


def _path(curve: Curve, at: np.ndarray, y: Axis) -> str:
    """The line, broken where a value is missing (unless it is sparse), with dots where points are few or alone."""
    known = np.isfinite(curve.mean) & (~np.isinf(curve.mean) if not y.log else curve.mean > 0)
    runs = [np.flatnonzero(known)] if _sparse(curve.series) else list(_runs(known))
    pixels = y(curve.mean)
    line = "".join(f"M{_points(at[run], pixels[run])}" for run in runs if len(run) > 1)
    dotted = np.flatnonzero(known) if known.sum() <= 30 else [run[0] for run in runs if len(run) == 1]
    dots = "".join(f'<circle cx="{at[i]:.1f}" cy="{pixels[i]:.2f}" r="2.2"/>' for i in dotted)
    return f'<g class="line c{curve.series.colour}"><path d="{line}"/>{dots}</g>'


def _reading(curve: Curve, i: int, suffix: str) -> str:
    spread = "" if curve.std is None else f" ± {number(curve.std[i])}"
    return number(curve.mean[i]) + spread + suffix


def _caption(panel: Panel, curves: Sequence[Curve], reading: Sequence[str]) -> str:
    keys = "".join(
        f'<span><i class="c{c.series.colour}"></i>{html.escape(visible(c.series.label))} <b>{value}</b></span>'
        for c, value in zip(curves, reading[1:], strict=True)
    )
    hint = f"<em>{html.escape(panel.hint)}</em>" if panel.hint else ""
    title = html.escape(visible(panel.title))
    return f'<figcaption><h3>{title}</h3><span class="at">{reading[0]}</span><p>{keys}{hint}</p></figcaption>'


# ---------------------------------------------------------------------------------------------- the page


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from what the run folder holds, and return its path.

    Reads metrics.jsonl, config.yaml, environment.json, summary.json and rollouts/. A missing or damaged file, and a
    chart without data, is left out and named on the page. The file is replaced whole, so it can be open in a browser.

    Raises:
        InputError: there is no such folder.
        OSError: the page cannot be written.
    """
    run_dir = Path(run_dir)
    target, draft = run_dir / "report.html", run_dir / "report.html.tmp"
    draft.write_text(render(read_run(run_dir)), encoding="utf-8", errors="backslashreplace")
    draft.replace(target)
    return target


def render(run: Run) -> str:
    """The whole page as HTML."""
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    sections, left_out = [], []
    for title, drawn in panels(run).items():
        figures = [draw(p, run) for p in drawn if any(len(run.finite(s.key)) for s in p.series)]
        left_out += [p.title for p in drawn if not any(len(run.finite(s.key)) for s in p.series)]
        if figures:
            sections.append(f'<section><h2>{title}</h2><div class="grid3">{"".join(figures)}</div></section>')
    notes = []
    if len(run.steps) > MAX_BINS:
        per_point = len(run.steps) / MAX_BINS
        notes.append(f"a point is the mean of about {per_point:.0f} steps; a pale band is their minimum and maximum")
    if left_out:
        notes.append(f"not drawn, because the run has no such numbers: {', '.join(left_out)}")
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    head += '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
    head += f"<title>{_text(run.name)} · GRPO run</title><style>{STYLE}</style>"
    body = [_header(run), *sections, _samples(run), _end(run, notes)]
    page = f"<head>{head}</head><body>{''.join(body)}<script>{SCRIPT}</script></body>"
    return f'<!doctype html><html lang="en">{page}</html>'


def _text(value: object) -> str:
    return html.escape(visible(value))


def _header(run: Run) -> str:
    stamp = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    tiles = "".join(
        f"<div><dt>{label}</dt><dd>{_text(value)}</dd><dd class=hint>{_text(hint)}</dd></div>"
        for label, value, hint in _tiles(run)
    )
    problems = f'<ul class="problems">{"".join(f"<li>{_text(n)}</li>" for n in run.notes)}</ul>' if run.notes else ""
    return (
        f'<header><p class="at">GRPO run report · {_text(stamp)}</p><h1>{_text(run.name)}</h1>'
        f'<p class="summary">{_text(summary_line(run))}</p>{problems}<dl>{tiles}</dl></header>'
    )


def summary_line(run: Run) -> str:
    """Steps · model · recipe · held-out accuracy, first → last · total time, as far as known."""
    steps, planned = run.steps, run.config.get("max_steps")
    done = int(steps[-1]) if len(steps) else 0
    parts = [f"{done:,} of {planned:,} steps" if isinstance(planned, int) else _count(done, "step")]
    parts += [name for name in (_config(run, "model", "name_or_path"), _config(run, "objective", "recipe")) if name]
    if accuracy := _accuracy(run):
        parts.append(f"held-out accuracy {accuracy}")
    if len(seconds := run.finite("step_time")):
        parts.append(f"{duration(_drawable(seconds).sum())} in steps")
    return " · ".join(parts)


def _config(run: Run, section: str, key: str) -> str:
    values = run.config.get(section)
    return str(values.get(key) or "") if isinstance(values, dict) else ""


def _ends(values: Sequence[float] | np.ndarray, show: Callable[[Any], str]) -> str:
    """First → last, or the only one, or nothing."""
    return " → ".join(show(value) for value in ([values[0], values[-1]] if len(values) > 1 else values))


def _accuracy(run: Run) -> str:
    """From the evaluations in metrics.jsonl, else from summary.json."""
    values = run.finite("eval_accuracy")
    summary = [as_float(run.summary.get(f"accuracy_{when}")) for when in ("before", "after")]
    return _ends(values if len(values) else [value for value in summary if math.isfinite(value)], percent)


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, hint) of the large numbers at the top; those without data are left out."""
    tiles = [("Held-out accuracy", _accuracy(run), "first → last evaluation")]
    main = ("Reward", "reward", "") if len(run.finite("reward")) else ("Loss", "loss", "")
    for label, key, unit in (main, ("Completion length", "completions/mean_length", " tokens")):
        ends = _ends(run.finite(key), number)
        tiles.append((label, ends and ends + unit, "first → last step"))
    speed = run.finite("tokens_per_second")
    tiles.append(("Throughput", f"{number(np.median(_drawable(speed)))} tok/s" if len(speed) else "", "median step"))
    peaks = {s.label: run.finite(s.key) for s in _phases(run, "peak_gib")}
    highest = max(((values.max(), name) for name, values in peaks.items() if len(values)), default=None)
    if highest:
        tiles.append(("Memory peak", f"{number(highest[0])} GiB", f"in phase {highest[1]}"))
    return [tile for tile in tiles if tile[1]]


def _samples(run: Run) -> str:
    """The group with the widest and the one with the narrowest spread of rewards, of each step that was read."""
    blocks = [_group(step, rows) for step, all_rows in run.samples for rows in _pick_groups(all_rows)]
    if not blocks:
        return ""
    lead = "Best and worst completion of two groups a step (first, middle and last step kept): "
    lead += "the group whose rewards differ most, and the one where they differ least."
    return f"<section><h2>What it says</h2><p>{lead}</p>{''.join(blocks)}</section>"


def _pick_groups(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row.get("prompt_id")), []).append(row)
    ranked = sorted(groups.values(), key=_spread)
    return [ranked[-1], ranked[0]] if len(ranked) > 1 else ranked


def _rewards(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [value for row in rows if math.isfinite(value := as_float(row.get("reward")))]


def _spread(rows: Sequence[Mapping[str, Any]]) -> float:
    rewards = _rewards(rows)
    return max(rewards) - min(rewards) if rewards else -1.0


def _group(step: int, rows: Sequence[Mapping[str, Any]]) -> str:
    scored = [row for row in rows if math.isfinite(as_float(row.get("reward")))] or list(rows)
    best = max(scored, key=lambda row: as_float(row.get("reward")))
    worst = min(scored, key=lambda row: as_float(row.get("reward")))
    cards = [("best", best), ("worst", worst)] if _spread(rows) > 0 else [("all equal", best)]
    rewards = " ".join(number(value) for value in sorted(_rewards(rows), reverse=True)[:32])
    title = f"step {step:,} · prompt {rows[0].get('prompt_id', '–')} · {_count(len(rows), 'completion')}"
    title += f" · rewards {rewards or '–'}"
    return (
        f'<article><h3>{_text(title)}</h3><pre class="prompt">{_long(_chat(rows[0].get("prompt")))}</pre>'
        f'<div class="grid2">{"".join(_card(label, row) for label, row in cards)}</div></article>'
    )


def _card(label: str, row: Mapping[str, Any]) -> str:
    facts = [("reward", number(row.get("reward")))]
    facts += [(key.removeprefix("reward/"), number(value)) for key, value in row.items() if key.startswith("reward/")]
    facts += [("advantage", number(row.get("advantage"))), ("tokens", number(row.get("num_tokens")))]
    ended = str(row.get("finish_reason"))
    facts.append(("ended by", "the length limit" if ended == "length" else ended))
    spans = "".join(f"<span>{_text(name)} <b>{_text(value)}</b></span>" for name, value in facts)
    return f'<div class="card"><p><strong>{label}</strong>{spans}</p><pre>{_long(row.get("completion"))}</pre></div>'


def _chat(prompt: Any) -> Any:
    """Chat messages, which rollout files hold as JSON, one after the other; any other prompt as it is."""
    try:
        messages = json.loads(prompt) if isinstance(prompt, str) and prompt.startswith("[{") else prompt
    except (ValueError, RecursionError):
        return prompt
    if isinstance(messages, list) and all(isinstance(m, dict) and "content" in m for m in messages):
        return "\n\n".join(f"{m.get('role', '')}: {m['content']}" for m in messages)
    return prompt


def _long(text: object) -> str:
    return _text(middle_out(str(text if text is not None else "–"), MAX_TEXT)) or "<i>(empty)</i>"


def _end(run: Run, notes: Sequence[str]) -> str:
    """All columns in numbers, the files as they are, and what the reader should know about this page."""
    rows = "".join(_table_row(key, run.finite(key)) for key in sorted(run.columns))
    header = "".join(f"<th>{name}</th>" for name in ("metric", "first", "last", "least", "most", "values"))
    blocks = [("all metrics in numbers", f"<table><tr>{header}</tr>{rows}</table>")] if rows else []
    blocks += [(name, f"<pre>{_text(text)}</pre>") for name, text in run.texts.items()]
    details = "".join(f"<details><summary>{_text(name)}</summary>{body}</details>" for name, body in blocks)
    listed = "".join(f"<li>{_text(note)}</li>" for note in notes)
    footer = f"<footer><ul>{listed}</ul></footer>" if notes else ""
    return f"<section><h2>The run</h2>{details}</section>{footer}"


def _table_row(key: str, values: np.ndarray) -> str:
    numbers = (values[0], values[-1], values.min(), values.max(), len(values)) if len(values) else (None,) * 4 + (0,)
    return f"<tr><td>{_text(key)}</td>{''.join(f'<td>{number(v)}</td>' for v in numbers)}</tr>"


SCRIPT = """
for (const figure of document.querySelectorAll('figure')) {
  const places = [figure.querySelector('.at'), ...figure.querySelectorAll('b')];
  const last = places.map(place => place.textContent);
  const show = values => places.forEach((place, i) => { place.textContent = values[i]; });
  figure.addEventListener('mouseover', event => show(event.target.dataset.v?.split('|') ?? last));
  figure.addEventListener('mouseleave', () => show(last));
}
"""

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1b1f24;--soft:#626b76;--rule:#e2e5ea;--code:#f3f4f7;
--c0:#2368c4;--c1:#e0671f;--c2:#159a70;--c3:#b3367f;--c4:#6a4fc2;--c5:#c99700;--c6:#0f97b5;--c7:#c73a3a}
@media(prefers-color-scheme:dark){:root{--page:#14171b;--card:#1d2126;--ink:#e7eaee;--soft:#98a2ae;--rule:#31373f;
--code:#171a1f;--c0:#6aa5f5;--c1:#f0935a;--c2:#45c79b;--c3:#e27ab8;--c4:#a48ff0;--c5:#e3bb45;--c6:#4fc3dc;--c7:#f07f7f}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1280px;padding:28px 28px 48px;background:var(--page);color:var(--ink);
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{margin:0;font-size:30px;line-height:1.2;overflow-wrap:anywhere}h2{margin:34px 0 12px;font-size:18px}
h3{margin:0;font-size:14px}p{margin:0 0 12px}
.at,.hint,em,dt{color:var(--soft);font-size:12px;font-style:normal}
header .at{margin:0}.summary{margin:6px 0 18px;font-size:16px;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:14px;margin:0}
dl div,figure,article,details{background:var(--card);border:1px solid var(--rule);border-radius:10px}
dl div{padding:12px 16px}dd{margin:0;font-size:19px;font-weight:600;font-variant-numeric:tabular-nums}
dd.hint{font-weight:400;font-size:12px}
.grid3{display:grid;grid-template-columns:repeat(auto-fill,minmax(350px,1fr));gap:14px}
figure{margin:0;padding:12px 12px 6px;display:flex;flex-direction:column}
figcaption{display:grid;grid-template-columns:1fr auto;align-items:baseline}
figcaption p{grid-column:1/-1;margin:2px 0 6px;display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12px;min-height:20px}
figcaption em{margin-left:auto}b{font-variant-numeric:tabular-nums}
i{display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:5px}i[class]{background:var(--c)}
svg{display:block;width:100%;height:auto;overflow:visible;margin-top:auto}
svg text{font-size:11px;fill:var(--soft)}
text.y{text-anchor:end}text.x{text-anchor:middle}.grid{stroke:var(--rule);fill:none}
.line path{stroke:var(--c);stroke-width:1.8;fill:none;stroke-linejoin:round}.line circle{fill:var(--c)}
.band{fill:var(--c);opacity:.18}.stack{fill:var(--c);opacity:.85}
.strip{fill:transparent}.strip:hover{fill:var(--soft);opacity:.35}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}
.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}.c7{--c:var(--c7)}
article{padding:14px 16px;margin-bottom:14px}article h3{margin-bottom:8px;overflow-wrap:anywhere}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(400px,1fr));gap:14px}.card{min-width:0}
.card p{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12.5px;margin:10px 0 6px}
pre{margin:0;padding:10px 12px;max-height:340px;overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere;
background:var(--code);border-radius:6px;font:12.5px/1.5 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}
details{padding:10px 16px;margin-bottom:10px}summary{cursor:pointer;font-weight:600}
details[open] summary{margin-bottom:8px}
table{border-collapse:collapse;font-size:12.5px;font-variant-numeric:tabular-nums}
th,td{padding:3px 18px 3px 0;border-bottom:1px solid var(--rule);text-align:right}
th:first-child,td:first-child{text-align:left;overflow-wrap:anywhere}
.problems{margin:0 0 16px;padding:9px 12px 9px 30px;border-left:3px solid var(--c5);background:var(--card);
border-radius:4px;font-size:13px}
footer{margin-top:24px;color:var(--soft);font-size:12.5px}footer ul{margin:0;padding-left:18px}
"""
