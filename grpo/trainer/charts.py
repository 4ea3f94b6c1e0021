"""Curves as inline SVG: they follow the light or dark theme, print sharply and need no plotting library.

`draw` turns a panel and the columns of a run into one <figure>: binned curves, bands, axes, and the numbers under
the pointer; `draw_bars` draws a short table as horizontal bars. Labels may come from a dataset or a reward's name, so
they are always escaped.
Left out: which panels there are and the page around them (report.py); zoom, export and comparing runs: trackers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grpo.errors import clip
from grpo.trainer.run_reader import Run
from grpo.trainer.text import escaped, number

MAX_BINS = 200  # points drawn per curve: about two pixels each
WIDTH, HEIGHT = 390, 202  # one panel, in px at 1280 px page width
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 24, 24
COLOURS = 14  # classes c0 … c13, which the page's style gives a colour
NAMES, ROW = 78, 17  # bars: px at the left for the names of the rows, px of height per row


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

    `stacked`: the curves add up. `absent`: what a step without a value counts as.
    `log`: a logarithmic axis if the largest value is over 30 × the median.
    """

    title: str
    unit: str
    series: tuple[Series, ...]
    hint: str = ""
    scale: float = 1.0
    bounds: tuple[float, ...] = (0.0,)
    stacked: bool = False
    absent: float = math.nan
    log: bool = False


@dataclass(frozen=True)
class Bars:
    """Horizontal bars. `rows`: name, note (shown under the pointer), values [len(parts)] (NaN: not known).

    `parts`: (label, colour, lane); the parts of a lane stand one after the other, lanes of a row one under the other.
    """

    title: str
    unit: str
    parts: tuple[tuple[str, int, int], ...]
    rows: tuple[tuple[str, str, tuple[float, ...]], ...]
    hint: str = ""


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
    columns = {key: drawable(run.columns[key]) for s in shown for key in (s.key, s.std) if key in run.columns}
    rows = np.arange(len(run.steps))
    if all(_sparse(s) for s in shown):  # only the steps that were evaluated
        rows = rows[np.any([np.isfinite(run.columns[s.key]) for s in shown], axis=0)]
    starts = np.unique(np.linspace(0, len(rows), min(MAX_BINS, len(rows)), endpoint=False).astype(int))
    curves = []
    for s in shown:
        values = columns[s.key][rows] * panel.scale
        values = np.where(np.isnan(values), panel.absent, values)
        mean, low, high = _bin(values, starts)
        std = _bin(columns[s.std][rows] * panel.scale, starts)[0] if len(run.finite(s.std)) else None
        curves.append(Curve(s, mean, low, high) if std is None else Curve(s, mean, mean - std, mean + std, std))
    return np.stack(_bin(drawable(run.steps[rows]), starts)), curves


def drawable(values: np.ndarray) -> np.ndarray:
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
    label = escaped(f"{panel.title} ({panel.unit}), step {first[0]:.0f} to {last[-1]:.0f}")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{body}</svg>'
    keys = [(c.series.label, c.series.colour) for c in curves]
    return f"<figure>{_caption(panel.title, panel.hint, keys, readings[-1])}{svg}</figure>"


def draw_bars(bars: Bars) -> str:
    """A <figure> like `draw`'s; the legend has the values of the longest row, or of the one under the pointer."""
    values = np.array([row[2] for row in bars.rows])
    lanes = sorted({lane for _, _, lane in bars.parts})
    ends = np.stack(
        [np.nansum(values[:, [p[2] == lane for p in bars.parts]], axis=1) for lane in lanes]
    )  # [lanes, rows]
    x = nice_axis(np.append(ends.ravel(), 0.0), NAMES, WIDTH - RIGHT, 5, pad=0.04)
    foot = TOP + ROW * len(bars.rows)
    body = f'<text x="2" y="10">{escaped(bars.unit)}</text>' + _uprights(x, foot)
    body += "".join(_bars_of(bars, index, x, len(lanes)) for index in range(len(bars.parts)))
    readings = [[escaped(f"{name}{note}"), *map(number, row)] for name, note, row in bars.rows]
    for index, ((name, _, _), reading) in enumerate(zip(bars.rows, readings, strict=True)):
        top = TOP + ROW * index
        body += f'<text class="name" x="{NAMES - 6}" y="{top + ROW / 2 + 3.5:.1f}">{escaped(clip(name, 12))}</text>'
        body += f'<rect class="strip" x="0" y="{top}" width="{WIDTH}" height="{ROW}" data-v="{"|".join(reading)}"/>'
    label = escaped(f"{bars.title} ({bars.unit})")
    svg = f'<svg viewBox="0 0 {WIDTH} {foot + BOTTOM}" role="img" aria-label="{label}">{body}</svg>'
    keys = [(name, colour) for name, colour, _ in bars.parts]
    return f"<figure>{_caption(bars.title, bars.hint, keys, readings[int(ends.max(axis=0).argmax())])}{svg}</figure>"


def _bars_of(bars: Bars, index: int, x: Axis, lanes: int) -> str:
    """One part of all rows as one path."""
    _, colour, lane = bars.parts[index]
    before = [i for i in range(index) if bars.parts[i][2] == lane]
    height = (ROW - 5) / lanes
    areas = []
    for position, (_, _, values) in enumerate(bars.rows):
        start = float(np.nansum([values[i] for i in before]))
        if values[index] > 0:
            left, right = x([start, start + values[index]])
            top = TOP + ROW * position + 2.5 + lane * height
            corners = np.array([left, right, right, left]), np.array([top, top, top + height, top + height])
            areas.append(f"M{_points(*corners)}Z")
    return f'<path class="stack c{colour}" d="{"".join(areas)}"/>' if areas else ""


def _uprights(x: Axis, foot: float) -> str:
    lines = ""
    for tick in x.ticks:
        at = float(x(tick))
        lines += f'<path class="grid" d="M{at:.1f} {TOP}V{foot}"/>'
        lines += f'<text class="x" x="{at:.1f}" y="{foot + 14}">{number(tick, 6)}</text>'
    return lines


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
    lines = [f'<text x="2" y="10">{escaped(unit)}</text><text x="2" y="{HEIGHT - 8}">step</text>']
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


def _caption(title: str, hint: str, keys: Sequence[tuple[str, int]], reading: Sequence[str]) -> str:
    """`keys`: (label, colour) of each value after the first of `reading`, which says where they were read."""
    values = "".join(
        f'<span><i class="c{colour}"></i>{escaped(label)} <b>{value}</b></span>'
        for (label, colour), value in zip(keys, reading[1:], strict=True)
    )
    note = f"<em>{escaped(hint)}</em>" if hint else ""
    head = f'<h3>{escaped(title)}</h3><span class="at">{reading[0]}</span>'
    return f"<figcaption>{head}<p>{values}{note}</p></figcaption>"


SCRIPT = """
for (const figure of document.querySelectorAll('figure')) {
  const places = [figure.querySelector('.at'), ...figure.querySelectorAll('b')];
  const last = places.map(place => place.textContent);
  const show = values => places.forEach((place, i) => { place.textContent = values[i]; });
  figure.addEventListener('mouseover', event => show(event.target.dataset.v?.split('|') ?? last));
  figure.addEventListener('mouseleave', () => show(last));
}
"""
