"""The progress view and the console helpers: what they say, how often, and that no text or value can break them."""

import io
import math
import re
import time

import pytest
from rich.console import Console as RichConsole

from grpo.trainer import console
from grpo.trainer.console import Console, ProgressView
from grpo.trainer.text import duration, number, percent, sparkline, visible

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
NAN, INF = math.nan, math.inf


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def train(view, clock, steps, seconds=1.0, **more):
    for step in steps:
        view.phase("rollout")
        clock.now += seconds
        view.update({"step": step, "reward": step / 100, **more})


def plain(total=100, **options):
    clock, stream = Clock(), io.StringIO()
    return ProgressView("run", total, stream=stream, clock=clock, **options), clock, stream


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (-0.0, "0"), (1, "1"),
        (0.8125, "0.812"), (1024, "1024"), (9999, "9999"), (9999.7, "10k"), (12345, "12.3k"),
        (999_600, "1M"), (2_500_000, "2.5M"), (999.9e6, "1G"), (3e12, "3T"), (1e-5, "1e-5"), (-1.25e-7, "-1.25e-7"),
        (None, "–"), (NAN, "–"), (INF, "+inf"), (-INF, "-inf"), ("0.5", "–"), (True, "–"), ([1], "–"), (10**400, "–"),
    ],
)  # fmt: skip
def test_number(value, shown):
    assert number(value) == shown


def test_percent_and_duration():
    assert [percent(x) for x in (0.4119, 1, None, NAN)] == ["41.2 %", "100.0 %", "–", "–"]
    seconds = [0, 0.25, 41, 59.7, 161, 3599.9, 11_100, 86_400 * 2 + 3600 * 4, None, INF]
    assert [duration(s) for s in seconds] == [
        "0 s", "0.2 s", "41 s", "1 min 0 s", "2 min 41 s", "1 h 0 min", "3 h 5 min", "2 d 4 h", "–", "–"
    ]  # fmt: skip


def test_sparkline_is_the_means_of_equal_parts():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 7, 0, 0, 3.5, 3.5], cells=3) == "█▁▅"
    assert sparkline([1, NAN, 3]) == "▁ █"
    assert sparkline([5, 5]) == "▁▁" and sparkline([]) == "" and sparkline([NAN]) == " "


def test_history_stays_small_and_keeps_the_whole_run():
    history = console._History()
    for i in range(10_000):
        history.add(float(i))
        history.add(NAN)
    values = history.values()
    assert 128 <= len(values) < 256
    width = 10_000 // len(values)
    stride = history._stride
    assert stride <= width + 1
    assert values == [stride * i + (stride - 1) / 2 for i in range(len(values))]  # means of equal pieces


def test_plain_lines_come_at_first_last_and_every_few_seconds():
    view, clock, stream = plain()
    with view:
        train(view, clock, range(1, 101), kl=0.002, entropy=0.5, eval_accuracy=0.25)
        assert "step 100/100" in stream.getvalue()  # at once, not only when the view closes
    lines = stream.getvalue().splitlines()
    assert [int(re.search(r"step (\d+)/100", line)[1]) for line in lines] == [1, *range(6, 100, 5), 100]
    assert lines[1] == "run: step 6/100  6.0 s  1 min 34 s left  reward 0.06  accuracy 25.0 %  kl 0.002  entropy 0.5"
    assert lines[-1] == "run: step 100/100  1 min 40 s  reward 1  accuracy 25.0 %  kl 0.002  entropy 0.5"
    assert not CONTROL.search(stream.getvalue())


def test_plain_line_for_the_step_where_a_run_was_stopped():
    view, clock, stream = plain()
    with pytest.raises(KeyboardInterrupt), view:
        train(view, clock, range(1, 4))
        raise KeyboardInterrupt
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("run: step 1/100") and len(lines) == 2
    assert lines[1].startswith("run: step 3/100") and lines[1].endswith("stopped (KeyboardInterrupt)")


def test_a_run_that_stops_before_its_first_step_says_nothing():
    view, _, stream = plain()
    with view:
        view.phase("evaluation")
    assert stream.getvalue() == ""


def test_last_evaluation_stays_in_view_with_its_step():
    view, clock, stream = plain()
    with view:
        train(view, clock, [1], eval_accuracy=0.5)
        train(view, clock, [2, 3], seconds=10)
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("accuracy 50.0 %") and lines[1].endswith("accuracy 50.0 % (step 1)")


def test_time_left_follows_the_recent_pace_and_survives_a_resume():
    view, clock, stream = plain(total=1000)
    with view:
        train(view, clock, [501], seconds=100)  # the first step of a resumed run is slow
        train(view, clock, range(502, 552), seconds=60)
        train(view, clock, range(552, 602), seconds=6)
    lines = stream.getvalue().splitlines()
    assert "  13 h 51 min left" in lines[0]  # 499 × 100 s
    assert "  39 min 54 s left" in lines[-1] and "step 601/1000" in lines[-1]  # 399 × 6 s


def test_peak_is_that_of_the_highest_phase_and_units_are_shown():
    view, _, stream = plain()
    row = {
        "step": 1,
        "completions/mean_length": 34.25,
        "grad_norm": 0.5,
        "tokens_per_second": 25_300.0,
        "phase/rollout/peak_gib": 2.5,
        "phase/backward/peak_gib": 3.25,  # the ledger names a phase before the one it is inside
        "phase/update/peak_gib": 3.25,
        "phase/score/peak_gib": None,
        "reward": None,
    }
    with view:
        view.update(row)
    assert "reward –  length 34.2 tok  grad 0.5  25.3k tok/s  peak 3.25 GiB (backward)" in stream.getvalue()


def test_supervised_rows_show_their_loss():
    view, clock, stream = plain(total=2)
    with view:
        for step in (1, 2):
            clock.now += 1
            view.update({"step": step, "loss": 2.5, "eval_loss": 2.25, "learning_rate": 1e-3})
    assert stream.getvalue().splitlines()[-1] == "run: step 2/2  2.0 s  loss 2.5  eval loss 2.25  lr 0.001"


def test_own_columns():
    view, _, stream = plain(columns=("rewards/exact/mean", "frac_reward_zero_std"))
    with view:
        view.update({"rewards/exact/mean": 0.5, "frac_reward_zero_std": 0.25, "reward": 3})
    assert stream.getvalue().splitlines()[0].endswith("rewards/exact/mean 0.5  zero variance 25.0 %")


class Tensorlike:
    def __float__(self):
        raise RuntimeError("a tensor with 2 elements cannot be converted")


@pytest.mark.parametrize("value", [None, NAN, INF, -INF, "x", b"x", True, [], {}, object(), 10**400, Tensorlike()])
@pytest.mark.parametrize("live", [False, True])
def test_no_value_raises(value, live):
    stream = io.StringIO()
    with ProgressView("run", 3, stream=stream, live=live, every_s=0) as view:
        view.update({"step": 1, "reward": 0.5})
        view.update({key: value for key in (*console.COLUMNS, "step", "phase/x/peak_gib")})
        view.update({})
    assert stream.getvalue()
    for total in (0, -1):
        with ProgressView("run", total, stream=stream, live=live) as view:
            view.update({"step": value})


def test_environment_that_forces_colour_does_not_reach_a_file(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.setenv(name, "1")
    view, clock, stream = plain(total=3)
    with view:
        train(view, clock, range(1, 4))
        view.note("note")
    helper = Console(stream)
    helper.say("line", "bold red")
    helper.table("title", [("a", 1.5)])
    helper.samples([("p", "c", {"r": 1.0})])
    assert not CONTROL.search(stream.getvalue())


def test_live_view_draws_bar_phase_metrics_and_notes_above():
    clock, stream = Clock(), io.StringIO()
    with ProgressView("run", 4, stream=stream, live=True, clock=clock) as view:
        train(view, clock, [1, 2], eval_accuracy=0.5)
        view.phase("update")
        clock.now += 3
        view.note("saved [red]step 2[/red] \x1b[31m")
        view._live.refresh()
        middle = stream.getvalue()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", middle)
    assert "\x1b[" in middle and "━" in text
    assert "2/4" in text and "2.0 s left" not in text and "update 3 s" in text
    assert "reward 0.02 ▁█ · accuracy 50.0 %" in text
    assert text.index("saved [red]step 2[/red] ␛[31m") < text.rindex("run ")
    final = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "update" not in final[len(text) :]  # nothing runs any more


@pytest.mark.parametrize("width", [40, 60, 110])
def test_live_view_breaks_lines_between_metrics_only(width):
    row = {"step": 7, "reward": 0.5, "eval_accuracy": 0.5, "kl": 0.001, "entropy": 0.7, "grad_norm": 0.3}
    row |= {"completions/mean_length": 310, "tokens_per_second": 2500, "phase/update/peak_gib": 3.25}
    view = ProgressView("a long title that has to give way", 10, stream=io.StringIO(), live=False)
    view.update(row)
    out = io.StringIO()
    RichConsole(file=out, width=width, force_terminal=False).print(view)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    items = [item for line in lines[1:] for item in line.split(" · ")]
    assert items == ["reward 0.5 ▁", "accuracy 50.0 %", "length 310 tok", "kl 0.001", "entropy 0.7", "grad 0.3",
                     "2500 tok/s", "peak 3.25 GiB (update)"]  # fmt: skip


@pytest.mark.parametrize("live", [False, True])
def test_an_update_costs_far_less_than_a_millisecond(live):
    rows = [{"step": s, "reward": 0.5, "kl": None, **{f"metric/{i}": 1.0 for i in range(30)}} for s in range(5000)]
    with ProgressView("run", 5000, stream=io.StringIO(), live=live) as view:
        start = time.perf_counter()
        for row in rows:
            view.phase("rollout")
            view.update(row)
        seconds = time.perf_counter() - start
    assert seconds / len(rows) < 1e-3


def test_visible_keeps_text_and_shows_controls():
    assert visible("a\tb\nc é 漢 [red]") == "a\tb\nc é 漢 [red]"
    assert visible("\x1b[31m\r\x00\x7f\x9b\u202e\u2028") == "␛[31m␍␀␡���"


def test_say_prints_markup_and_long_lines_as_they_are():
    stream = io.StringIO()
    line = "[red]x[/red] :smile: " + "word " * 40
    Console(stream).say(line)
    assert stream.getvalue() == line + "\n"


def test_table_aligns_numbers_right():
    stream = io.StringIO()
    Console(stream).table("Seconds [b]", [("rollout", 11.25, 1234), ("[u]x", None, 5)], ("phase", "seconds", "n"))
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == [
        "Seconds [b]",
        "phase    seconds      n",
        "rollout     11.2  1,234",
        "[u]x           –      5",
    ]


def test_samples_print_text_literally_and_keep_the_end():
    stream = io.StringIO()
    long = "x" * 5000 + " the answer is 42"
    Console(stream).samples([("2+2?", "[red]4[/red]\x1b[0m", {"exact": 1.0, "[b]": None}), ("p", long, {})])
    out = stream.getvalue()
    assert "sample 1  reward: exact 1, [b] –" in out and "sample 2  reward: none" in out
    assert "    2+2?" in out and "    [red]4[/red]␛[0m" in out
    assert "the answer is 42" in out and "4,417 characters left out" in out
    assert not CONTROL.search(out)


def test_a_stream_without_unicode_does_not_end_the_run():
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii")
    for live in (False, True):
        with ProgressView("run ≥", 2, stream=stream, live=live) as view:
            view.update({"step": 1, "reward": None})
            view.update({"step": 2, "reward": 0.5})
    Console(stream).samples([("漢", "é", {"r": None})])
    stream.flush()
    assert b"run ?: step 1/2" in buffer.getvalue()


def test_a_long_phase_says_how_far_it_is_every_half_minute():
    view, clock, stream = plain()
    with view:
        view.phase("rollout")
        for done in range(1, 11):
            clock.now += 12.0
            view.progress(done, 10)
    lines = [line for line in stream.getvalue().splitlines() if "rollout" in line]
    assert lines == ["run: rollout 3/10, 36 s", "run: rollout 6/10, 1 min 12 s", "run: rollout 9/10, 1 min 48 s"]


def test_a_live_view_counts_within_the_phase():
    clock = Clock()
    view = ProgressView("run", 3, stream=io.StringIO(), live=True, clock=clock)
    view.phase("rollout")
    clock.now += 5
    view.progress(7, 128)
    recorder = RichConsole(file=io.StringIO(), width=120)
    recorder.print(view)
    assert "rollout 7/128 5 s" in recorder.file.getvalue()
    view.phase("score")
    view.progress(1, 2)
    recorder.print(view)
    assert "score 1/2" in recorder.file.getvalue() and "rollout 7/128 score" not in recorder.file.getvalue()
