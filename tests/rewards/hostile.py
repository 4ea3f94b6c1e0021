"""Functions that do what must not hurt a run; imported by worker processes. One that needs a file takes its path."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

CALLS = 0


def add(a, b=0):
    return a + b


def count(*_):
    """How often this process was asked."""
    global CALLS
    CALLS += 1
    return CALLS


def pid():
    return os.getpid()


def facts():
    import resource

    return {
        "environment": dict(os.environ),
        "group": os.getpgid(0),
        "session": os.getsid(0),
        "memory": resource.getrlimit(resource.RLIMIT_AS)[0],
        "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
        "modules": sorted(sys.modules),
        "folder": os.environ["TMPDIR"],
        "fds": sorted(int(fd.name) for fd in Path("/proc/self/fd").iterdir()),
    }


def raises(text="boom"):
    raise ValueError(text)


def leaves(code=0):
    sys.exit(code)


def generator_exit():
    raise GeneratorExit


def interrupts():
    raise KeyboardInterrupt


def exits(code=3):
    os._exit(code)


def segfault():
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def sleep(seconds=60, value=1.0):
    time.sleep(seconds)
    return value


def ignores_sigterm():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(60)


def holds_gil():
    import re

    re.match(r"(a+)+$", "a" * 60 + "b")  # one C call that takes years


def power_tower():
    return len(str(9 ** (9**9)))


def memory_bomb():
    return len([bytearray(10**8) for _ in range(1000)])


def floods_output(megabytes=64):
    block = b"x" * 2**20
    for _ in range(megabytes):
        os.write(1, block)
        os.write(2, b"end of noise\n")
    return megabytes


def closes_output():
    os.close(1)
    os.close(2)
    time.sleep(0.3)
    return "quiet"


def starts_children(depth=3, seconds=60):
    """A tree of processes that outlive the call unless their group is killed; the call hangs."""
    for _ in range(depth):
        if os.fork() == 0:
            starts_children(depth - 1, seconds)
    time.sleep(seconds)
    os._exit(0)


def leaves_child_behind(path):
    """Answers, but leaves a program running in its group."""
    subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    Path(path).write_text(str(os.getpid()))
    return "done"


def dies_with_child_holding_pipe():
    if os.fork() == 0:
        time.sleep(60)
    os._exit(7)


def dies_once(path):
    """Ends the process at the first call, answers at the second."""
    if not Path(path).exists():
        Path(path).touch()
        os._exit(9)
    return "second"


def _reply_fd():
    return int(sys.argv[2])


def garbage():
    os.write(_reply_fd(), b"\x00\x00\x00\x05hello")
    time.sleep(60)


def garbage_header():
    os.write(_reply_fd(), b"\xff\xff\xff\xffHTTP/1.1")
    time.sleep(60)


def forged(value=1.0):
    body = b'{"id": "ready", "value": %r}' % value
    os.write(_reply_fd(), len(body).to_bytes(4, "big") + body)
    time.sleep(60)


def forged_then_answers():
    """Doubled: a frame of its own in front of the real one."""
    body = b'{"id": "x", "value": 1}'
    os.write(_reply_fd(), len(body).to_bytes(4, "big") + body)
    return 0.0


def speaks_later():
    """Answers, then writes a frame that nobody asked for."""
    import threading

    def late():
        time.sleep(0.1)
        body = b'{"id": "x", "value": 1}'
        os.write(_reply_fd(), len(body).to_bytes(4, "big") + body)

    threading.Thread(target=late).start()
    return "on time"


def nan_token():
    """A reply that is right but for a number that is none."""
    import gc
    import json

    identity = next(o["id"] for o in gc.get_objects() if isinstance(o, dict) and o.keys() == {"id", "args", "kwargs"})
    body = json.dumps({"id": identity, "value": float("nan")}).encode()
    os.write(_reply_fd(), len(body).to_bytes(4, "big") + body)
    time.sleep(60)


def closes_pipe():
    os.close(_reply_fd())
    time.sleep(60)


def huge():
    return "x" * (17 * 2**20)


def returns(value):
    """What JSON cannot hold."""
    return {
        "nan": float("nan"), "inf": float("inf"), "bytes": b"x", "set": {1}, "object": object(), "complex": 1j,
        "deep": _deep(100_000), "surrogate": "\ud800", "long": 10**400,
    }[value]  # fmt: skip


def _deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def leaves_file():
    import tempfile

    handle, path = tempfile.mkstemp()
    os.close(handle)
    time.sleep(60)
    return path


class Adder:
    """A factory's product: keeps what it was made with."""

    def __init__(self, start):
        self.start = start
        self.warm = 0

    def __call__(self, number):
        self.warm += 1
        return [self.start + number, self.warm]


def lazy_import(number=0):
    import decimal  # noqa: F401

    return number
