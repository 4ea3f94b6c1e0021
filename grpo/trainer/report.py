"""report.html: one self-contained page that shows whether a run learned, what it wrote, and what it cost.

It is drawn from the run folder alone, so it can be written during a run, after a crash, or again years later.
Curves are inline SVG (they follow the light or dark theme and need no plotting library); nothing is fetched, and a
content policy inside the page forbids it. Text from models and datasets is untrusted and always escaped.
This file is what is on the page: which panels, which numbers, which samples, and the look of it.
Left out: reading the run folder (run_reader.py), drawing (charts.py), and comparing runs, which trackers do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from grpo.trainer.charts import COLOURS, MAX_BINS, SCRIPT, Bars, Panel, Series, draw, draw_bars, drawable
from grpo.trainer.run_reader import Run, read_run
from grpo.trainer.text import as_float, counted, duration, escaped, middle_out, number, percent

MAX_TEXT = 4000  # characters of a prompt or completion
CAUSES = {
    f"groups/{cause}": Series(f"groups/{cause}", cause.replace("_", " "), colour=i)
    for i, cause in enumerate(("all_right", "all_wrong", "all_truncated"))
}

COSTS = "What it costs"
OWN = "a phase without those inside it"
PHASES = tuple(
    "load rollout wake sync probe sleep score reference pack update forward backward optimizer save evaluation".split()  # noqa: SIM905
)
DEVICE = (("allocated", 0, 0), ("reserved on top", 5, 0), ("others", 8, 0))
HOST = (("resident", 2, 0), ("pinned", 3, 1))


def _lines(**labels: str) -> tuple[Series, ...]:
    """Series from label="key" pairs; _ in a label is a hyphen."""
    return tuple(Series(key, label.replace("_", "-"), colour=i) for i, (label, key) in enumerate(labels.items()))


def panels(run: Run) -> dict[str, list[Panel]]:
    """Section title -> its panels, whether or not the run has their columns. Memory within a step: `memory_bars`."""
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
            _causes(run),
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
        COSTS: [
            Panel("Seconds per phase", "seconds per step", _of_a_step(run), OWN, stacked=True, absent=0.0),
            Panel("Memory peak per phase", "GiB", _phases(run, "peak_gib"), "peaks do not add up"),
            Panel("Throughput", "tokens per second", _lines(mean="tokens_per_second")),
        ],
    }


def _causes(run: Run) -> Panel:
    """Why groups taught nothing: as shares if the number of groups in a step is known, else as counts."""
    title, causes = "Zero-variance groups by cause", tuple(CAUSES.values())
    total = _groups_per_step(run)
    if total is None:
        return Panel(title, "groups", causes, stacked=True)
    return Panel(title, "% of groups", causes, scale=100 / total, bounds=(0, total), stacked=True)


def _groups_per_step(run: Run) -> int | None:
    """The number of groups N for which `frac_reward_zero_std` × N is whole and covers the counts in every row.

    It is `prompts_per_step` of the configuration; without one, the largest counts ÷ share of any row, which is N
    wherever a row's zero-variance groups all have a counted cause. None where neither fits.
    """
    empty = np.full(len(run.steps), np.nan)
    counts = np.sum([run.columns.get(key, empty) for key in CAUSES], axis=0)
    share = run.columns.get("frac_reward_zero_std", empty)
    known = np.isfinite(counts) & np.isfinite(share) & (np.abs(counts) < 1e9) & (share >= 0) & (share <= 1)
    counts, share = counts[known], share[known]
    ratios = counts[share > 0] / share[share > 0]
    for total in (as_float(run.config.get("prompts_per_step")), ratios.max(initial=0.0)):
        whole = share * round(total) if 1 <= total < 1e9 else np.full(len(share), np.nan)
        if len(share) and np.all(np.abs(whole - np.round(whole)) < 1e-6) and np.all(counts <= whole + 0.5):
            return round(total)
    return None


def _parts(key: str, first: str, last: str) -> bool:
    return key.startswith(f"{first}/") and key.endswith(f"/{last}") and len(key) > len(first) + len(last) + 2


def _phases(run: Run, kind: str) -> tuple[Series, ...]:
    """In the order of a step. A phase keeps its colour over all panels, and the known ones over all runs."""
    names = dict.fromkeys(key.split("/")[1] for key in run.columns if key.startswith("phase/"))
    order = [name for name in PHASES if name in names] + [name for name in names if name not in PHASES]
    colour = {name: i % COLOURS for i, name in enumerate(dict.fromkeys([*PHASES, *names]))}
    return tuple(Series(f"phase/{name}/{kind}", name, colour=colour[name]) for name in order)


def _of_a_step(run: Run) -> tuple[Series, ...]:
    """Own seconds of what every step has: loading happens once, and its bar would flatten all others."""
    return tuple(series for series in _phases(run, "own_seconds") if series.label != "load")


def memory_bars(run: Run) -> list[Bars]:
    """Device and host memory of each phase, all of the step at which the phase's peak was highest."""
    device: list[tuple[str, str, tuple[float, ...]]] = []
    host: list[tuple[str, str, tuple[float, ...]]] = []
    for series in _phases(run, "peak_gib"):
        if not len(run.finite(series.key)):
            continue
        peaks = run.columns[series.key]
        row = int(np.where(np.isfinite(peaks), peaks, -np.inf).argmax())
        peak, reserved, others, resident, pinned = (
            _gib(run, f"phase/{series.label}/{kind}_gib", row)
            for kind in ("peak", "reserved", "others", "resident", "pinned")
        )
        note = f" · step {run.steps[row]:,.0f}"
        if math.isnan(reserved):
            resident = peak  # without CUDA the peak is the process's
        else:
            device.append((series.label, note, (peak, max(0.0, reserved - peak), others)))
        host.append((series.label, note, (resident, pinned)))
    host_parts = HOST if any(not math.isnan(values[1]) for _, _, values in host) else HOST[:1]
    host = [(name, note, values[: len(host_parts)]) for name, note, values in host]
    tables = (("Device memory by phase", DEVICE, device), ("Host memory by phase", host_parts, host))
    return [Bars(title, "GiB", parts, tuple(rows), "each at its highest step") for title, parts, rows in tables if rows]


def _gib(run: Run, key: str, row: int) -> float:
    value = run.columns[key][row] if key in run.columns else math.nan
    return float(np.maximum(drawable(np.asarray(value)), 0.0)) if math.isfinite(value) else math.nan


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
        figures += [draw_bars(bars) for bars in (memory_bars(run) if title == COSTS else [])]
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
    head += f"<title>{escaped(run.name)} · GRPO run</title><style>{STYLE}</style>"
    body = [_header(run), *sections, _samples(run), _end(run, notes)]
    page = f"<head>{head}</head><body>{''.join(body)}<script>{SCRIPT}</script></body>"
    return f'<!doctype html><html lang="en">{page}</html>'


def _header(run: Run) -> str:
    stamp = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    tiles = "".join(
        f"<div><dt>{label}</dt><dd>{escaped(value)}</dd><dd class=hint>{escaped(hint)}</dd></div>"
        for label, value, hint in _tiles(run)
    )
    problems = f'<ul class="problems">{"".join(f"<li>{escaped(n)}</li>" for n in run.notes)}</ul>' if run.notes else ""
    return (
        f'<header><p class="at">GRPO run report · {escaped(stamp)}</p><h1>{escaped(run.name)}</h1>'
        f'<p class="summary">{escaped(summary_line(run))}</p>{problems}<dl>{tiles}</dl></header>'
    )


def summary_line(run: Run) -> str:
    """Steps · model · recipe · held-out accuracy, first → last · total time, as far as known."""
    steps, planned = run.steps, run.config.get("max_steps")
    done = int(steps[-1]) if len(steps) else 0
    parts = [f"{done:,} of {planned:,} steps" if isinstance(planned, int) else counted(done, "step")]
    parts += [name for name in (_config(run, "model", "name_or_path"), _config(run, "objective", "recipe")) if name]
    if accuracy := _accuracy(run):
        parts.append(f"held-out accuracy {accuracy}")
    if len(seconds := run.finite("step_time")):
        parts.append(f"{duration(drawable(seconds).sum())} in steps")
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
    tiles.append(("Throughput", f"{number(np.median(drawable(speed)))} tok/s" if len(speed) else "", "median step"))
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
    title = f"step {step:,} · prompt {rows[0].get('prompt_id', '–')} · {counted(len(rows), 'completion')}"
    title += f" · rewards {rewards or '–'}"
    return (
        f'<article><h3>{escaped(title)}</h3><pre class="prompt">{_long(_chat(rows[0].get("prompt")))}</pre>'
        f'<div class="grid2">{"".join(_card(label, row) for label, row in cards)}</div></article>'
    )


def _card(label: str, row: Mapping[str, Any]) -> str:
    facts = [("reward", number(row.get("reward")))]
    facts += [(key.removeprefix("reward/"), number(value)) for key, value in row.items() if key.startswith("reward/")]
    facts += [("advantage", number(row.get("advantage"))), ("tokens", number(row.get("num_tokens")))]
    ended = str(row.get("finish_reason"))
    facts.append(("ended by", "the length limit" if ended == "length" else ended))
    spans = "".join(f"<span>{escaped(name)} <b>{escaped(value)}</b></span>" for name, value in facts)
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
    return escaped(middle_out(str(text if text is not None else "–"), MAX_TEXT)) or "<i>(empty)</i>"


def _end(run: Run, notes: Sequence[str]) -> str:
    """All columns in numbers, the files as they are, and what the reader should know about this page."""
    rows = "".join(_table_row(key, run.finite(key)) for key in sorted(run.columns))
    header = "".join(f"<th>{name}</th>" for name in ("metric", "first", "last", "least", "most", "values"))
    blocks = [("all metrics in numbers", f"<table><tr>{header}</tr>{rows}</table>")] if rows else []
    blocks += [(name, f"<pre>{escaped(text)}</pre>") for name, text in run.texts.items()]
    details = "".join(f"<details><summary>{escaped(name)}</summary>{body}</details>" for name, body in blocks)
    listed = "".join(f"<li>{escaped(note)}</li>" for note in notes)
    footer = f"<footer><ul>{listed}</ul></footer>" if notes else ""
    return f"<section><h2>The run</h2>{details}</section>{footer}"


def _table_row(key: str, values: np.ndarray) -> str:
    numbers = (values[0], values[-1], values.min(), values.max(), len(values)) if len(values) else (None,) * 4 + (0,)
    return f"<tr><td>{escaped(key)}</td>{''.join(f'<td>{number(v)}</td>' for v in numbers)}</tr>"


STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1b1f24;--soft:#626b76;--rule:#e2e5ea;--code:#f3f4f7;
--c0:#2368c4;--c1:#e0671f;--c2:#159a70;--c3:#b3367f;--c4:#6a4fc2;--c5:#c99700;--c6:#0f97b5;--c7:#c73a3a;
--c8:#8a94a0;--c9:#7fb2ee;--c10:#1b3f7a;--c11:#f2a65a;--c12:#6d8c1f;--c13:#7a5230}
@media(prefers-color-scheme:dark){:root{--page:#14171b;--card:#1d2126;--ink:#e7eaee;--soft:#98a2ae;--rule:#31373f;
--code:#171a1f;--c0:#6aa5f5;--c1:#f0935a;--c2:#45c79b;--c3:#e27ab8;--c4:#a48ff0;--c5:#e3bb45;--c6:#4fc3dc;--c7:#f07f7f;
--c8:#7d8894;--c9:#b9d6fa;--c10:#3f6fb8;--c11:#f7c48d;--c12:#a3c24a;--c13:#b98a62}}
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
text.y,text.name{text-anchor:end}text.x{text-anchor:middle}.grid{stroke:var(--rule);fill:none}
.line path{stroke:var(--c);stroke-width:1.8;fill:none;stroke-linejoin:round}.line circle{fill:var(--c)}
.band{fill:var(--c);opacity:.18}.stack{fill:var(--c);opacity:.85}
.strip{fill:transparent}.strip:hover{fill:var(--soft);opacity:.35}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}
.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}.c7{--c:var(--c7)}.c8{--c:var(--c8)}.c9{--c:var(--c9)}
.c10{--c:var(--c10)}.c11{--c:var(--c11)}.c12{--c:var(--c12)}.c13{--c:var(--c13)}
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
