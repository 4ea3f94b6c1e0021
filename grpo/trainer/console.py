"""What a person watches while a run goes on: a progress view, and plain helpers for lines, tables and samples.

On a terminal (or in a notebook with ipywidgets) the view is live; anywhere else it is one plain line every few
seconds, without control characters. Text from models and datasets is untrusted: no markup is read in it, and
its control characters are shown as symbols.
Left out: writing anything down. `metrics.jsonl` is the record; this is only a window on it.
"""

from __future__ import annotations

import importlib.util
import io
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo.errors import clip
from grpo.trainer.text import as_float, duration, middle_out, number, percent, sparkline, visible

COLUMNS = (
    "reward",
    "eval_accuracy",
    "completions/mean_length",
    "kl",
    "entropy",
    "grad_norm",
    "tokens_per_second",
    "peak_gib",
)
"""Metrics of the progress view. The first one gets the sparkline; `peak_gib` is the highest of all phases."""

SUPERVISED_COLUMNS = ("loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_gib")
"""Instead of COLUMNS where the first row has no reward."""

NAMES = {  # metric -> its short name here, its unit
    "eval_accuracy": ("accuracy", ""),
    "eval_reward": ("eval reward", ""),
    "eval_loss": ("eval loss", ""),
    "completions/mean_length": ("length", "tok"),
    "completions/clipped_ratio": ("cut off", ""),
    "frac_reward_zero_std": ("zero variance", ""),
    "grad_norm": ("grad", ""),
    "learning_rate": ("lr", ""),
    "tokens_per_second": ("", "tok/s"),
    "num_tokens": ("", "tokens"),
    "peak_gib": ("peak", "GiB"),
    "step_time": ("", "s/step"),
}
SHARES = {"eval_accuracy", "completions/clipped_ratio", "frac_reward_zero_std"}  # 0..1, shown in %
LONG_PHASE_S = 30.0  # a phase that says how far it is says so this often in a log file
MAX_TEXT = 600  # characters of a prompt or completion that a sample shows


def _tolerant(stream: TextIO) -> TextIO:
    """An ASCII-only stream shows ? for what it cannot encode, instead of raising in the middle of a run."""
    if isinstance(stream, io.TextIOWrapper) and "utf" not in (stream.encoding or "").lower():
        stream.reconfigure(errors="replace")
    return stream


def _is_live(console: RichConsole, stream: TextIO) -> bool:
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None  # without it rich would show nothing
    return bool(stream.isatty()) and not console.is_dumb_terminal


def _rich(stream: TextIO | None, live: bool | None) -> tuple[RichConsole, bool]:
    """A rich console on `stream` that never reads markup, and whether it may move the cursor and use colour."""
    target = _tolerant(stream if stream is not None else sys.stdout)
    plain: dict[str, Any] = {"file": target, "markup": False, "emoji": False, "highlight": False}
    console = RichConsole(**plain)
    if not (_is_live(console, target) if live is None else live):
        # forced off: an environment that forces colour must not reach a log file
        return RichConsole(**plain, force_terminal=False, force_jupyter=False), False
    return (console if console.is_jupyter else RichConsole(**plain, force_terminal=True)), True


class Console:
    """Lines, tables and samples on `stream` (standard output by default), in colour only on a terminal."""

    def __init__(self, stream: TextIO | None = None, live: bool | None = None) -> None:
        self.rich, self.is_live = _rich(stream, live)
        self.stream = stream

    def say(self, line: str = "", style: str = "") -> None:
        """Print `line` as it is; `style` is a rich style such as "bold" and has no effect outside a terminal."""
        self.rich.print(Text(visible(line), style=style), soft_wrap=not self.is_live)

    def table(self, title: str, rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> None:
        """Print rows of cells in columns under a title; numbers are aligned right and shown by `number`."""
        cells = [list(row) for row in rows]
        width = max([len(header), *map(len, cells)], default=0)
        table = Table(title=Text(visible(title), style="bold"), title_justify="left", box=None, pad_edge=False)
        table.show_header = bool(header)
        for i in range(width):
            column = [row[i] for row in cells if i < len(row)]
            right = bool(column) and all(v is None or _is_number(v) for v in column)
            name = Text(visible(header[i]) if i < len(header) else "", style="dim")
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(_cell(value)) for value in row))
        self.rich.print(table)

    def samples(self, samples: Iterable[tuple[object, object, Mapping[str, float | None]]]) -> None:
        """Print (prompt, completion, rewards by function) each; long texts lose their middle, not their end."""
        for i, (prompt, completion, rewards) in enumerate(samples, 1):
            scores = ", ".join(f"{visible(name)} {number(value)}" for name, value in rewards.items())
            self.rich.print(Text.assemble((f"sample {i}", "bold"), ("  reward: ", "dim"), (scores or "none", "cyan")))
            for label, text in (("prompt", prompt), ("completion", completion)):
                self.rich.print(Text(f"  {label}", style="dim"))
                self.rich.print(Padding(Text(middle_out(visible(text), MAX_TEXT)), (0, 0, 0, 4)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return number(value) if value is None or isinstance(value, float) else visible(value)


class ProgressView:
    """A view of a running loop, used as a context manager.

    with ProgressView("GRPO", total=200) as view:
        view.phase("rollout")
        view.update({"step": 1, "reward": 0.25, ...})

    `total` counts steps; a row without `step` counts one up. `live=None` looks at the stream. When not live, a line
    is printed for the first and the last step and at most every `every_s` seconds between. An odd value (None, NaN,
    text) is shown as – and never raises. `clock` gives seconds. What `console` prints appears above the view.
    """

    def __init__(
        self,
        title: str,
        total: int,
        columns: Sequence[str] = COLUMNS,
        stream: TextIO | None = None,
        live: bool | None = None,
        *,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._total, self._columns = clip(visible(title)), total, tuple(columns)
        self._clock, self._every_s = clock, every_s
        self.console = Console(stream, live)
        self._live: Live | None = None
        self._start = self._phase_start = clock()
        self._phase = self._phase_name = ""
        self._told = self._start
        self._step = 0
        self._row: Mapping[str, Any] = {}
        self._evals: dict[str, tuple[Any, int]] = {}  # value, step: evaluations are rare, the last one stays in view
        self._history = _History()
        self._ticks: deque[tuple[float, int]] = deque(maxlen=33)  # (seconds, step) for the time left
        self._printed: tuple[float, int] | None = None

    def __enter__(self) -> Self:
        self._start = self._phase_start = self._clock()
        if self.console.is_live:
            self._live = Live(self, console=self.console.rich, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase = "" if kind is None else f"stopped ({kind.__name__})"
        self._phase_start = self._clock()
        if self._live is not None:
            self._live.stop()  # draws once more
            self._live = None
            if self.console.rich.is_jupyter and self._row:
                self._print_line()  # a widget is lost when the notebook is saved, a line is not
        elif self._row and (self._printed is None or self._printed[1] != self._step):
            self._print_line()

    def phase(self, name: str) -> None:
        """Show `name` as what is running now, with its seconds (live view only)."""
        self._phase, self._phase_start = clip(visible(name), 30), self._clock()
        self._phase_name, self._told = self._phase, self._phase_start

    def progress(self, done: int, total: int) -> None:
        """How far the running phase is; when not live, a line every `LONG_PHASE_S` seconds."""
        self._phase = f"{self._phase_name} {done}/{total}"
        now = self._clock()
        if not self.console.is_live and now - self._told >= LONG_PHASE_S:
            self._told = now
            self.console.say(f"{self._title}: {self._phase}, {duration(now - self._phase_start)}")

    def note(self, line: str) -> None:
        """Print `line` above the view."""
        self.console.say(line)

    def update(self, row: Mapping[str, float | None]) -> None:
        """Take the metrics row of the step that just ended."""
        if self._columns == COLUMNS and not self._row and "reward" not in row:
            self._columns = SUPERVISED_COLUMNS
        step = as_float(row.get("step"))
        self._step = int(step) if math.isfinite(step) else self._step + 1
        self._row = row
        self._ticks.append((self._clock(), self._step))
        for key in self._columns:
            if key.startswith("eval_") and key in row:
                self._evals[key] = (row[key], self._step)
        if self._columns and self._columns[0] in row:
            self._history.add(as_float(row[self._columns[0]]))
        if not self.console.is_live:
            self._print_if_due()

    def _print_if_due(self) -> None:
        if self._printed is None or self._step >= self._total or self._clock() - self._printed[0] >= self._every_s:
            self._print_line()

    def _print_line(self) -> None:
        self._printed = (self._clock(), self._step)
        parts = [f"{self._title}: step {self._step}/{self._total}", *self._clocks(), *self._metrics()]
        if self._phase.startswith("stopped"):
            parts.append(self._phase)
        self.console.say("  ".join(parts))

    def _clocks(self) -> list[str]:
        now = self._clock()
        left = self._seconds_left(now)
        return [duration(now - self._start)] + ([f"{duration(left)} left"] if left else [])

    def _seconds_left(self, now: float) -> float:
        """From the pace of the last 32 steps; the first step, which often compiles, counts only while it is alone."""
        ticks = list(self._ticks) if len(self._ticks) > 1 else [(self._start, self._step - 1), *self._ticks]
        (begin, first), (end, last) = ticks[0], ticks[-1]
        if last <= first or not self._ticks:
            return 0.0
        return max(0.0, (self._total - last) * (end - begin) / (last - first) - (now - end))

    def _metrics(self) -> list[str]:
        return [text for key in self._columns if (text := self._metric(key))]

    def _metric(self, key: str) -> str:
        row, since = self._row, ""
        if key in self._evals:
            value, step = self._evals[key]
            since = f" (step {step})" if step != self._step else ""
        elif key == "peak_gib" and key not in row:
            value, since = _highest_peak(row)
            if value is None:
                return ""
        elif key in row:
            value = row[key]
        else:
            return ""
        name, unit = NAMES.get(key, (key, ""))
        shown = percent(value) if key in SHARES else number(value)
        return " ".join(part for part in (name, shown, unit) if part) + since

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        """The live view: a line with bar and clocks, then the metrics packed to the width of the terminal."""
        yield self._bar(options.max_width)
        yield from _packed(self._metric_texts(), options.max_width)

    def _bar(self, width: int) -> RenderableType:
        grid = Table.grid(padding=(0, 2, 0, 0))
        title = Text(self._title, style="bold", no_wrap=True, overflow="ellipsis")
        title.truncate(max(8, width // 4), overflow="ellipsis")
        cells: list[RenderableType] = [
            title,
            ProgressBar(total=max(1, self._total), completed=self._step, width=max(6, min(40, width // 5))),
            Text(f"{self._step}/{self._total}"),
            Text(" · ".join(self._clocks()), style="dim"),
        ]
        if self._phase:
            seconds = round(self._clock() - self._phase_start)
            cells.append(Text(f"{self._phase}{f' {seconds} s' if seconds else ''}", style="yellow"))
        grid.add_row(*cells)
        return grid

    def _metric_texts(self) -> list[Text]:
        texts = []
        for i, key in enumerate(self._columns):
            shown = self._metric(key)
            if i == 0 and shown and (line := sparkline(self._history.values())):
                shown += f" {line}"
            if shown:
                texts.append(Text(shown, style="bold cyan" if key.startswith("eval_") or i == 0 else ""))
        return texts


def _highest_peak(row: Mapping[str, Any]) -> tuple[float | None, str]:
    """The highest `phase/<name>/peak_gib` of a row, and where: the innermost phase, which the ledger closes first."""
    found = [(as_float(value), str(key).split("/")) for key, value in row.items() if str(key).endswith("/peak_gib")]
    peak, parts = max(((p, k) for p, k in found if math.isfinite(p)), key=lambda pair: pair[0], default=(None, []))
    return peak, f" ({clip(visible(parts[1]), 30)})" if len(parts) == 3 else ""


def _packed(items: Sequence[Text], width: int) -> list[Text]:
    """Lines of at most `width` cells that break between items only."""
    lines: list[Text] = []
    for item in items:
        if lines and lines[-1].cell_len + 3 + item.cell_len <= width:
            lines[-1].append(" · ", style="dim").append_text(item)
        else:
            lines.append(item.copy())
    return lines


class _History:
    """All values of a run in at most 256 numbers: when full, neighbours are averaged and the stride doubles."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._pending: list[float] = []
        self._stride = 1

    def add(self, value: float) -> None:
        if math.isfinite(value):
            self._pending.append(value)
        if len(self._pending) >= self._stride:
            self._means.append(sum(self._pending) / len(self._pending))
            self._pending = []
        if len(self._means) == 256:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(a + b) / 2 for a, b in pairs]
            self._stride *= 2

    def values(self) -> list[float]:
        return list(self._means)
