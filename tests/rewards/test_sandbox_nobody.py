"""The tier `process` for a user who is not root: what holds, and what is open there (its tests are this user too).

As root the sandbox gives its tests to `nobody`; an ordinary user has nobody to give them to. A child of these tests drops
to uid 65534 for good and uses the sandbox as that user does.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import rewards
from rewards.sandbox import describe

from .test_sandbox_hostile import HOSTILE, OTHERS, SECRET

NOBODY = 65_534
CODES = [name for name in OTHERS if name != "stops its parent"]  # takes 9 s; see test_sandbox_hostile.py
PROGRAM = """
import json, os, sys
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    os.execv(sys.executable, sys.orig_argv)  # a process that changed its user is closed to others, a fresh one is not
assert os.getuid() != 0 != os.geteuid()
order = json.load(sys.stdin)
sys.path.insert(0, os.getcwd())
from rewards.code import CodeTests
from rewards.sandbox import Limits, Request, open_sandbox, process

marks, start = [], process._Supervisor._start
def noted(self, source):
    marks.append((self.mark, self.folder))
    return start(self, source)
process._Supervisor._start = noted
reward = CodeTests("process", limits=Limits(timeout_s=0.5, num_processes=8))
secret, scores, statuses = order["secret"], {}, {}
for name, source in order["codes"].items():
    completion = "```python\\n" + source + "\\n```"
    scores[name] = [
        reward(completion, [{"input": "1", "output": secret}]),
        reward(completion, [{"function": "f", "args": [1], "expected": secret}]),
    ]
for name, source in order["probes"].items():
    with open_sandbox("process", source, Limits(timeout_s=2.0, num_processes=8, memory_bytes=200 << 20)) as box:
        outcome = box.run(Request())
    statuses[name] = [outcome.status, outcome.stdout.strip()]
left = [mark for mark, folder in marks if list(process.marked(mark)) or os.path.lexists(folder)]
print(json.dumps({"uid": os.getuid(), "scores": scores, "probes": statuses, "left": left}))
"""

# What a test tries; it prints what it reached.
PROBES = {
    "uid": "import os\nprint(os.getuid(), os.geteuid())",
    "become root": "import os\ntry: os.setuid(0)\nexcept PermissionError: print('refused')",
    "root's files": "try: print(len(open('/etc/shadow').read()))\nexcept PermissionError: print('refused')",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "processes": (
        "import os, time\nn = 0\ntry:\n    while n < 200:\n        if os.fork() == 0: time.sleep(1); os._exit(0)\n        n += 1\n"
        "except BlockingIOError: pass\nprint(n)"
    ),
    "files": "open('big', 'wb').write(bytes(20 << 20))",
    "environment": "import os\nprint(sorted(set(os.environ) & {'SECRET_OF_TRAINER', 'HOME', 'PATH'}))",
    # open in this tier, as `describe` says
    "trainer's environment": (
        "import os\npid, found = os.getpid(), False\n"
        "while pid > 1 and not found:\n"
        "    pid = int(open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1])\n"
        "    try: found = b'SECRET_OF_TRAINER=1' in open(f'/proc/{pid}/environ', 'rb').read()\n"
        "    except PermissionError: pass\n"
        "print(found)"
    ),
    "files of this user": "print(open('/proc/1/stat').read() != '' and open('/etc/passwd').read() != '')",
    "sockets": "import socket\nsocket.socket().close()\nprint('made')",
}


def interpreter():
    """One that `nobody` may run (the interpreter of these tests may live in root's home), or None."""
    for path in (sys.executable, "/usr/bin/python3"):
        drop = "import os; os.getuid() or (os.setgroups([]), os.setgid(65534), os.setuid(65534)); import sys, random, json; "
        again = f"import subprocess; sys.exit(subprocess.run([{path!r}, '-I', '-c', 'import tomllib']).returncode)"
        try:
            done = subprocess.run([path, "-c", drop + again], capture_output=True, cwd="/", check=False)
        except OSError:
            continue
        if done.returncode == 0:
            return path
    return None


@pytest.fixture(scope="module")
def found():
    path = interpreter()
    if path is None:
        pytest.skip("no interpreter (3.11 or newer) that uid 65534 may run")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        shutil.copytree(Path(rewards.__file__).parent, Path(folder, "rewards"), ignore=shutil.ignore_patterns("*.pyc"))
        honest = f"print({SECRET!r})\ndef f(x): return {SECRET!r}"
        codes = {"honest": honest, **{name: HOSTILE[name] for name in CODES}}
        done = subprocess.run(
            [path, "-c", PROGRAM],
            input=json.dumps({"secret": SECRET, "codes": codes, "probes": PROBES}),
            capture_output=True,
            text=True,
            cwd=folder,
            env={"PATH": os.environ["PATH"], "SECRET_OF_TRAINER": "1"},
            check=False,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_it_was_not_root(found):
    assert found["uid"] == (os.getuid() or NOBODY)
    uid = str(found["uid"])
    assert found["probes"]["uid"] == ["ok", f"{uid} {uid}"]


def test_the_honest_one_scores_and_no_hostile_one_does(found):
    scores = dict(found["scores"])
    assert scores.pop("honest") == [1.0, 1.0]
    assert len(scores) == len(CODES) and set(map(tuple, scores.values())) == {(0.0, 0.0)}


def test_nothing_is_left(found):
    assert found["left"] == []


def test_limits_hold(found):
    probes = found["probes"]
    assert probes["memory"][0] == "error" and probes["files"][0] == "error"
    assert probes["become root"] == ["ok", "refused"] and probes["root's files"] == ["ok", "refused"]
    status, forks = probes["processes"]
    assert status == "ok" and int(forks) <= 8 + 8  # RLIMIT_NPROC; others of the user may have ended meanwhile
    assert "SECRET_OF_TRAINER" not in probes["environment"][1] and "HOME" not in probes["environment"][1]


def test_what_is_open_is_said(found):
    """The same probes reach these; when one no longer does, the tier's description is to be corrected."""
    probes, said = found["probes"], describe("process")
    assert probes["files of this user"] == ["ok", "True"] and "reading files" in said
    assert probes["sockets"] == ["ok", "made"] and "sockets" in said
    assert probes["trainer's environment"] == ["ok", "True"] and "trainer's memory and environment" in said
