"""The run lock among real processes."""

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo.errors import InputError
from grpo.trainer import lock as lock_module
from grpo.trainer.lock import RunLock

ROOT = Path(__file__).resolve().parents[2]


def fork(work):
    """Run `work` in a forked child, which exits with what it returns; the child's pid."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return pid


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def wait_for(path):
    wait_until(path.exists)


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def is_free(run_dir):
    try:
        with RunLock(run_dir, "probe"):
            return True
    except InputError:
        return False


def test_of_twenty_at_once_one_runs_and_nineteen_get_one_line_that_names_it(tmp_path):
    ready, go = os.pipe()

    def contend(number):
        os.close(go)
        os.read(ready, 1)  # returns for all at once, when the parent closes its end
        try:
            with RunLock(tmp_path, f"run-{number}"):
                (tmp_path / "winner").write_text(f"{os.getpid()} run-{number}")
                wait_for(tmp_path / "over")
                return 0
        except InputError as error:
            (tmp_path / f"line-{number}").write_text(str(error))
            return error.exit_code

    children = [fork(lambda number=number: contend(number)) for number in range(20)]
    os.close(ready)
    os.close(go)
    wait_until(lambda: len(list(tmp_path.glob("line-*"))) >= 19)
    (tmp_path / "over").touch()
    assert sorted(exit_code(child) for child in children) == [0] + [2] * 19
    pid, run_id = (tmp_path / "winner").read_text().split()
    lines = {path.read_text() for path in tmp_path.glob("line-*")}
    assert lines == {
        f"{tmp_path}: in use by pid {pid} on {socket.gethostname()}, run {run_id} (want another output_dir)"
    }


def test_two_fresh_processes_race(tmp_path):
    program = (
        "import sys, time, pathlib\nfrom grpo.errors import InputError\nfrom grpo.trainer.lock import RunLock\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "try:\n with RunLock(folder, 'r'):\n  sys.stdin.read()\n"
        "except InputError as error:\n sys.stderr.write(f'{error}\\n'); sys.exit(error.exit_code)"
    )
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, text=True, stdin=subprocess.PIPE, stderr=-1
        )
        for _ in range(2)
    ]
    wait_until(lambda: any(process.poll() is not None for process in pair))
    loser, winner = sorted(pair, key=lambda process: process.poll() is None)
    assert loser.returncode == 2
    assert loser.stderr.read().count("\n") == 1
    winner.communicate()
    assert winner.returncode == 0


def test_the_lock_ends_with_its_holder_and_a_killed_holder_is_not_named(tmp_path):
    def hold_for_ever():
        with RunLock(tmp_path, "killed"):
            (tmp_path / "held").touch()
            time.sleep(60)

    child = fork(hold_for_ever)
    wait_for(tmp_path / "held")
    with pytest.raises(InputError, match=f"pid {child} .*run killed"), RunLock(tmp_path, "second"):
        pass
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL
    stale = (tmp_path / "run.lock").read_text()
    assert json.loads(stale)["pid"] == child
    with RunLock(tmp_path, "third"):
        # A holder that has not written its name yet: the stale one must not be blamed.
        (tmp_path / "run.lock").write_text(stale)
        with pytest.raises(InputError, match="in use by another process"), RunLock(tmp_path, "fourth"):
            pass


def test_a_holder_that_is_slow_to_write_its_name_is_waited_for(tmp_path):
    with RunLock(tmp_path, "slow"):
        name = (tmp_path / "run.lock").read_text()
        (tmp_path / "run.lock").write_text("")

        def write_later():
            time.sleep(0.2)
            (tmp_path / "run.lock").write_text(name)

        child = fork(write_later)
        with pytest.raises(InputError, match=f"pid {os.getpid()} .*run slow"), RunLock(tmp_path, "other"):
            pass
        assert exit_code(child) == 0


def test_a_forked_child_neither_keeps_nor_drops_the_lock(tmp_path):
    def hold_with_child():
        with RunLock(tmp_path, "parent"):
            worker = fork(lambda: wait_for(tmp_path / "over"))
            early = fork(lambda: 0)
            exit_code(early)  # a child that ends must not unlock its parent
            (tmp_path / "worker").write_text(str(worker))
            (tmp_path / "held").touch()
            time.sleep(60)

    child = fork(hold_with_child)
    wait_for(tmp_path / "held")
    assert not is_free(tmp_path)
    os.kill(child, signal.SIGKILL)
    exit_code(child)
    os.kill(int((tmp_path / "worker").read_text()), 0)  # the orphan is alive …
    assert is_free(tmp_path)  # … and does not hold the folder
    (tmp_path / "over").touch()


def test_a_program_started_by_the_run_does_not_inherit_the_lock(tmp_path):
    lock = RunLock(tmp_path, "run").__enter__()
    program = "import sys; sys.stdout.write('up'); sys.stdout.flush(); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", program], close_fds=False, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.read(2) == "up"
    lock._close()
    assert is_free(tmp_path)
    other.communicate()


def test_one_process_cannot_hold_a_folder_twice(tmp_path):
    with RunLock(tmp_path, "first"):
        written = json.loads((tmp_path / "run.lock").read_text())
        assert written == {"pid": os.getpid(), "host": socket.gethostname(), "run_id": "first"}
        assert stat.S_IMODE((tmp_path / "run.lock").stat().st_mode) == 0o600
        with pytest.raises(InputError, match=f"pid {os.getpid()} .*run first"), RunLock(tmp_path, "second"):
            pass
        assert not is_free(tmp_path)  # the refusal did not drop the lock
    assert is_free(tmp_path)


def test_an_exception_releases_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunLock(tmp_path, "run"):
        raise KeyboardInterrupt
    assert is_free(tmp_path)


def test_a_link_in_place_of_the_lock_is_refused_and_its_target_untouched(tmp_path):
    target = tmp_path / "precious"
    target.write_text("data")
    (tmp_path / "run.lock").symlink_to(target)
    with pytest.raises(InputError, match="run.lock"), RunLock(tmp_path, "run"):
        pass
    assert target.read_text() == "data"


def test_a_folder_that_is_missing_is_one_line(tmp_path):
    with pytest.raises(InputError, match="run.lock: No such file or directory"), RunLock(tmp_path / "none", "run"):
        pass


@pytest.mark.parametrize("run_id", ["", ".", "..", "a b", "a/b", "a\nb", "ü", "x" * 101, "run\n"])
def test_run_ids_are_plain_names(tmp_path, run_id):
    with pytest.raises(InputError, match="run id"):
        RunLock(tmp_path, run_id)


def test_a_file_system_without_flock_is_said(tmp_path, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    before = open_files()
    with pytest.raises(InputError, match="No locks available .want a local file system"), RunLock(tmp_path, "run"):
        pass
    assert open_files() == before


RUBBISH = """{
[]
null
{"pid": 1}
{"pid": "x", "host": 1}
{"pid": -1, "host": "h", "run_id": "r"}
{"pid": 99999999999999999999, "host": "h", "run_id": "r"}
{"pid": 1, "host": "h", "run_id": "a\\nb"}"""


@pytest.mark.parametrize("text", ["", *RUBBISH.splitlines()])
def test_rubbish_in_the_lock_file_is_not_shown(tmp_path, monkeypatch, text):
    monkeypatch.setattr(lock_module, "_WAIT_FOR_NAME", 0.05)
    with RunLock(tmp_path, "run"):
        (tmp_path / "run.lock").write_text(text)
        with pytest.raises(InputError) as caught, RunLock(tmp_path, "other"):
            pass
    assert caught.value.lines == [f"{tmp_path}: in use by another process (want another output_dir)"]
