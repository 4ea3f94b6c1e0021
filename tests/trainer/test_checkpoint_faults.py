"""R3 to R6: a checkpoint survives kills, failing disks, power loss and corruption, at every file operation.

Faults are put in at the functions of `os`, through which every file operation of a save and a load goes (a slow test
counts them with strace); real limits of the kernel (file size, open files) are tried beside them.
"""

import errno
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from grpo.trainer.checkpoint import (
    Checkpoint,
    CheckpointError,
    SaveError,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parents[2]
CHANGES = ("open", "mkdir", "write", "fsync", "close", "rename", "unlink", "rmdir")
LOOKS = ("listdir", "scandir", "stat", "lstat", "fstat", "statvfs", "read", "readv", "readlink")


def checkpoint(step, value):
    tensors = {
        "policy": {"a": torch.full((16,), float(value)), "b": torch.tensor([value, step])},
        "optimizer": {"a/exp_avg": torch.full((8,), float(value), dtype=torch.float64)},
    }
    return Checkpoint(step, tensors, {"value": value})


def save(run_dir, step, value):
    return save_checkpoint(run_dir, checkpoint(step, value), run_id="run", config_hash="hash")


def value_of(found):
    """Which save this is, after comparing every number in it."""
    if found is None:
        return None
    want = checkpoint(found.step, found.state["value"])
    for file, tensors in want.tensors.items():
        assert found.tensors[file].keys() == tensors.keys()
        assert all(torch.equal(found.tensors[file][name], tensor) for name, tensor in tensors.items())
    return found.state["value"]


def newest(run_dir):
    return value_of(newest_checkpoint(run_dir, report=pytest.fail))


@contextmanager
def hooked(hook, names=CHANGES + LOOKS):
    """`hook(name, real, args)` is called in place of each of these functions of `os`."""

    def wrap(name, real):
        return lambda *args, **kwargs: hook(name, lambda *a: real(*a, **kwargs), args)

    real = {name: getattr(os, name) for name in names}
    for name, function in real.items():
        setattr(os, name, wrap(name, function))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


@contextmanager
def no_sync():
    """Syncing costs time and does nothing in a test that loses no power."""
    with hooked(lambda name, real, args: None, names=("fsync",)):
        yield


# What the disk holds before the save under test (step, value), that save, and the values that may be newest after.
SCENARIOS = {
    "first": ([], (1, 10)),
    "second": ([(1, 10)], (2, 20)),
    "prunes one": ([(1, 10), (2, 20)], (3, 30)),
    "same step again": ([(1, 10), (2, 20)], (2, 21)),
    "after going back": ([(1, 10), (2, 20)], (1, 11)),
}


@pytest.fixture
def ground(tmp_path):
    """A folder in memory where there is one: thousands of small files, and what is tested is the order of calls."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.fixture
def arena(ground):
    """`prepare(scenario)`: a fresh run folder, the save to try, and the value that was newest."""
    number = itertools.count()
    templates = {}

    def prepare(scenario):
        before, after = SCENARIOS[scenario]
        if scenario not in templates:
            templates[scenario] = ground / f"template {scenario}"
            templates[scenario].mkdir()
            with no_sync():
                for step, value in before:
                    save(templates[scenario], step, value)
            if scenario == "prunes one":  # and what an earlier kill left
                (templates[scenario] / "checkpoints" / ".tmp-step_000002-1").mkdir()
                (templates[scenario] / "checkpoints" / ".tmp-step_000002-1" / "policy.safetensors").touch()
        run_dir = ground / f"run {next(number)}"
        shutil.copytree(templates[scenario], run_dir)
        return run_dir, after, before[-1][1] if before else None

    return prepare


def check_survivor(run_dir, new, old, *, must_be_new=False):
    """The newest is the old or the new one, all there is verifies, and saving works again and leaves no rubbish."""
    found = newest(run_dir)
    assert found == new[1] or (found == old and not must_be_new), f"{found} is the newest"
    with no_sync():
        save(run_dir, 100, 1000)
    assert newest(run_dir) == 1000
    left = sorted((run_dir / "checkpoints").iterdir())
    assert len(left) <= 2, left
    for path in left:
        load_checkpoint(path)
    shutil.rmtree(run_dir)
    return found


# --- R3: killed at every file operation ----------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(moment, work, torn):
    """Run `work` in a child that dies at its operation number `moment` (a torn write: after half of it)."""
    pid = os.fork()
    if pid == 0:
        calls = itertools.count()

        def hook(name, real, args):
            if next(calls) == moment:
                if torn and name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                die()
            return real(*args) if name != "fsync" else None

        try:
            with hooked(hook):
                work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(
    ("scenario", "torn"), [*((scenario, False) for scenario in SCENARIOS), ("first", True), ("prunes one", True)]
)
def test_killed_at_every_file_operation_the_newest_verifies_and_the_next_save_works(arena, scenario, torn):
    seen = []
    for moment in itertools.count():
        run_dir, new, old = arena(scenario)
        code = killed_at(moment, lambda folder=run_dir, what=new: save(folder, *what), torn)
        assert code in (0, -signal.SIGKILL)
        seen.append(check_survivor(run_dir, new, old, must_be_new=code == 0))
        if code == 0:
            break
    assert len(seen) > 40  # the wrapped functions are really those that a save uses
    assert seen == sorted(seen, key=lambda value: value == new[1])  # once new, never old again
    assert old in seen


@pytest.mark.parametrize("scenario", ["prunes one", "same step again"])
def test_killed_twice_in_a_row_at_random(arena, scenario):
    source = random.Random(0)
    for _ in range(60):
        run_dir, new, old = arena(scenario)
        for _ in range(2):
            killed_at(source.randrange(150), lambda folder=run_dir, what=new: save(folder, *what), torn=False)
        check_survivor(run_dir, new, old)


SAVER = """
import sys, pathlib, torch
from grpo.trainer.checkpoint import save_checkpoint, Checkpoint
tensors = {"policy": {"a": torch.full((16,), 30.0), "b": torch.tensor([30, 3])},
           "optimizer": {"a/exp_avg": torch.full((8,), 30.0, dtype=torch.float64)}}
pathlib.Path(sys.argv[1], "begin").touch()
save_checkpoint(pathlib.Path(sys.argv[1]), Checkpoint(3, tensors, {"value": 30}), run_id="run", config_hash="hash")
pathlib.Path(sys.argv[1], "end").touch()
"""
TRACED = "openat,mkdir,mkdirat,write,fsync,rename,renameat,renameat2,unlink,unlinkat,rmdir"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_killed_by_strace_at_every_system_call(arena, tmp_path):
    """The same from outside: no file operation of a save goes past the wrapped functions."""

    def run(run_dir, *options):
        command = ["strace", "-f", "-o", str(tmp_path / "trace"), *options, sys.executable, "-c", SAVER, str(run_dir)]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        return done.returncode

    run_dir, new, old = arena("prunes one")
    assert run(run_dir, "-e", f"trace={TRACED}") == 0
    assert newest(run_dir) == 30
    lines = [line.split(maxsplit=1)[1] for line in (tmp_path / "trace").read_text().splitlines()]
    begin = next(i for i, line in enumerate(lines) if "/begin" in line)
    end = next(i for i, line in enumerate(lines) if "/end" in line)
    count, points = {}, []
    for index, line in enumerate(lines[: end + 1]):
        call = line.split("(")[0]
        count[call] = count.get(call, 0) + 1
        if index > begin and call in TRACED.split(","):
            points.append((call, count[call]))
    assert len(points) > 30
    for call, when in points:
        run_dir, new, old = arena("prunes one")
        run(run_dir, "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={when}")
        check_survivor(run_dir, new, old)


# --- R4: failing at every file operation ---------------------------------------------------------------------


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def failing(moment, code, forever):
    """A disk that fails at operation `moment`, once or from then on. A full disk lets files be read and removed."""
    calls = itertools.count()
    touched = {"open", "mkdir", "write", "fsync"} if code == errno.ENOSPC else {*CHANGES, *LOOKS}
    state = {"failed": False}

    def hook(name, real, args):
        if name == "close":
            real(*args)  # Linux closes, and then reports
        number = next(calls)
        if name in touched and (number == moment or (forever and number > moment)):
            state["failed"] = True
            raise OSError(code, os.strerror(code), args[0] if isinstance(args[0], str) else None)
        return None if name in ("close", "fsync") else real(*args)

    return hook, state, calls


@pytest.mark.parametrize(
    ("code", "forever"),
    [(errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EIO, False), (errno.EIO, True), (errno.EMFILE, False)],
    ids=["ENOSPC once", "ENOSPC from then on", "EIO once", "EIO from then on", "EMFILE once"],
)
@pytest.mark.parametrize("scenario", ["first", "prunes one", "same step again"])
def test_failing_at_every_file_operation_is_a_save_error_and_the_last_good_one_stays(arena, scenario, code, forever):
    refused = 0
    for moment in itertools.count():
        run_dir, new, old = arena(scenario)
        before = open_files()
        hook, state, calls = failing(moment, code, forever)
        error = None
        with hooked(hook):
            try:
                save(run_dir, *new)
            except SaveError as raised:
                error = raised
        assert open_files() == before
        if error is not None:
            refused += 1
            assert error.errno == code
            assert "\n" not in str(error)
            assert ("not saved" in str(error)) == (not error.committed)
        check_survivor(run_dir, new, old, must_be_new=error is None or error.committed)
        if next(calls) <= moment:
            break
    assert not state["failed"]
    assert refused > 10


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_failing_while_loading_is_said_and_the_one_before_is_used(arena, code):
    outcomes = set()
    for moment in itertools.count():
        run_dir, _, _ = arena("second")
        with no_sync():
            save(run_dir, 2, 20)
        hook, state, calls = failing(moment, code, forever=False)
        before, said = open_files(), []
        with hooked(hook):
            try:
                outcome = value_of(newest_checkpoint(run_dir, report=said.append))
            except CheckpointError as error:
                outcome = "refused"
                assert os.strerror(code) in str(error)
        assert open_files() == before
        assert outcome == (20 if not state["failed"] else outcome)
        assert (outcome == 10) == (len(said) == 1)
        outcomes.add(outcome)
        if next(calls) <= moment:
            break
    assert outcomes == {10, 20, "refused"}


def test_real_limits_of_the_kernel(arena):
    """A file size limit (a write that ends short, then EFBIG), and no file descriptor left."""
    run_dir, new, old = arena("second")
    size, files = resource.getrlimit(resource.RLIMIT_FSIZE), resource.getrlimit(resource.RLIMIT_NOFILE)
    largest = max(file.stat().st_size for file in (run_dir / "checkpoints" / "step_000001").iterdir())
    for limit in range(0, largest, largest // 20):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, size[1]))
        try:
            with pytest.raises(SaveError) as caught:
                save(run_dir, *new)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, size)
        assert caught.value.errno == errno.EFBIG
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000001"]
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, files[1]))
    try:
        with pytest.raises(SaveError) as caught:
            save(run_dir, *new)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
    assert caught.value.errno == errno.EMFILE
    check_survivor(run_dir, new, old)


def test_too_little_space_is_found_before_anything_is_written(arena):
    run_dir, new, _ = arena("second")
    written = []

    def hook(name, real, args):
        if name == "statvfs":
            return os.statvfs_result([4096, 4096, 100, 100, 100, 0, 0, 0, 0, 255])  # 400 KiB
        written.append(name)
        return real(*args)

    with hooked(hook, names=("statvfs", "write", "mkdir")), pytest.raises(SaveError, match="0 MiB are free, 1 MiB"):
        save(run_dir, *new)
    assert written == []
    assert newest(run_dir) == 10


# --- R5: power loss ------------------------------------------------------------------------------------------


class Recorder:
    """Runs a save and notes what reaches the disk's cache and what is synced, as operations on numbered nodes.

    ("entry", folder, {name: node or None}) changes names in one folder, ("data", file, bytes) appends,
    ("sync", node) makes all that came before it on that node durable.
    """

    def __init__(self, root):
        self.root = str(root)
        self.new = itertools.count()
        self.folders, self.files, self.ops = {}, {}, []
        self.top = self._scan(root)
        self.start = {"folders": {n: dict(e) for n, e in self.folders.items()}, "files": dict(self.files)}
        self.descriptors = {}

    def _scan(self, path):
        node = next(self.new)
        if path.is_dir():
            self.folders[node] = {child.name: self._scan(child) for child in path.iterdir()}
        else:
            self.files[node] = path.read_bytes()
        return node

    def _place(self, path):
        folder = self.top
        *parts, name = os.path.relpath(path, self.root).split("/")
        for part in parts:
            folder = self.folders[folder][part]
        return folder, name

    def _node(self, path):
        if os.path.relpath(path, self.root) == ".":
            return self.top
        folder, name = self._place(path)
        return self.folders[folder][name]

    def _entry(self, folder, changes):
        for name, node in changes.items():
            if node is None:
                del self.folders[folder][name]
            else:
                self.folders[folder][name] = node
        self.ops.append(("entry", folder, changes))

    def __call__(self, name, real, args):
        if name == "fsync":
            self.ops.append(("sync", self.descriptors[args[0]]))
            return None
        result = real(*args)
        if name == "open":
            if args[1] & os.O_CREAT:
                folder, base = self._place(args[0])
                node = next(self.new)
                self.files[node] = b""
                self._entry(folder, {base: node})
            self.descriptors[result] = self._node(args[0])
        elif name == "write":
            self.ops.append(("data", self.descriptors[args[0]], bytes(args[1][:result])))
        elif name == "mkdir":
            folder, base = self._place(args[0])
            node = next(self.new)
            self.folders[node] = {}
            self._entry(folder, {base: node})
        elif name in ("unlink", "rmdir"):
            folder, base = self._place(args[0])
            self._entry(folder, {base: None})
        elif name == "rename":
            (folder, base), (target, new_base) = self._place(args[0]), self._place(args[1])
            assert folder == target
            self._entry(folder, {base: None, new_base: self.folders[folder][base]})
        return result

    def durable(self, count):
        """Whether each of the first `count` operations is synced within them."""
        last_sync = {op[1]: index for index, op in enumerate(self.ops[:count]) if op[0] == "sync"}
        return [index < last_sync.get(op[1], -1) for index, op in enumerate(self.ops[:count])]

    def disk(self, count, applied, data):
        """The tree after a crash: durable operations, pending ones in `applied`, pending data as `data` makes it."""
        folders = {n: dict(e) for n, e in self.start["folders"].items()}
        files = dict(self.start["files"])
        for index, (kind, node, *what) in enumerate(self.ops[:count]):
            durable = self.durable_cache[index]
            if kind == "entry" and (durable or index in applied):
                for name, target in what[0].items():
                    if target is None:
                        folders.setdefault(node, {}).pop(name, None)
                    else:
                        folders.setdefault(node, {})[name] = target
            elif kind == "data":
                files[node] = files.get(node, b"") + (what[0] if durable else data(what[0]))
        return self._tree(self.top, folders, files)

    def _tree(self, node, folders, files):
        if node in folders or node not in self.files:
            return tuple(sorted((name, self._tree(n, folders, files)) for name, n in folders.get(node, {}).items()))
        return files.get(node, b"")

    def crashes(self, source, tries):
        """Different disks that a power loss may leave, with whether the save had returned before it."""
        garbage = (lambda b: b"", lambda b: b[: len(b) // 2], lambda b: bytes(len(b)), lambda b: b)
        seen = set()
        for count in range(len(self.ops) + 1):
            self.durable_cache = self.durable(count)
            pending = [i for i in range(count) if self.ops[i][0] == "entry" and not self.durable_cache[i]]
            choices = [pending[:length] for length in range(len(pending) + 1)]  # in order
            choices += [[one] for one in pending] + [[i for i in pending if i != one] for one in pending]
            choices += [[i for i in pending if source.random() < 0.5] for _ in range(tries)]
            for applied, data in itertools.product(map(frozenset, choices), garbage):
                tree = self.disk(count, applied, data)
                key = (tree, count == len(self.ops))
                if key not in seen:
                    seen.add(key)
                    yield key


def write_tree(path, tree):
    if isinstance(tree, bytes):
        path.write_bytes(tree)
        return
    path.mkdir()
    for name, child in tree:
        write_tree(path / name, child)


def power_losses(arena, ground, scenario, tries=4):
    run_dir, new, old = arena(scenario)
    recorder = Recorder(run_dir)
    with hooked(recorder, names=CHANGES):
        save(run_dir, *new)
    assert newest(run_dir) == new[1]
    for number, (tree, returned) in enumerate(recorder.crashes(random.Random(1), tries)):
        crashed = ground / f"crash {number}"
        write_tree(crashed, tree)
        yield crashed, new, old, returned


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_after_a_power_loss_the_old_or_the_new_one_is_there(arena, ground, scenario):
    """And once the save has returned, the new one is, whatever was not synced."""
    found = [
        check_survivor(crashed, new, old, must_be_new=returned)
        for crashed, new, old, returned in power_losses(arena, ground, scenario)
    ]
    new, old = SCENARIOS[scenario][1][1], SCENARIOS[scenario][0][-1][1] if SCENARIOS[scenario][0] else None
    assert len(found) > 40
    assert set(found) == {old, new}


# --- R6: corruption ------------------------------------------------------------------------------------------


def assert_detected(run_dir, name):
    said = []
    found = newest_checkpoint(run_dir, report=said.append)
    assert value_of(found) == 10, f"{name} was not noticed"
    assert len(said) == 1
    assert f"step_000002/{name}: " in said[0]


def damaged(data, source):
    """One random accident: a flipped bit, a cut, a lengthening, a block of zeros, two bytes exchanged."""
    data, at = bytearray(data), source.randrange(len(data))
    kind = source.choice(["flip", "flip", "flip", "cut", "longer", "zeros", "exchange"])
    if kind == "flip":
        data[at] ^= 1 << source.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "longer":
        data += bytes(at + 1)
    elif kind == "zeros":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    else:
        other = source.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    return bytes(data)


def test_a_thousand_accidents_are_all_detected_and_the_previous_one_is_used(arena):
    run_dir, _, _ = arena("second")
    path = save(run_dir, 2, 20)
    source, count = random.Random(2), 0
    files = sorted(path.iterdir())
    while count < 1000:
        file = files[count % len(files)]
        good = file.read_bytes()
        bad = damaged(good, source)
        if bad == good:
            continue
        file.write_bytes(bad)
        assert_detected(run_dir, file.name)
        file.write_bytes(good)
        count += 1
    assert newest(run_dir) == 20


@pytest.mark.slow
def test_every_single_bit_and_every_length(arena):
    run_dir, _, _ = arena("second")
    path = save(run_dir, 2, 20)
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for length in range(len(good)):
            file.write_bytes(good[:length])
            assert_detected(run_dir, file.name)
        for bit in range(8 * len(good)):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bad)
            assert_detected(run_dir, file.name)
        file.write_bytes(good)
    assert newest(run_dir) == 20
