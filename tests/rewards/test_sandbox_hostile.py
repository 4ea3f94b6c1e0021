"""Hostile completions against the code reward: zero undeserved points, zero survivors.

Every row is a completion that does not solve its task. It is scored with "fraction" on a program test and on a
function test; then no process with this test's mark is left, no file lies outside the (removed) folder, nothing
listens on its port. Rows that a tier says it does not protect against still may not score there.
"""

import os
import socket
import tempfile
from pathlib import Path

import pytest

from rewards.code import CodeTests
from rewards.sandbox import Limits, process

from .test_sandbox import MISSING

SECRET = "expected-5417"
OUTSIDE = Path(tempfile.gettempdir()) / f"rewards_hostile_{os.getpid()}"
PORT = 47_631 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])  # tests that run side by side look for their own
EVIL = "class E:\n    def __eq__(self, o): return True\n    __hash__ = None\n"
FRAME = (
    "import gc, os, struct, sys\n"
    "def frame(text, nonce):\n    t = text.encode(); return struct.pack('>I', len(t)) + nonce + t\n"
    "def nonces():\n"
    "    f = sys._getframe()\n"
    "    while f:\n"
    "        r = f.f_locals.get('request')\n"
    "        if isinstance(r, dict): return bytes.fromhex(r['nonce'])\n"
    "        f = f.f_back\n    return b'0' * 16\n"
)
ESCAPE = f"open({str(OUTSIDE)!r}, 'w').write('x')"
FORKED = "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        import time; time.sleep(60)\n    os._exit(0)\n"

HOSTILE = {
    # exits and verdicts
    "exit 0": "import sys; sys.exit(0)",
    "os._exit 0": "import os; os._exit(0)",
    "SystemExit in the function": "def f(x): raise SystemExit(0)",
    "os._exit in the function": "import os\ndef f(x): os._exit(0)",
    "_exit patched": "import os; os._exit = lambda c: None",
    "prints a verdict": "print('PASSED'); print('OK'); print('1.0'); print('{\"score\": 1.0}')",
    "prints every number": "print(*range(100000))",
    "prints nothing": "pass",
    "atexit prints": "import atexit; atexit.register(lambda: print('all tests passed'))",
    "generator exit": "raise GeneratorExit",
    "keyboard interrupt": "raise KeyboardInterrupt",
    "exception with a hostile text": "class B(BaseException):\n    def __str__(self): raise self\nraise B",
    "abort": "import os; os.abort()",
    "segfault": "import ctypes; ctypes.string_at(0)",
    "syntax error": "def f(x:",
    "NUL": "exec('x = ' + chr(0))",
    "prefix of the answer": "print('expected')",
    "echo": "print(input())\ndef f(x): return x",
    # equality
    "equals everything": EVIL + "def f(x): return E()",
    "int that equals everything": "class I(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\ndef f(x): return I(0)",
    "str that equals everything": "class S(str):\n    def __eq__(s, o): return True\n    __hash__ = str.__hash__\ndef f(x): return S('')",
    "list of such": EVIL + "def f(x): return [E()]",
    "float nan": "def f(x): return float('nan')",
    "type that lies": "class L:\n    __class__ = str\ndef f(x): return L()",
    "function returned": "def f(x): return f",
    "generator returned": "def f(x): yield 1",
    "cycle returned": "def f(x):\n    a = []; a.append(a); return a",
    "lazy object": "class A:\n    def __getattr__(s, n): return lambda *a: True\ndef f(x): return A()",
    "metaclass": "class M(type):\n    def __eq__(c, o): return True\n    __hash__ = type.__hash__\nclass C(metaclass=M): pass\ndef f(x): return C",
    "huge integer": "def f(x): return 1 << 8_000_000",
    "deep list": "def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
    # patching the harness
    "patches builtins": "import builtins\nbuiltins.print = lambda *a, **k: None\nbuiltins.len = lambda x: 1\ndef f(x): return 1",
    "patches json": "import json; json.dumps = lambda *a, **k: '1'\ndef f(x): return 1",
    "patches the runner": "import sys\nfor n in ('runner', 'values', 'calls'):\n    m = sys.modules.get(n)\n    for k in ('dumps', 'encode', 'evaluate', 'run', 'end'):\n        if m and hasattr(m, k): setattr(m, k, lambda *a, **k: 'true')\ndef f(x): return 1",
    "replaces stdout": "import sys, io; sys.stdout = io.StringIO(); print(1)",
    "closes descriptors": "import os; os.closerange(0, 100)",
    "settrace": "import sys; sys.settrace(lambda *a: None)\ndef f(x): return None",
    "answers as __main__": "import __main__; __main__.expected = 1; __main__.passed = True",
    "returns from the supervisor": "import sys, runner\nrunner.main()",
    "unwinds frames": "import sys\nf0 = sys._getframe()\nwhile f0.f_back: f0 = f0.f_back\nf0.f_globals['sys'].exit = lambda *a: None",
    # forged frames
    "frame true": FRAME + "os.write(3, frame('true', nonces())); os._exit(0)",
    "two frames": FRAME + "def f(x):\n    os.write(3, frame('true', nonces())); return 1",
    "frame without nonce": FRAME + "os.write(3, frame('true', b'0' * 16)); os._exit(0)",
    "frame into every descriptor": FRAME
    + "for d in range(64):\n    try: os.write(d, frame('true', nonces()))\n    except OSError: pass\nos._exit(0)",
    "frame of deep JSON": FRAME + "os.write(3, frame('[' * 60000, nonces())); os._exit(0)",
    "frame of a bare NaN": FRAME + "os.write(3, frame('NaN', nonces())); os._exit(0)",
    "frame length of 4 GiB": FRAME + "os.write(3, struct.pack('>I', 2**32 - 1) + nonces()); os._exit(0)",
    "supervisor's answer to its pipe": "import os, struct\ntry:\n    d = os.open(f'/proc/{os.getppid()}/fd/1', os.O_WRONLY)\n    b = struct.pack('>BiIII', 0, 0, 1, 0, 1) + b'x' + bytes([6]); os.write(d, struct.pack('>I', len(b)) + b)\nexcept OSError: pass",
    "unpickled object": "class P:\n    def __reduce__(s): import os; return (os._exit, (0,))\ndef f(x): return P()",
    # looking for the answer
    "reads the parents": "import os\np = os.getppid()\nfor n in ('environ', 'cmdline', 'maps'):\n    try: print(open(f'/proc/{p}/{n}', errors='replace').read())\n    except OSError: pass",
    "reads the tests": "import os\nfor root, _, names in os.walk('..'):\n    for n in names[:50]:\n        try: print(open(os.path.join(root, n)).read(1000))\n        except Exception: pass",
    "searches its memory": "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'expected' in o: print(o['expected'])",
    "walks the frames": "import sys\nf0 = sys._getframe()\nwhile f0:\n    for k, v in f0.f_locals.items():\n        if k in ('tests', 'expected', 'output'): print(v)\n    f0 = f0.f_back",
    "result files": "for n in ('result.json', 'score', 'report.xml', 'conftest.py', 'sitecustomize.py', 'json.py'):\n    open(n, 'w').write('{\"passed\": true, \"score\": 1}')",
    "patches the library": "import json, os\ntry: open(json.__file__, 'a').close(); os.utime(json.__file__)\nexcept OSError: pass",
    # using up and staying
    "endless": "while True: pass",
    "endless output": "while True: print('x' * 10000)",
    "endless stderr": "import sys\nwhile True: sys.stderr.write('x' * 10000)",
    "sleeps": "import time; time.sleep(1000)",
    "ignores signals": "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\ntime.sleep(1000)",
    "memory": "x = []\nwhile True: x.append(bytearray(10 ** 7))",
    "recursion": "def g(n): return g(n + 1)\ng(0)",
    "power tower": "9 ** 9 ** 9 ** 9",
    "regex": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    "large file": "open('a', 'wb').truncate(10 ** 12)",
    "fills a file": "f0 = open('a', 'wb')\nwhile True: f0.write(b'x' * 10 ** 6)",
    "deep folders": "import os\nfor _ in range(1500): os.mkdir('d'); os.chdir('d')",
    "no rights": "import os\nos.mkdir('a'); open('a/b', 'w').close()\ntry: os.chmod('a', 0)\nexcept OSError: pass",
    "threads for ever": "import threading, time\nfor _ in range(200):\n    threading.Thread(target=time.sleep, args=(1000,)).start()",
    "daemon": FORKED,
    "daemon that holds the pipes": FORKED.replace("time.sleep(60)", "print(1, flush=True); time.sleep(60)"),
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "kills its parent": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    "daemon, then kills its parent": FORKED + "import signal; os.kill(os.getppid(), signal.SIGKILL)",
    "starts a program": "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)",
    "execs": "import os; os.execv('/bin/echo', ['echo', 'PASSED'])",
    "listens": f"import socket, time\ns = socket.socket(); s.bind(('127.0.0.1', {PORT})); s.listen(); time.sleep(1000)",
    "stops its parent": "import os, signal; os.kill(os.getppid(), signal.SIGSTOP)",
}
# Rows that write outside or touch /tmp by intent: only tiers that claim to stop it are asked.
WRITES = {
    "writes outside": ESCAPE,
    "links outside": f"import os; os.symlink('/etc', {str(OUTSIDE)!r})",
    "hard link": f"import os; open('a', 'w').close(); os.link('a', {str(OUTSIDE)!r})",
    "renames outside": f"import os; open('a', 'w').close(); os.rename('a', {str(OUTSIDE)!r})",
    "folder outside": f"import os; os.mkdir({str(OUTSIDE)!r})",
    "socket file": f"import socket; socket.socket(socket.AF_UNIX).bind({str(OUTSIDE)!r})",
    "by a thread": f"import threading; threading.Thread(target=lambda: {ESCAPE}).start()",
    "by ctypes": f"import ctypes; ctypes.CDLL(None).creat({str(OUTSIDE)!r}.encode(), 0o600)",
    "memory file run": f"import os; d = os.memfd_create('x'); os.write(d, open('/bin/sh', 'rb').read()); os.execve(d, ['sh', '-c', 'touch {OUTSIDE}'], {{}})",
}
TESTS = [
    {"input": "1\n", "output": SECRET},
    {"function": "f", "args": [1], "expected": SECRET},
    "assert f(1) == 'expected-5417'",
]
LIMITS = Limits(timeout_s=0.4)


def score(tier, source):
    return CodeTests(tier, limits=LIMITS)(f"```python\n{source}\n```", TESTS)


@pytest.fixture
def watched(monkeypatch):
    """Marks of this test's supervisors and their folders, to look for what is left of them."""
    marks, folders = [], []
    start = process._Supervisor._start

    def noted(self, source):
        marks.append(self.mark)
        folders.append(self.folder)
        return start(self, source)

    monkeypatch.setattr(process._Supervisor, "_start", noted)
    return marks, folders


def survivors(watched):
    marks, folders = watched
    assert marks
    found = [f"process {pid}" for mark in marks for pid in process.marked(mark)]
    found += [folder for folder in folders if os.path.lexists(folder)]
    found += [str(OUTSIDE)] if os.path.lexists(OUTSIDE) else []
    with socket.socket() as probe:
        found += ["socket"] if probe.connect_ex(("127.0.0.1", PORT)) == 0 else []
    return found


def skip_missing(tier):
    if MISSING[tier]:
        pytest.skip(MISSING[tier])


def test_there_are_enough():
    assert len(HOSTILE) + len(WRITES) >= 60


@pytest.mark.parametrize("name", [*HOSTILE, *WRITES])
def test_confined(name, watched):
    skip_missing("confined")
    assert score("confined", {**HOSTILE, **WRITES}[name]) == 0.0
    assert survivors(watched) == []


OTHERS = ["daemon", "daemon that holds the pipes", "kills its parent", "daemon, then kills its parent", "fork bomb", "starts a program",
          "listens", "stops its parent", "equals everything", "two frames", "supervisor's answer to its pipe"]  # fmt: skip


@pytest.mark.parametrize("tier", ["process", "namespace", "bubblewrap"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_tiers(tier, name, watched):
    skip_missing(tier)
    assert score(tier, HOSTILE[name]) == 0.0
    assert survivors(watched) == []


def test_the_tests_can_be_passed(watched):
    skip_missing("confined")
    assert score("confined", f"print({SECRET!r})\ndef f(x): return {SECRET!r}") == 1.0
    assert survivors(watched) == []
