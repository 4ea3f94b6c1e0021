"""The layers, the filter's arithmetic, the tiers' refusals, the wire, and a remote service."""

import json
import math
import os
import socket
import socketserver
import struct
import threading
import time

import pytest

from rewards.sandbox import TIERS, Limits, Request, SandboxError, confined, describe, open_sandbox, probe
from rewards.sandbox.process import SupervisorLostError, framed, unpacked
from rewards.sandbox.remote import post
from rewards.sandbox.values import MAX_INTEGER_BITS, NotPlainError, dumps, loads

LOCAL = ["process", "namespace", "confined", "bubblewrap"]


def available(tier):
    try:
        probe(tier)
    except SandboxError as error:
        return str(error)
    return ""


MISSING = {tier: available(tier) for tier in LOCAL}
TIER = [pytest.param(t, marks=pytest.mark.skipif(bool(MISSING[t]), reason=MISSING[t] or "-")) for t in LOCAL]

# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", [None, "", "docker", "Confined"])
def test_no_tier_no_run(tier):
    for action in (probe, describe, lambda name: open_sandbox(name, "")):
        with pytest.raises(SandboxError, match="want one of process, namespace, confined, bubblewrap, remote"):
            action(tier)


def test_every_tier_says_what_it_leaves_open():
    for tier, row in TIERS.items():
        assert row.not_against in describe(tier) and f"tier {tier} " in describe(tier)


def test_missing_layers_are_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SandboxError, match="tier bubblewrap: bwrap is not installed"):
        probe("bubblewrap")
    with pytest.raises(SandboxError, match="needs url"):
        probe("remote")
    monkeypatch.setattr(os, "uname", lambda: type("U", (), {"machine": "aarch64"}))
    with pytest.raises(OSError, match="no seccomp table for linux on aarch64"):
        confined.restrict_calls()


def test_a_layer_that_fails_is_an_error_in_one_line(tmp_path, monkeypatch):
    """The supervisor's own refusal reaches the caller: no tier is taken in place of another."""
    from rewards.sandbox import process

    spoiled = "import namespace; namespace.enter = lambda: (_ for _ in ()).throw(OSError('unshare: no')); "
    line = process.command()
    line[-1] = line[-1].replace("import runner;", f"{spoiled}import runner;")
    monkeypatch.setattr(process, "command", lambda: line)
    with pytest.raises(SandboxError, match="^tier namespace: unshare: no$"):
        probe("namespace")


# --- the filter --------------------------------------------------------------------------------------------------


def verdict(program, number, arguments=(), architecture=0xC000003E):
    """A classic BPF machine over struct seccomp_data {int nr; u32 arch; u64 ip; u64 args[6]}."""
    data = struct.pack(
        "<iIQ6Q", number - (1 << 32 if number >= 1 << 31 else 0), architecture, 0, *[*arguments, *[0] * 6][:6]
    )
    place, accumulator = 0, 0
    while True:
        code, yes, no, k = program[place]
        place += 1
        if code == 0x06:
            return k
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
        else:
            true = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
            place += yes if true else no


PROGRAM = confined.seccomp_program(4321)
KILL, ALLOW, EPERM, ENOSYS = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026


def test_filter_over_every_number():
    """Exactly the table is allowed; the checked calls are denied with arguments of all ones; x32 is killed."""
    conditional = {16, 56, 72, 234, 302}
    for number in range(1024):
        wanted = ALLOW if number in confined.ALLOWED.values() else ENOSYS if number == 435 else EPERM
        assert verdict(PROGRAM, number, [0xFFFFFFFF] * 6) == wanted, number
        assert verdict(PROGRAM, number | 0x40000000) == KILL
    assert not conditional & set(confined.ALLOWED.values())


@pytest.mark.parametrize("architecture", [0x40000003, 0xC00000B7, 0, 0xC000003F])
def test_filter_kills_a_foreign_abi(architecture):
    assert verdict(PROGRAM, 0, architecture=architecture) == KILL


@pytest.mark.parametrize(
    ("number", "arguments", "wanted"),
    [
        (16, [1, 0x5401], ALLOW),
        (16, [1, 0x5412], EPERM),  # TIOCSTI
        (72, [1, 3], ALLOW),
        (72, [1, 8], EPERM),  # F_SETOWN
        (72, [1, 1031], EPERM),  # F_SETPIPE_SZ
        (234, [4321, 1, 6], ALLOW),
        (234, [4322, 1, 6], EPERM),
        (302, [0, 7], ALLOW),
        (302, [1, 7], EPERM),
        (56, [0x3D0F00], ALLOW),  # what pthread_create passes
        (56, [17], EPERM),  # fork
        (56, [0x4111], EPERM),  # vfork
        (56, [0x3D0F00 | 0x10000000], EPERM),
        (56, [0x3D0F00 | 0x20000], EPERM),
        (56, [0x3D0F00 | 0x80], EPERM),
    ],
)
def test_filter_arguments(number, arguments, wanted):
    assert verdict(PROGRAM, number, arguments) == wanted


@pytest.mark.parametrize(
    "number",
    [
        41,
        42,
        49,
        50,
        53,
        57,
        58,
        59,
        62,
        101,
        157,
        165,
        175,
        200,
        250,
        272,
        298,
        308,
        310,
        319,
        321,
        322,
        323,
        425,
        426,
        434,
    ],
)
def test_filter_denies_what_escapes_use(number):
    """socket, connect, bind, listen, socketpair, fork, vfork, execve, kill, ptrace, prctl, mount, … io_uring, pidfd_open."""
    assert verdict(PROGRAM, number) == EPERM


def test_filter_encoding():
    assert confined.encoded([(0x20, 0, 0, 4), (0x15, 1, 2, 0xC000003E)]) == bytes.fromhex(
        "2000000004000000150001023e0000c0"
    )
    assert len(PROGRAM) < 4096 and all(jump < 256 for _, yes, no, _ in PROGRAM for jump in (yes, no))


# --- values and frames -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, True, False, 0, -7, 2**200, 0.1, -0.0, math.inf, 1e-320, 1 + 2j, "", "é\n\"\\\ud800", b"\x00\xff", [], (1, (2,)),
     {1: "a", "b": [None]}, {1, "x"}, frozenset({(1, 2)}), [[[[1]]]]],
)  # fmt: skip
def test_values_round_trip(value):
    back = loads(dumps(value))
    assert back == value and repr(back) == repr(value)


class Sly(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value", [Sly(3), object(), [Sly(3)], {Sly(1): 2}, deep(100), 1 << MAX_INTEGER_BITS, print], ids=range(7)
)
def test_other_values_are_not_written(value):
    with pytest.raises(NotPlainError):
        dumps(value)


@pytest.mark.parametrize(
    "text",
    ["", "1", "1.5", "NaN", '"a"', "{}", "[]", '["i"]', '["i", 3]', '["i", "0x1", "2"]', '["x", "1"]', '["u", "ff"]',
     '["l", "ab"]', '["d", [[1]]]', '["s", [["l", []]]]', "[" * 100_000, '["l",[' * 1000, '["i", "0x' + "f" * 200_000 + '"]',
     '["f", "xyz"]', '["c", "0"]'],
    ids=range(20),
)  # fmt: skip
def test_other_texts_are_no_values(text):
    with pytest.raises(NotPlainError):
        loads(text)


def test_keys_that_collide_are_refused_in_time():
    prime = 2**61 - 1
    text = '["s",[' + ",".join(f'["i","{k * prime:#x}"]' for k in range(20_000)) + "]]"
    start = time.process_time()
    with pytest.raises(NotPlainError):
        loads(text)
    assert time.process_time() - start < 1.0


def test_frames():
    nonce, payload = b"n" * 16, dumps(7).encode()
    good = struct.pack(">I", len(payload)) + nonce + payload
    assert framed(good, nonce) == 7
    for bad in (
        b"",
        good[:-1],
        good + b" ",
        good + good,
        good[:10],
        good.replace(nonce, b"m" * 16),
        b"\0\0\0\0" + nonce,
    ):
        with pytest.raises(NotPlainError):
            framed(bad, nonce)
    answer = struct.pack(">BiIII", 0, -9, 1, 2, 3) + b"abbccc"
    assert unpacked(answer) == ("ended", -9, "a", "bb", b"ccc")
    for bad in (b"", answer[:-1], answer + b"x", b"\x09" + answer[1:]):
        with pytest.raises(SupervisorLostError):
            unpacked(bad)


# --- programs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIER)
@pytest.mark.parametrize(
    ("source", "stdin", "status", "stdout"),
    [
        ("print(sum(map(int, input().split())))", "3 4", "ok", "7\n"),
        ("import sys; print(len(sys.stdin.read()))", "x" * 300_000, "ok", "300000\n"),
        ("import threading\nt = threading.Thread(target=lambda: print(1)); t.start()", "", "ok", "1\n"),
        ("import atexit; atexit.register(lambda: print(2)); print(1)", "", "ok", "1\n2\n"),
        (
            "import random, math, collections, itertools, decimal, heapq, re, string, functools; print(1)",
            "",
            "ok",
            "1\n",
        ),
        (
            "open('a', 'w').write('x'); import os; os.mkdir('b'); print(open('a').read(), os.listdir('.'))",
            "",
            "ok",
            None,
        ),
        ("print(hash('a'))\nimport sys; sys.exit()", "", "ok", None),
        ("print(1); raise SystemExit(3)", "", "error", "1\n"),
        ("print(1); 1 / 0", "", "error", "1\n"),
        ("x = (", "", "error", ""),
        ("while True: pass", "", "timeout", ""),
        ("while True: print('x' * 9999)", "", "output", None),
        ("x = bytearray(10 ** 9)", "", "error", ""),
        ("import os; os.abort()", "", "error", ""),
    ],
)
def test_programs(tier, source, stdin, status, stdout):
    with open_sandbox(tier, source, Limits(timeout_s=1.0)) as box:
        outcome = box.run(Request(stdin))
    assert outcome.status == status, outcome
    assert stdout is None or outcome.stdout == stdout


@pytest.mark.parametrize("tier", TIER)
def test_time_of_all_tests_is_limited(tier):
    start = time.monotonic()
    with open_sandbox(tier, "while True: pass", Limits(timeout_s=0.3, total_s=0.8)) as box:
        assert [box.run(Request()).status for _ in range(20)] == ["timeout"] * 20
    assert time.monotonic() - start < 3.0


# --- remote ------------------------------------------------------------------------------------------------------

GOOD = {"run": {"stdout": "7\n", "code": 0, "signal": None}}


class Service(socketserver.ThreadingTCPServer):
    """Answers every POST as `reply` says: bytes to send, or an object to send as JSON; `seen` keeps bodies."""

    allow_reuse_address = daemon_threads = True
    reply: object = GOOD
    drip_s = 0.0

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.seen = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/api/v2/execute"


class Answer(socketserver.StreamRequestHandler):
    def handle(self):
        size = 0
        while (line := self.rfile.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                size = int(line.split(b":")[1])
        self.server.seen.append(json.loads(self.rfile.read(size)))
        reply = self.server.reply
        if not isinstance(reply, bytes):
            body = json.dumps(reply(self.server.seen[-1]) if callable(reply) else reply).encode()
            reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        try:
            for place in range(0, len(reply), 1 if self.server.drip_s else 1 << 20):
                self.wfile.write(reply[place : place + (1 if self.server.drip_s else 1 << 20)])
                time.sleep(self.server.drip_s)
        except OSError:
            pass


@pytest.fixture
def service():
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_remote_program(service):
    assert "tier remote" in probe("remote", url=service.url)
    body = service.seen[0]
    assert body["stdin"] == "3 4\n" and body["language"] == "python" and "sum(map" in body["files"][0]["content"]


@pytest.mark.parametrize(
    ("run", "status"),
    [
        ({"stdout": "7", "code": 1, "signal": None}, "error"),
        ({"stdout": "7", "code": None, "signal": "SIGKILL"}, "timeout"),
        ({"stdout": "7", "code": None, "signal": "SIGSEGV"}, "error"),
        ({"stdout": "7", "code": 0, "signal": None}, "ok"),
    ],
)
def test_remote_outcomes(service, run, status):
    service.reply = {"run": run}
    with open_sandbox("remote", "print(7)", url=service.url) as box:
        assert box.run(Request()).status == status


@pytest.mark.parametrize(
    "reply",
    [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 503 busy\r\n\r\n" + json.dumps(GOOD).encode(), b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n[1]",
     b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, {}, {"run": None},
     {"run": {"code": 0}}, {"run": {"stdout": 7, "code": 0}}, {"message": "out of memory"}],
)  # fmt: skip
def test_an_outage_is_a_fault(service, reply):
    service.reply = reply
    with open_sandbox("remote", "print(7)", url=service.url) as box, pytest.raises(SandboxError, match="tier remote"):
        box.run(Request())


def test_no_service_is_a_fault():
    with socket.socket() as held:  # bound and not listening: nobody else answers there
        held.bind(("127.0.0.1", 0))
        with pytest.raises(SandboxError, match="ConnectionRefusedError"):
            probe("remote", url=f"http://127.0.0.1:{held.getsockname()[1]}/")


def test_a_slow_answer_and_a_large_one_are_faults(service):
    service.drip_s = 0.02
    start = time.monotonic()
    with pytest.raises(SandboxError, match="in time|timed out"):
        post(service.url, b"{}", {}, 0.3, 10**6)
    assert time.monotonic() - start < 1.0
    service.drip_s, service.reply = 0.0, b"x" * 3_000_000
    with pytest.raises(SandboxError, match="more than 1000000 bytes"):
        post(service.url, b"{}", {}, 5.0, 10**6)


def run_here(body):
    """A service that is honest: runs the program in the tier `process`."""
    with open_sandbox("process", body["files"][0]["content"]) as box:
        outcome = box.run(Request(body["stdin"]))
    return {"run": {"stdout": outcome.stdout, "code": 0 if outcome.status == "ok" else 1, "signal": None}}


@pytest.mark.parametrize(
    ("source", "status", "value"),
    [
        ("def f(x): return (x, 'é')", "ok", (3, "é")),
        ("class Solution:\n    def f(self, x): return x + 1", "ok", 4),
        ("print('noise')\ndef f(x): return x", "ok", 3),
        ("def f(x):\n    class A(int): pass\n    return A(3)", "error", None),
        ("import os\nos._exit(0)", "forged", None),
    ],
)
def test_remote_calls(service, source, status, value):
    service.reply = run_here
    with open_sandbox("remote", source, url=service.url) as box:
        outcome = box.run(Request(call=["call", "f", [["i", "0x3"]], []]))
    assert (outcome.status, outcome.value) == (status, value)
    assert "expected" not in json.dumps(service.seen)


# --- layers at work ----------------------------------------------------------------------------------------------

REACHED = """
import os, signal, socket
def fork():
    if os.fork() == 0: os._exit(0)
tries = dict(fork=fork, kill=lambda: os.kill(os.getppid(), 0), socket=lambda: socket.socket().close(),
             memfd=lambda: os.memfd_create("x"), exec=lambda: os.execv("/nowhere", ["x"]), session=lambda: os.setpgid(0, 0),
             passwd=lambda: open("/etc/passwd").close(), proc=lambda: open("/proc/self/environ").close(),
             program=lambda: open("/bin/sh", "rb").close())
for name, act in tries.items():
    try: act()
    except PermissionError: continue
    except OSError: pass
    print(name)
"""


@pytest.mark.parametrize(
    ("tier", "missing"),
    [
        ("process", set()),
        ("confined", {"fork", "kill", "socket", "memfd", "exec", "session", "passwd", "proc", "program"}),
        ("bubblewrap", {"fork", "kill", "socket", "memfd", "exec", "session"}),
    ],
)
def test_what_a_test_reaches(tier, missing):
    if MISSING[tier]:
        pytest.skip(MISSING[tier])
    with open_sandbox(tier, REACHED) as box:
        outcome = box.run(Request())
    every = {"fork", "kill", "socket", "memfd", "exec", "session", "passwd", "proc", "program"}
    reached = set(outcome.stdout.split())
    assert outcome.status == "ok" and not reached & missing
    assert tier != "process" or reached >= every - {"session"}  # the same program does reach them without layers
