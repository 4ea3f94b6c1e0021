"""report.html: what is drawn and said equals the run folder; nothing in it can act; nothing damaged stops it."""

import base64
import hashlib
import json
import math
import random
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from grpo.errors import InputError
from grpo.trainer.charts import MAX_BINS
from grpo.trainer.report import write_report

LONG = 40  # steps of `make_run`


class Page(HTMLParser):
    """The page as figures (title, unit, marks and tick labels in pixels), texts by tag, and all attributes."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.figures, self.texts, self.attributes, self.tags = {}, [], [], []
        self._open, self._figure = [], None
        self.raw = text
        self.feed(text)
        for figure in self.figures.values():
            labels = figure.pop("labels")
            figure["unit"] = labels[0][1].strip()
            figure["y"] = [(float(a["y"]) - 3.5, float(t)) for a, t in labels if a.get("class") == "y"]
            figure["x"] = [(float(a["x"]), float(t)) for a, t in labels if a.get("class") == "x"]

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs.items()]
        if tag == "figure":
            self._figure = {"title": "", "strips": [], "lines": [], "bands": [], "dots": [], "labels": []}
        if tag not in ("meta", "circle", "rect", "path"):
            self._open.append((tag, attrs))
            self.texts.append([tag, attrs, ""])
        elif tag == "rect":
            self._figure["strips"].append(attrs["data-v"].split("|"))
        elif tag == "circle":
            self._figure["dots"].append((float(attrs["cx"]), float(attrs["cy"])))
        elif tag == "path" and self._open[-1][1].get("class", "").startswith("line"):
            self._figure["lines"].append(runs(attrs["d"]))
        elif tag == "path" and attrs["class"] != "grid":
            self._figure["bands"].append(runs(attrs["d"]))

    def handle_endtag(self, tag):
        if tag in ("meta", "circle", "rect", "path"):
            return
        assert self._open[-1][0] == tag, f"</{tag}> closes <{self._open[-1][0]}>"
        self._open.pop()
        if tag == "figure":
            self.figures[self._figure["title"]] = self._figure
            self._figure = None

    def handle_data(self, data):
        tag, attrs = self._open[-1]
        self.texts[-1][2] += data
        if self._figure is not None and tag == "h3":
            self._figure["title"] += data
        if tag == "text":
            self._figure["labels"].append((attrs, data))

    def text(self, tag, **attributes):
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [t for name, attrs, t in self.texts if name == tag and wanted.items() <= attrs.items()]


def runs(d):
    """[[(x, y), …], …] of the unbroken runs of a path."""
    return [[tuple(map(float, point.split())) for point in run.strip("Z").split("L")] for run in d.split("M")[1:]]


def to_value(pixels, ticks, log=False):
    """The value drawn at `pixels`, read off the tick labels as a person would."""
    (p0, v0), (p1, v1) = ticks[0], ticks[-1]
    if log:
        v0, v1 = math.log10(v0), math.log10(v1)
    value = v0 + (pixels - p0) / (p1 - p0) * (v1 - v0)
    return 10**value if log else value


def row(step, **more):
    t = step / LONG
    return {
        "step": step,
        "loss": 0.01 * math.sin(step),
        "reward": 0.25 + 0.5 * t,
        "reward_std": 0.125,
        "frac_reward_zero_std": 0.5,
        "rewards/exact/mean": t,
        "rewards/exact/std": 0.25,
        "completions/mean_length": 100.0 + step,
        "completions/max_length": 200 + step,
        "completions/clipped_ratio": 0.0625,
        "kl": 0.001 * step,
        "entropy": 1.5 - t,
        "grad_norm": 0.5 + 0.01 * (step % 7),
        "learning_rate": 1e-5,
        "tokens_per_second": 2000.0,
        "step_time": 4.025,
        "phase/rollout/seconds": 2.0,
        "phase/rollout/peak_gib": 3.5,
        "phase/update/seconds": 2.0 + step / 100,
        "phase/update/peak_gib": 7.25,
        **more,
    }


def sample(step, prompt_id, generation, reward, **more):
    return {
        "step": step,
        "prompt_id": prompt_id,
        "generation": generation,
        "prompt": f"prompt {prompt_id}",
        "completion": f"step {step} prompt {prompt_id} completion {generation}",
        "finish_reason": "stop",
        "num_tokens": 7,
        "reward": reward,
        "advantage": 0.5,
        "reward/exact": reward,
        **more,
    }


def write_rows(folder, rows, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail, encoding="utf-8")


def write_samples(folder, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "rollouts" / f"step_{rows[0]['step']:06d}.parquet")


def make_run(folder):
    rows = [row(s) for s in range(1, LONG + 1)]
    for r in rows[9::10]:
        r |= {"eval_accuracy": r["step"] / LONG * 0.9, "eval_completions/mean_length": 50 + r["step"] / 2}
    rows[0]["initial_eval_accuracy"] = 0.125
    write_rows(folder, rows)
    (folder / "config.yaml").write_text(
        "max_steps: 50\nmodel: {name_or_path: Qwen/Qwen3-0.6B}\nobjective: {recipe: dapo}\n"
    )
    (folder / "environment.json").write_text('{"versions": {"torch": "2.13.0"}}')
    for step in (1, 20, 39, 40):
        write_samples(folder, [sample(step, p, g, float(g < p)) for p in range(3) for g in range(4)])
    return rows


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "countdown"
    return make_run(folder), page_of(folder), folder


def test_summary_line_and_tiles(run):
    _, page, _ = run
    assert page.text("h1") == ["countdown"]
    assert page.text("p", class_="summary") == [
        "40 of 50 steps · Qwen/Qwen3-0.6B · dapo · held-out accuracy 12.5 % → 90.0 % · 2 min 41 s in steps"
    ]
    tiles = dict(zip(page.text("dt"), page.text("dd")[::2], strict=True))
    assert tiles == {
        "Held-out accuracy": "12.5 % → 90.0 %",
        "Reward": "0.263 → 0.75",
        "Completion length": "101 → 140 tokens",
        "Throughput": "2000 tok/s",
        "Memory peak": "7.25 GiB",
    }
    assert "in phase update" in page.text("dd")


def test_readings_are_the_numbers_of_the_step(run):
    rows, page, _ = run
    # the evaluation before the first step is step 0, and other curves have no value there
    reward = page.figures["Reward"]["strips"]
    assert reward[0] == ["step 0", "– ± –"]
    assert reward[1:] == [[f"step {r['step']}", f"{r['reward']:.3g} ± 0.125"] for r in rows]
    assert page.figures["Held-out accuracy"]["strips"] == [
        ["step 0", "12.5 %"],
        ["step 10", "22.5 %"],
        ["step 20", "45 %"],
        ["step 30", "67.5 %"],
        ["step 40", "90 %"],
    ]
    assert page.figures["Zero-variance groups"]["strips"][7] == ["step 7", "50 %"]
    assert page.figures["Seconds per phase"]["strips"][7] == ["step 7", "2", "2.07"]
    assert page.figures["Memory peak per phase"]["strips"][7] == ["step 7", "3.5", "7.25"]
    # the legend shows the last step
    assert page.text("span", class_="at")[1] == "step 40"
    assert page.text("b")[1] == "0.75 ± 0.125"


@pytest.mark.parametrize(
    ("title", "key", "scale"),
    [
        ("Reward", "reward", 1),
        ("Reward: exact", "rewards/exact/mean", 1),
        ("Completion length", "completions/mean_length", 1),
        ("Cut off at the limit", "completions/clipped_ratio", 100),
        ("Loss", "loss", 1),
        ("KL to the reference", "kl", 1),
        ("Entropy", "entropy", 1),
        ("Gradient norm", "grad_norm", 1),
        ("Learning rate", "learning_rate", 1),
        ("Throughput", "tokens_per_second", 1),
    ],
)
def test_curve_read_off_the_axes_equals_the_column(run, title, key, scale):
    rows, page, _ = run
    figure = page.figures[title]
    (line,) = figure["lines"][0]
    values = [scale * r[key] for r in rows]
    height = max(map(abs, values))
    assert [to_value(x, figure["x"]) for x, _ in line] == pytest.approx([r["step"] for r in rows], abs=0.05)
    assert [to_value(y, figure["y"]) for _, y in line] == pytest.approx(values, abs=2e-3 * height)


def test_band_is_mean_plus_and_minus_std(run):
    rows, page, _ = run
    figure = page.figures["Reward: exact"]
    (outline,) = figure["bands"][0]
    edges = [to_value(y, figure["y"]) for _, y in outline]
    means = [r["rewards/exact/mean"] for r in rows]
    assert edges[:LONG] == pytest.approx([m + 0.25 for m in means], abs=5e-3)
    assert edges[LONG:] == pytest.approx([m - 0.25 for m in reversed(means)], abs=5e-3)


def test_one_step_has_a_dot_and_a_band(tmp_path):
    write_rows(tmp_path / "run", [row(1, eval_accuracy=0.5)])
    page = page_of(tmp_path / "run")
    figure = page.figures["Reward"]
    ((x, y),) = figure["dots"]
    assert to_value(y, figure["y"]) == pytest.approx(0.2625, abs=2e-3)
    (outline,) = figure["bands"][0]
    assert {px for px, _ in outline} == {round(x - 3, 1), round(x + 3, 1)}
    edges = sorted(to_value(py, figure["y"]) for _, py in outline)
    assert edges == pytest.approx([0.1375] * 2 + [0.3875] * 2, abs=2e-3)
    assert page.text("p", class_="summary") == ["1 step · held-out accuracy 50.0 % · 4.0 s in steps"]


def test_stacked_areas_add_up(run):
    rows, page, _ = run
    figure = page.figures["Seconds per phase"]
    rollout, update = ([to_value(y, figure["y"]) for _, y in area[0]] for area in figure["bands"])
    assert max(rollout) == pytest.approx(2.0, abs=0.02)
    assert update[2 * LONG :] == pytest.approx([2.0] * 2 * LONG, abs=0.02)  # it stands on the other
    assert update[: 2 * LONG : 2] == pytest.approx([4 + r["step"] / 100 for r in rows], abs=0.02)


def nested(step):
    """A step in which forward and backward are inside update, and sync inside rollout and evaluation."""
    t = step / 10
    seconds = {"rollout": 10 + t, "sync": 2.0, "update": 8 + t, "forward": 2.5, "backward": 5.0, "score": 0.5}
    rows = {f"phase/{name}/seconds": value for name, value in seconds.items()}
    rows |= {"phase/rollout/own_seconds": 8 + t, "phase/update/own_seconds": 0.5 + t}
    return {"step": step, **rows}


def areas(figure, axis):
    """[(start, end)] of each bar, by part."""
    found = []
    for part in figure["bands"]:
        sides = [[to_value(px, figure[axis]) for px, _ in bar] for bar in part]
        found.append([(min(side), max(side)) for side in sides])
    return found


def test_nested_phases_are_stacked_once_and_in_the_order_of_a_step(tmp_path):
    rows = [nested(s) for s in range(1, 11)]
    rows[0]["phase/load/seconds"] = 60.0  # once a run: no part of a step
    write_rows(tmp_path, rows)
    page = page_of(tmp_path)
    figure = page.figures["Seconds per phase"]
    assert [label.strip() for label in page.text("i")] == ["rollout", "sync", "score", "update", "forward", "backward"]
    assert figure["strips"][2] == ["step 3", "8.3", "2", "0.5", "0.8", "2.5", "5"]
    tops = [to_value(y, figure["y"]) for _, y in figure["bands"][-1][0]][:20:2]
    assert tops == pytest.approx([18.5 + 2 * r["step"] / 10 for r in rows], abs=0.1)  # rollout, score and update
    bottoms = [to_value(y, figure["y"]) for _, y in figure["bands"][0][0]][20:]
    assert bottoms == pytest.approx([0.0] * 20, abs=0.1)


def memory(**gib):
    return {f"phase/{name}/{kind}_gib": v for name, kinds in gib.items() for kind, v in kinds.items()}


def test_memory_bars_are_the_row_in_which_the_phase_was_highest(tmp_path):
    on_device = {"reserved": 30.0, "others": 4.0, "resident": 6.0, "pinned": 12.0}
    rows = [
        {"step": 1} | memory(update={"peak": 20.0} | on_device, rollout={"peak": 8.0, "reserved": 9.0, "others": 40.0}),
        {"step": 2} | memory(update={"peak": 24.0, "reserved": 25.0, "others": 3.0, "resident": 5.0, "pinned": 10.0}),
        {"step": 3} | memory(update={"peak": 22.0} | on_device, rollout={"peak": None, "reserved": 99.0}),
    ]
    write_rows(tmp_path, rows)
    page = page_of(tmp_path)
    figure = page.figures["Device memory by phase"]
    assert figure["strips"] == [["rollout · step 1", "8", "1", "40"], ["update · step 2", "24", "1", "3"]]
    want = [[(0, 8), (0, 24)], [(8, 9), (24, 25)], [(9, 49), (25, 28)]]
    for part, bars in zip(areas(figure, "x"), want, strict=True):
        assert part == [pytest.approx(bar, abs=0.1) for bar in bars]
    assert page.text("text", class_="name") == ["rollout", "update"] * 2
    assert page.text("span", class_="at")[-2:] == ["rollout · step 1", "update · step 2"]  # the longest of each
    host = page.figures["Host memory by phase"]
    assert host["strips"] == [["rollout · step 1", "–", "–"], ["update · step 2", "5", "10"]]
    assert [bar for (bar,) in areas(host, "x")] == [pytest.approx((0, 5), abs=0.05), pytest.approx((0, 10), abs=0.05)]
    resident, pinned = ({y for _, y in part[0]} for part in host["bands"])
    assert max(resident) == min(pinned)  # one under the other, in the row of its name
    (name,) = [float(a["y"]) for tag, a, text in page.texts if a.get("class") == "name" and text == "update"][1:]
    assert min(resident) < name < max(pinned)


def test_without_a_device_the_peak_is_the_process_s(tmp_path):
    write_rows(tmp_path, [row(1), row(2)])
    page = page_of(tmp_path)
    assert "Device memory by phase" not in page.figures
    assert page.figures["Host memory by phase"]["strips"] == [["rollout · step 1", "3.5"], ["update · step 1", "7.25"]]


def test_evaluations_are_joined_over_the_steps_between(run):
    _, page, _ = run
    figure = page.figures["Held-out accuracy"]
    (line,) = figure["lines"][0]
    assert [to_value(y, figure["y"]) for _, y in line] == pytest.approx([12.5, 22.5, 45, 67.5, 90], abs=0.1)
    assert len(figure["dots"]) == 5
    assert figure["unit"] == "%"
    lengths = page.figures["Completion length"]
    (line,) = lengths["lines"][2]
    assert [to_value(y, lengths["y"]) for _, y in line] == pytest.approx([55, 60, 65, 70], abs=0.5)
    assert lengths["strips"][10][3] == "55" and lengths["strips"][11][3] == "–"


def test_a_null_breaks_the_line_and_is_said(tmp_path):
    rows = [row(s) for s in range(1, LONG + 1)]
    rows[9]["kl"] = None
    write_rows(tmp_path / "run", rows)
    page = page_of(tmp_path / "run")
    assert [len(part) for part in page.figures["KL to the reference"]["lines"][0]] == [9, 30]
    assert "kl is null or not finite at 1 step (first: step 10)" in page.text("li")


def test_a_column_that_is_null_in_every_row_is_absent(tmp_path):
    rows = [row(s, kl=None, entropy=None if s > 1 else 1.5) for s in (1, 2, 3)]
    write_rows(tmp_path / "run", rows)
    page = page_of(tmp_path / "run")
    notes = page.text("li")
    assert "KL to the reference" not in page.figures
    (line,) = [note for note in notes if note.startswith("not drawn")]
    assert "KL to the reference" in line and "Entropy" not in line
    assert [note for note in notes if "null or not finite" in note] == [
        "entropy is null or not finite at 2 steps (first: step 2)"
    ]


def test_a_loss_that_was_never_finite_is_said_though_it_is_null_in_every_row(tmp_path):
    # the writer of the rows turns a NaN into null and counts it in `nonfinite`
    write_rows(tmp_path / "written", [row(s, loss=None, nonfinite=1) for s in (1, 2)])
    write_rows(tmp_path / "literal", [row(s, loss=math.nan) for s in (1, 2)])
    for name in ("written", "literal"):
        page = page_of(tmp_path / name)
        assert "loss is null or not finite at 2 steps (first: step 1)" in page.text("li"), name
    # one NaN later does not make a column out of what was never measured
    rows = [row(1, kl=None), row(2, kl=None, loss=None, nonfinite=1)]
    write_rows(tmp_path / "later", rows)
    said = [note for note in page_of(tmp_path / "later").text("li") if "null or not finite" in note]
    assert said == ["loss is null or not finite at 1 step (first: step 2)"]


def causes(step, right, wrong, truncated, zero, total):
    counts = {"groups/all_right": right, "groups/all_wrong": wrong, "groups/all_truncated": truncated}
    return row(step, **counts, frac_reward_zero_std=zero / total)


CAUSES = "Zero-variance groups by cause"


@pytest.mark.parametrize("config", [None, "prompts_per_step: 8\n", "prompts_per_step: 4\n"])
def test_causes_of_zero_variance_are_stacked_shares_of_all_groups(tmp_path, config):
    # 4 groups would be fewer than were counted; in step 2 a group has another cause: counts ÷ share is too low there
    rows = [causes(1, 1, 2, 1, 4, 8), causes(2, 2, 1, 0, 4, 8), causes(3, 0, 0, 0, 0, 8)]
    write_rows(tmp_path, rows)
    if config:
        (tmp_path / "config.yaml").write_text(config)
    figure = page_of(tmp_path).figures[CAUSES]
    assert figure["unit"] == "% of groups"
    assert figure["strips"] == [
        ["step 1", "12.5 %", "25 %", "12.5 %"],
        ["step 2", "25 %", "12.5 %", "0 %"],
        ["step 3", "0 %", "0 %", "0 %"],
    ]
    assert [v for _, v in figure["y"]] == [0, 20, 40, 60, 80, 100]
    tops = [[to_value(y, figure["y"]) for _, y in area[0]] for area in figure["bands"]]
    assert [max(top) for top in tops] == pytest.approx([25, 37.5, 50], abs=0.1)  # each stands on the one before


def test_the_configured_number_of_groups_counts_where_rows_do_not_tell(tmp_path):
    rows = [causes(1, 1, 0, 0, 2, 8), causes(2, 0, 1, 0, 2, 8)]  # counts ÷ share is 4
    write_rows(tmp_path, rows)
    (tmp_path / "config.yaml").write_text("prompts_per_step: 8\n")
    assert page_of(tmp_path).figures[CAUSES]["strips"][0] == ["step 1", "12.5 %", "0 %", "0 %"]


@pytest.mark.parametrize(
    "config", ["", "prompts_per_step: 3\n", "prompts_per_step: many\n", "prompts_per_step: .inf\n"]
)
def test_causes_are_counts_where_the_number_of_groups_is_not_known(tmp_path, config):
    rows = [causes(1, 1, 2, 0, 4, 8), causes(2, 3, 0, 0, 4, 7)]  # no number of groups fits both
    rows[0]["initial_eval_accuracy"] = 0.5
    write_rows(tmp_path, rows)
    (tmp_path / "config.yaml").write_text(config)
    figure = page_of(tmp_path).figures[CAUSES]
    assert figure["unit"] == "groups"
    # the evaluation before the first step had no groups, which is not the same as 0 of them
    assert figure["strips"] == [["step 0", "–", "–", "–"], ["step 1", "1", "2", "0"], ["step 2", "3", "0", "0"]]


def test_a_spike_makes_the_axis_logarithmic(tmp_path):
    rows = [row(s) for s in range(1, LONG + 1)]
    rows[20]["grad_norm"] = 500.0
    write_rows(tmp_path / "run", rows)
    figure = page_of(tmp_path / "run").figures["Gradient norm"]
    assert figure["unit"] == "L2 norm (log)"
    (line,) = figure["lines"][0]
    read = [to_value(y, figure["y"], log=True) for _, y in line]
    assert read == pytest.approx([r["grad_norm"] for r in rows], rel=0.01)


def test_long_runs_are_binned_and_keep_their_spikes(tmp_path):
    rng = random.Random(0)
    rows = [{"step": s, "loss": rng.random(), "entropy": 0.5} for s in range(1, 5001)]
    rows[2512]["loss"] = 9.0
    rows[77]["loss"] = None
    write_rows(tmp_path / "run", rows)
    page = page_of(tmp_path / "run")
    figure = page.figures["Loss"]
    assert len(figure["strips"]) == MAX_BINS == 200
    size = 5000 // MAX_BINS
    (line,), (band,) = figure["lines"][0], figure["bands"][0]
    for b in range(MAX_BINS):
        values = [r["loss"] for r in rows[b * size : (b + 1) * size] if r["loss"] is not None]
        mean = sum(values) / len(values)
        assert to_value(line[b][1], figure["y"]) == pytest.approx(mean, abs=0.02)
        assert figure["strips"][b] == [f"steps {b * size + 1:,}–{(b + 1) * size:,}", f"{mean:.3g}"]
    assert max(to_value(y, figure["y"]) for _, y in band) == pytest.approx(9.0, abs=0.05)
    assert any(note.startswith("a point is the mean of about 25 steps") for note in page.text("li"))


def test_seconds_of_a_rare_phase_are_spread_over_its_bin(tmp_path):
    rows = [{"step": s, "phase/update/seconds": 1.0} for s in range(1, 401)]
    rows[99]["phase/evaluation/seconds"] = 10.0
    write_rows(tmp_path / "run", rows)
    figure = page_of(tmp_path / "run").figures["Seconds per phase"]
    assert figure["strips"][49] == ["steps 99–100", "1", "5"]


def test_samples_are_best_and_worst_of_first_middle_and_last_step(run):
    _, page, _ = run
    texts = page.text("pre")
    for step in (1, 20, 40):
        # prompt 2: rewards 1 1 0 0; prompt 0: all 0; the file of step 39 is neither first, middle nor last
        assert f"step {step} prompt 2 completion 0" in texts  # best
        assert f"step {step} prompt 2 completion 2" in texts  # worst
        assert f"step {step} prompt 0 completion 0" in texts
    assert not any("step 39" in text or "prompt 1 " in text for text in texts)
    assert page.text("strong") == ["best", "worst", "all equal"] * 3
    assert any(h == "step 20 · prompt 2 · 4 completions · rewards 1 1 0 0" for h in page.text("h3"))


def test_text_of_the_model_is_shown_and_never_acts(tmp_path):
    nasty = "</pre><script>alert(1)</script><img src=x onerror=alert(1)> & \x1b[31m &amp; \x00\u202e 'q' \"q\""
    folder = tmp_path / "<b>run"
    write_rows(folder, [row(1, **{"rewards/<i>x|y/mean": 0.5, "phase/<u>/seconds": 1.0})])
    write_samples(
        folder,
        [sample(1, 0, g, float(g), prompt=nasty, completion=nasty, finish_reason=nasty, **{"reward/<i>x": 0.5})
         for g in range(2)],
    )  # fmt: skip
    (folder / "config.yaml").write_text(f"model: {{name_or_path: {json.dumps(nasty)}}}\n")
    (folder / "environment.json").write_text(json.dumps({"commit": nasty}))
    page = page_of(folder)
    shown = nasty.replace("\x1b", "␛").replace("\x00", "␀").replace("\u202e", "\ufffd")
    assert page.text("pre").count(shown) == 3  # the prompt, best and worst
    assert shown in page.text("p", class_="summary")[0]
    assert page.text("h1") == ["<b>run"] and "Reward: <i>x|y" in page.figures
    assert page.tags.count("script") == 1 and not {"img", "u", "a", "link", "iframe"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page.raw)


def test_page_is_self_contained_and_says_so_to_the_browser(run):
    _, page, _ = run
    assert not re.search(r"https?://|\bsrc\s*=|\bhref\s*=|url\(|@import", page.raw)
    (policy,) = [value for _, name, value in page.attributes if name == "content" and "default-src" in value]
    digest = base64.b64encode(hashlib.sha256(page.text("script")[0].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_files_stand_at_the_end(run):
    _, page, folder = run
    assert page.text("summary") == ["all metrics in numbers", "config.yaml", "environment.json"]
    assert (folder / "config.yaml").read_text() in page.text("pre")
    cells = page.text("td")
    start = cells.index("completions/mean_length")
    assert cells[start : start + 6] == ["completions/mean_length", "101", "140", "101", "140", "40"]
    assert sorted(p.name for p in folder.iterdir() if "report" in p.name) == ["report.html"]


def test_damaged_rows_are_left_out_and_said(tmp_path):
    folder = tmp_path / "run"
    good = [row(s) for s in (1, 2, 4)]
    write_rows(folder, good)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"[1, 2]\n\xff\xfe\n" + b'{"loss": 1.0}\n{"step": "x"}\n' + b"[" * 100_000 + b"\n")
        file.write(json.dumps(row(3)).encode() + b"\n" + json.dumps(row(4, reward=0.875)).encode() + b"\n")
        file.write(b'{"step": 5, "rew')
    page = page_of(folder)
    notes = page.text("li")
    assert "the last line of metrics.jsonl (line 11) is torn, as after a crash; it is ignored" in notes
    assert "metrics.jsonl: 5 unreadable lines ignored (first: line 4)" in notes
    assert "metrics.jsonl: 1 row written again later; the later row counts" in notes
    assert [s[0] for s in page.figures["Reward"]["strips"]] == ["step 1", "step 2", "step 3", "step 4"]
    assert page.figures["Reward"]["strips"][3][1] == "0.875 ± 0.125"


def test_a_whole_last_line_without_newline_is_used(tmp_path):
    write_rows(tmp_path / "run", [row(1)], tail=json.dumps(row(2)))
    page = page_of(tmp_path / "run")
    assert len(page.figures["Reward"]["strips"]) == 2
    assert not any("torn" in note for note in page.text("li"))


def test_supervised_run_names_what_is_not_drawn(tmp_path):
    write_rows(tmp_path / "run", [{"step": s, "loss": 2.0 / s, "grad_norm": 1.0} for s in (1, 2)])
    page = page_of(tmp_path / "run")
    assert list(page.figures) == ["Loss", "Gradient norm"]
    (line,) = [note for note in page.text("li") if note.startswith("not drawn")]
    assert line.startswith("not drawn, because the run has no such numbers: Held-out accuracy, Reward, ")
    assert line.endswith("Seconds per phase, Memory peak per phase, Throughput") and "Loss" not in line
    assert "Loss" in page.text("dt") and "Reward" not in page.text("dt")


@pytest.mark.parametrize("content", [None, "", "\n\n", '{"step": 1'])
def test_empty_run_still_gives_a_page(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    page = page_of(tmp_path)
    assert page.figures == {}
    assert page.text("p", class_="summary") == ["0 steps"]
    notes = page.text("li")
    assert {"config.yaml is missing", "environment.json is missing"} <= set(notes)
    assert ("metrics.jsonl is missing" in notes) == (content is None)
    assert any(note.startswith("rollouts/ holds no") for note in notes)


def test_unreadable_side_files_are_said(tmp_path):
    write_rows(tmp_path, [row(1)])
    (tmp_path / "config.yaml").write_text("a: [1,\n")
    (tmp_path / "environment.json").write_text("{")
    (tmp_path / "summary.json").write_text('{"accuracy_before": 0.25, "accuracy_after": 0.75}')
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_000001.parquet").write_bytes(b"PAR1 torn")
    page = page_of(tmp_path)
    notes = page.text("li")
    assert "config.yaml cannot be parsed; its text is shown as it is" in notes and "a: [1,\n" in page.text("pre")
    assert "environment.json cannot be parsed; its text is shown as it is" in notes
    assert "rollouts/step_000001.parquet cannot be read" in notes
    # without an evaluation in the metrics, the summary's counts
    assert "held-out accuracy 25.0 % → 75.0 %" in page.text("p", class_="summary")[0]


def test_samples_with_odd_columns(tmp_path):
    chat = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}])
    rows = [
        {"step": 3, "prompt_id": 0, "prompt": chat, "completion": "a" * 9000 + "THE END", "reward": None},
        {"step": 3, "prompt_id": 1, "prompt": "[{broken", "completion": "", "reward": None},
    ]
    write_samples(tmp_path, rows)
    page = page_of(tmp_path)
    texts = page.text("pre")
    assert "system: Be brief.\n\nuser: 2 + 2?" in texts and "[{broken" in texts
    (long,) = [text for text in texts if text.startswith("aaa")]
    assert long.endswith("THE END") and "[… 5,007 characters left out …]" in long and len(long) < 4100
    assert "(empty)" in page.text("i")


def test_no_such_folder(tmp_path):
    with pytest.raises(InputError, match="no such run folder"):
        write_report(tmp_path / "nothing")


def test_any_values_are_drawn_without_an_error(tmp_path):
    rng = random.Random(1)
    odd = [None, math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, -5e-324, 0, -0.0, 1e-310, 10**400, True, "x",
           [1], {}, 3, 0.1, 1e99, -2.5]  # fmt: skip
    keys = [
        *row(1),
        "eval_accuracy",
        "eval_loss",
        "phase//seconds",
        "rewards//mean",
        "sampling/sampling_logp_difference/mean",
    ]
    for case in range(60):
        folder = tmp_path / str(case)
        pool = rng.sample(odd, rng.randint(1, 4))
        count = rng.choice([1, 2, 3, 30, 450])
        rows = [{k: rng.choice(pool) for k in keys if rng.random() < 0.9} | {"step": s} for s in range(count)]
        if case % 10 == 0:
            rows = [r | {"step": rng.choice([-5, 0.5, 1e308, 7, -1e300])} for r in rows]
        write_rows(folder, rows)
        text = write_report(folder).read_text(encoding="utf-8")
        drawn = " ".join(re.findall(r' (?:d|cx|cy|x|y|width)="([^"]*)"', text))
        assert not re.search("nan|inf|None", drawn), case
        assert max((abs(float(n)) for n in re.findall(r"-?\d+\.?\d*", drawn)), default=0) < 500, case


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_seconds(tmp_path):
    values = np.random.default_rng(0).normal(size=100_000).tolist()
    write_rows(tmp_path, [row(s + 1, loss=v) for s, v in enumerate(values)])
    start = time.perf_counter()
    write_report(tmp_path)
    assert time.perf_counter() - start < 15
