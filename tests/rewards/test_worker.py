"""Workers: right answers, every way of misbehaving ends in its own error, and nothing is left behind."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rewards.worker import LOG_BYTES, Pool, WorkerDied, WorkerError, WorkerFault, WorkerTimeout
from rewards.worker_frames import MAX_REPLY, check_reply, decode, encode

HERE = "tests.rewards.hostile:"
LIMIT = 0.4


def pool_of(name, timeout=LIMIT, **options):
    return Pool(HERE + name, timeout=timeout, **options)


def num_fds():
    return len(list(Path("/proc/self/fd").iterdir()))


def group_of(pid):
    """Living processes of the group `pid`, zombies apart."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[2]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def survivors(*pids):
    """Who is left of these groups; the kernel needs a moment for those whose parent has been killed."""
    deadline = time.monotonic() + 3
    while (left := [each for pid in pids for each in group_of(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("workers")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    fds = num_fds()
    yield
    assert num_fds() == fds
    assert list(folder.iterdir()) == []


# --- right answers -------------------------------------------------------------------------------------------


def test_calls_keywords_and_types_go_round():
    with pool_of("add", timeout=5) as pool:
        assert pool.call([1, 2]) == 3
        assert pool.call([], {"a": "x", "b": "y\ud800\x00"}) == "xy\ud800\x00"
        assert pool.call([[1, None], [True, {"k": 2.5}]]) == [1, None, True, {"k": 2.5}]
        assert pool.call([10**400, 1]) == 10**400 + 1
        big = "ab" * 2_000_000  # more than a pipe holds, both ways
        assert pool.call([big, "c"]) == big + "c"


def test_one_worker_serves_many_calls_in_order():
    with pool_of("count", timeout=5) as pool:
        assert [pool.call([]) for _ in range(4)] == [1, 2, 3, 4]
        assert pool.map([[n] for n in range(5)]) == [5, 6, 7, 8, 9]
        assert pool.map([]) == []


def test_map_keeps_the_order_and_runs_at_once():
    with pool_of("sleep", timeout=5, size=3, spare=False) as pool:
        pool.wait_ready()
        while not all(worker.ready for worker in pool._crew.workers):
            pool._step({})
        start = time.monotonic()
        assert pool.map([[0.4, 1], [0.3, 2], [0.2, 3]]) == [1, 2, 3]
        assert time.monotonic() - start < 0.8  # 0.9 one after another


def test_factory_and_warmup():
    with Pool(HERE + "Adder", timeout=5, init=[10], warmup=[0]) as pool:
        assert pool.call([5]) == [15, 2]


def test_worker_is_fenced(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("EXTRA", "yes")
    with pool_of("facts", timeout=5, memory_mb=2000, environment=["EXTRA"]) as pool:
        facts = pool.call([])
        assert facts["environment"]["CUDA_VISIBLE_DEVICES"] == ""
        assert "SECRET_TOKEN" not in facts["environment"] and facts["environment"]["EXTRA"] == "yes"
        assert facts["memory"] == 2000 * 2**20 and facts["core"] == 0
        assert facts["group"] == facts["session"] and facts["group"] in pool.pids
        assert not {"torch", "numpy", "multiprocessing"} & set(facts["modules"])
        assert len(facts["fds"]) == 6  # three standard streams, two pipes, the listing itself
        assert Path(facts["folder"]).is_dir()
    assert not Path(facts["folder"]).exists()


# --- faults of a call ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("raises", ["two\nlines"], "^ValueError: two lines$"),
        ("raises", ["x" * 10_000], "^ValueError: x{480}"),
        ("leaves", [0], "^SystemExit: 0$"),
        ("generator_exit", [], "^GeneratorExit$"),
        ("interrupts", [], "^KeyboardInterrupt$"),
        ("add", [], "missing 1 required positional argument"),
        ("memory_bomb", [], "MemoryError"),
        ("returns", ["nan"], "cannot hold: ValueError"),
        ("returns", ["inf"], "cannot hold: ValueError"),
        ("returns", ["bytes"], "cannot hold: TypeError"),
        ("returns", ["set"], "cannot hold: TypeError"),
        ("returns", ["object"], "cannot hold: TypeError"),
        ("returns", ["complex"], "cannot hold: TypeError"),
        ("returns", ["deep"], "cannot hold: RecursionError"),
        ("huge", [], f"bytes .want at most {MAX_REPLY}"),
    ],
)
def test_errors_of_the_function_leave_the_worker_alive(name, args, words):
    with pool_of(name, timeout=10, spare=False, memory_mb=1000) as pool:
        [before] = pool.pids
        for _ in range(2):
            with pytest.raises(WorkerError, match=words):
                pool.call(args)
        assert pool.pids == [before]


@pytest.mark.parametrize("name", ["sleep", "ignores_sigterm", "holds_gil", "power_tower", "starts_children"])
def test_hang_is_killed_with_its_group_and_the_next_answer_comes_from_the_spare(name):
    with pool_of(name) as pool:
        pool.wait_ready()
        before = pool.pids
        start = time.monotonic()
        with pytest.raises(WorkerTimeout, match=rf"{name}: no answer within 0\.4 s"):
            pool.call([])
        assert LIMIT <= time.monotonic() - start < LIMIT + 0.5
        [killed] = set(before) - set(pool.pids)
        assert survivors(killed) == []


def test_answers_after_a_hang_are_right():
    with pool_of("sleep") as pool:
        pool.wait_ready()
        results = pool.map([[0, 1], [60, 2], [0, 3], [60, 4], [0, 5]])
        assert [r for r in results if not isinstance(r, WorkerFault)] == [1, 3, 5]
        assert [type(r) for r in results[1::2]] == [WorkerTimeout] * 2


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("exits", [3], "ended with exit code 3"),
        ("exits", [0], "ended with exit code 0"),
        ("segfault", [], "ended with signal 11"),
        ("closes_pipe", [], "ended with signal 9"),
        ("dies_with_child_holding_pipe", [], "ended with exit code 7"),
    ],
)
def test_death_is_retried_once_and_then_told(name, args, words):
    with pool_of(name, timeout=5) as pool:
        while not all(worker.ready for worker in pool._crew.workers):  # else a new one may come before the spare
            assert pool._step({}) is None
        before = pool.pids
        with pytest.raises(WorkerDied, match=f"{name}: the worker {words}"):
            pool.call(args)
        assert not set(before) & set(pool.pids)  # both were used up
        assert survivors(*before) == []


def test_second_worker_answers_when_the_first_has_died(tmp_path):
    with pool_of("dies_once", timeout=5) as pool:
        assert pool.call([str(tmp_path / "mark")]) == "second"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("garbage", "sent Expecting value"),
        ("garbage_header", "sent a reply of 4294967295 bytes"),
        ("forged", "sent an answer to no question"),
        ("forged_then_answers", "sent (more than one reply|an answer to no question)"),
        ("nan_token", "sent the number NaN"),
    ],
)
def test_what_is_no_answer_is_refused_and_its_sender_killed(name, words):
    with pool_of(name, timeout=5) as pool:
        pool.wait_ready()
        before = pool.pids
        with pytest.raises(WorkerDied, match=words):
            pool.call([])
        [killed] = set(before) - set(pool.pids)
        assert survivors(killed) == []


def test_frame_that_nobody_asked_for_costs_the_worker_not_the_next_call():
    with pool_of("speaks_later", timeout=5, spare=False) as pool:
        assert pool.call([]) == "on time"
        [before] = pool.pids
        time.sleep(0.3)
        assert pool.call([]) == "on time"
        assert before not in pool.pids


def test_output_is_taken_in_and_forgotten():
    with pool_of("floods_output", timeout=20, spare=False) as pool:
        assert pool.call([64]) == 64
        assert pool.call([0]) == 0  # takes in what was left in the pipe
        [worker] = pool._crew.workers
        assert len(worker.log) <= LOG_BYTES and worker.log.endswith(b"end of noise\n")


def test_closed_output_is_not_waited_for_in_a_busy_loop():
    with pool_of("closes_output", timeout=5, spare=False) as pool:
        pool.wait_ready()
        before = time.process_time()
        assert pool.call([]) == "quiet"
        assert time.process_time() - before < 0.15  # of 0.3 s


def test_files_and_programs_of_a_worker_go_with_it(tmp_path):
    with pool_of("leaves_file", spare=False) as pool:
        pool.wait_ready()
        [worker] = pool._crew.workers
        with pytest.raises(WorkerTimeout):
            pool.call([])
        assert not Path(worker.folder).exists()
    with pool_of("leaves_child_behind", timeout=5, spare=False) as pool:
        pool.call([str(tmp_path / "pid")])
        group = int((tmp_path / "pid").read_text())
        assert len(group_of(group)) == 2
    assert survivors(group) == []


# --- starting and ending -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("no.such.module:f", "ModuleNotFoundError: No module named 'no'"),
        (HERE + "nothing_of_that_name", "AttributeError"),
    ],
)
def test_target_that_cannot_be_imported(target, words):
    with Pool(target, timeout=1) as pool:
        with pytest.raises(WorkerError, match=words):
            pool.wait_ready()
        with pytest.raises(WorkerError, match=words):
            pool.call([])


def test_start_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(Pool, "start_timeout", 0.5)
    not_started = pytest.raises(WorkerTimeout, match=r"sleep: not started within 0\.5 s")
    with Pool(HERE + "sleep", timeout=5, init=[60]) as pool, not_started:
        pool.call([])


def test_start_that_dies_says_so():
    with Pool(HERE + "exits", timeout=5, init=[4]) as pool, pytest.raises(WorkerDied, match="ended with exit code 4"):
        pool.call([])


@pytest.mark.parametrize("target", ["module", ":f", "m:", "a:b:c"])
def test_target_must_name_a_function(target):
    with pytest.raises(ValueError, match="want"):
        Pool(target, timeout=1)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": float("nan")}, {"size": 0}, {"memory_mb": 0}])
def test_numbers_must_make_sense(options):
    with pytest.raises(ValueError, match="want positive numbers"):
        Pool(HERE + "add", **{"timeout": 1, **options})


@pytest.mark.parametrize("argument", [float("nan"), b"x", {1}])
def test_arguments_that_are_no_json_are_refused_before_any_call(argument):
    with pool_of("count", timeout=5, spare=False) as pool:
        with pytest.raises((TypeError, ValueError)):
            pool.run([([1], {}), ([argument], {})])
        assert pool.call([]) == 1


def test_closed_pool_answers_no_more_and_has_no_processes():
    pool = pool_of("add", timeout=5)
    pids = pool.pids
    pool.close()
    pool.close()
    assert survivors(*pids) == []
    with pytest.raises(ValueError, match="closed"):
        pool.call([1])


def test_forgotten_pool_is_closed_and_so_is_that_of_an_interpreter_that_ends(tmp_path):
    pool = pool_of("add", timeout=5)
    pids = pool.pids
    del pool
    assert survivors(*pids) == []
    program = "from rewards.worker import Pool\np = Pool('math:sqrt', timeout=1)\np.call([4])\nprint(*p.pids)\n"
    for last in (
        "",
        "raise RuntimeError",
        "import os, signal; import sys; sys.stdout.flush(); os.kill(os.getpid(), 9)",
    ):
        done = subprocess.run(
            [sys.executable, "-c", program + last],
            env={"TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        pids = [int(pid) for pid in done.stdout.split()]
        assert len(pids) == 2
        assert survivors(*pids) == []


def test_interrupted_call_leaves_no_stale_answer():
    with pool_of("sleep", timeout=5, spare=False) as pool:
        pool.wait_ready()
        [before] = pool.pids
        step, pool._step = pool._step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.call([0.1, 1])
        pool._step = step
        assert survivors(before) == []
        assert pool.call([0, 2]) == 2


def test_many_kills_leak_nothing():
    with pool_of("exits", timeout=5) as pool:
        pool.wait_ready()
        fds = num_fds()
        for _ in range(5):
            with pytest.raises(WorkerDied):
                pool.call([])
        assert num_fds() == fds


# --- frames --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [b"NaN", b"[Infinity]", b"-Infinity", b"1e999", b"-1e400", b"", b"{", b"\xff", b"[" * 200_000, b"1 2"]
)
def test_bodies_that_are_refused(body):
    with pytest.raises(ValueError, match="."):
        decode(body)


@pytest.mark.parametrize(
    "reply",
    [None, [], "x", {}, {"id": "a"}, {"id": "a", "value": 1, "error": "x"}, {"id": "a", "error": 1}, {"id": 1, "value": 1},
     {"id": "a", "value": 1, "more": 2}],
)  # fmt: skip
def test_replies_that_are_refused(reply):
    with pytest.raises(ValueError, match="."):
        check_reply(reply, "a")


def test_a_frame_goes_round():
    message = {"id": "a", "value": [1, 2.5, None, "ä\ud800"]}
    frame = encode(message)
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert check_reply(decode(frame[4:]), "a") == message
