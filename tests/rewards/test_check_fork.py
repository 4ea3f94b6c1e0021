"""Rewards that never return, or end their process, cost `check` seconds: nothing hangs and nothing is left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewards import check, exact_match, math_accuracy, numeric
from rewards.check_calls import MAX_HANGS
from rewards.check_fork import Death, Fork, Hang

ROWS = [{"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in (40, 52, 63)]


def num_fds():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def alive(pid):
    """Whether the process runs (one that ended and is not reaped yet does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def until_dead(pid, seconds=2.0):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


def loops(completion, answer):
    while not completion.strip():
        pass
    return float(completion == answer)


def backtracks(completion, answer):  # one call into C that holds the interpreter
    re.match(r"(so |s|o| )*$", completion[:60]) if "so so" in completion else None
    re.match(r"(9+)+!", completion[:40]) if completion.startswith("99999") else None
    return float(completion == answer)


def ignores_everything(completion, answer):
    while not completion:
        try:
            time.sleep(60)
        except BaseException:
            continue
    return float(completion == answer)


def batch_that_loops(completions, answer):
    if "" in completions:
        time.sleep(60)
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


@pytest.mark.parametrize(
    "function", [loops, backtracks, ignores_everything, batch_that_loops], ids=lambda f: f.__name__
)
def test_a_call_that_never_returns_is_an_error_and_ends(function):
    start = time.monotonic()
    report = check(function, ROWS, timeout_s=0.4)
    assert time.monotonic() - start < MAX_HANGS * 0.4 + 6
    found = [each.text for each in report.errors if each.kind == "fault"]
    assert any("gave no answer within 0.4 s (killed)" in text for text in found)
    assert any("is not called any more after 3 calls" in text for text in found)
    assert not any(each.kind == "changing" for each in report.findings)


def test_a_single_hang_spares_the_rest():
    def once(completion, answer):
        if completion == " \n\t\n" and answer == "41":  # white space, row 1
            time.sleep(60)
        return float(completion.strip() == answer)

    report = check(once, ROWS, timeout_s=0.3)
    (found,) = [each for each in report.errors if each.kind == "fault" and "no answer" in each.text]
    assert found.rows == (1,) and "white space" in found.text


def test_one_that_ends_its_process():
    def leaves(completion, answer):
        if not completion:
            os._exit(0)
        return float(completion == answer)

    texts = [each.text for each in check(leaves, ROWS).errors]
    assert any("ended its process with exit code 0" in text and "'empty'" in text for text in texts)

    def crashes(completion):
        os.kill(os.getpid(), signal.SIGUSR1)

    assert any("died of SIGUSR1" in each.text for each in check(crashes, ROWS).errors)


@pytest.mark.parametrize("function", [exact_match, numeric, math_accuracy], ids=lambda f: f.__name__)
def test_the_report_is_that_of_calls_in_this_process(function):
    inside, copied = check(function, ROWS, timeout_s=None), check(function, ROWS)
    assert list(map(str, inside.findings)) == list(map(str, copied.findings))
    for name in inside.summary:
        for key in ("tries", "gold", "top", "bottom", "none_frac"):
            assert inside.summary[name][key] == copied.summary[name][key]
    assert copied.summary[function.__name__]["p50_s"] > 0


def test_where_calls_are_made():
    pids = []

    def here(completion):
        pids.append(os.getpid())
        return float(len(completion))

    check(here, ROWS)
    assert pids == []  # appended in a copy
    check(here, ROWS, timeout_s=None)
    assert set(pids) == {os.getpid()}
    pids.clear()
    check([here, loops], ROWS, timeout_s=0.3, in_process=["here"])
    assert set(pids) == {os.getpid()}


def test_maximum_by_name_and_names():
    def half(completion, answer):
        return 0.5 * (completion == answer)

    assert not [each for each in check(half, ROWS).errors if "gets at most" in each.text]
    report = check([half, exact_match], ROWS, names=["mine", "exact"], maximum={"mine": 1.0})
    found = [each for each in report.errors if "gets at most 0.5 of 1" in each.text]
    assert [each.function for each in found] == ["mine"] and set(report.summary) == {"mine", "exact"}


# --- Fork itself -------------------------------------------------------------------------------------------------


def test_values_go_through_and_state_stays():
    seen = []

    def call(request):
        seen.append(request)
        return [len(seen), request]

    fork = Fork(call, 5.0)
    assert fork("a") == [1, "a"] and fork("\ud800" + "x" * 3_000_000) == [2, "\ud800" + "x" * 3_000_000]
    fork.close()
    assert seen == [] and fork("b") == [1, "b"]  # a new copy, of the original
    fork.close()


def test_a_kill_takes_the_group_and_the_next_call_answers(tmp_path):
    def call(request):
        if request == "hang":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            (tmp_path / "pids").write_text(f"{os.getpid()} {child.pid}")
            time.sleep(60)
        return request

    fds = num_fds()
    fork = Fork(call, 1.0)
    start = time.monotonic()
    with pytest.raises(Hang):
        fork("hang")
    assert 0.9 < time.monotonic() - start < 3.0
    assert all(until_dead(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    assert fork("next") == "next"
    fork.close()
    assert num_fds() == fds


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (lambda request: os._exit(3), "exit code 3"),
        (lambda request: os.kill(os.getpid(), 9), "died of SIGKILL"),
        (lambda request: {1, 2}, "exit code 1"),  # no JSON value: an error of the caller's
        (lambda request: os.closerange(3, 100) or time.sleep(60), "closed its pipe"),
    ],
    ids=["exit", "kill", "value", "pipe"],
)
def test_a_copy_that_ends(action, text):
    fork = Fork(action, 5.0)
    for _ in range(2):
        with pytest.raises(Death, match=text):
            fork(1)
    fork.close()


def test_a_copy_dies_with_its_original():
    code = (
        "import os, threading, time\nfrom rewards.check_fork import Fork\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), 9)).start()\n"  # in the middle of a call
        "Fork(lambda r: (print(os.getpid(), flush=True), time.sleep(60)), 60.0)(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -9 and until_dead(int(done.stdout))
