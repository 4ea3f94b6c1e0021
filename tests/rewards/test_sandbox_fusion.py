"""The service `sandboxfusion` of the tier `remote`, against a small loopback server that speaks its documented API.

POST /run_code {code, language, run_timeout (s), stdin} → {status, message, run_result: {status, execution_time,
return_code, stdout, stderr}}. The server runs the program in the tier `process`; a real service was not at hand.
"""

import http.server
import json
import threading
import time

import pytest

from rewards.code import code_tests
from rewards.sandbox import Limits, Request, SandboxError, open_sandbox, probe

TESTS = {"inputs": ["3 4", "1 2", "0 0"], "outputs": ["7", "3", "0"]}
CALLS = [{"function": "f", "args": [3], "expected": [4, 3]}, {"function": "f", "args": [-1], "expected": [0, -1]}]


def fenced(source):
    return f"```python\n{source}\n```"


class RunCode(http.server.BaseHTTPRequestHandler):
    """The endpoint, with the request checked as the service's schema has it."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        known = {"code": str, "language": str, "run_timeout": (int, float), "stdin": str}
        wrong = [name for name, value in body.items() if not isinstance(value, known.get(name, ()))]
        if self.path != "/run_code" or wrong or body.get("language") != "python":
            return self.reply(422, {"detail": f"no such request: {wrong}"})
        return self.reply(self.server.code, self.server.forced or self.ran(body))

    def ran(self, body):
        limits = Limits(timeout_s=body["run_timeout"], total_s=30.0)
        start = time.monotonic()
        with open_sandbox("process", body["code"], limits) as box:
            outcome = box.run(Request(body["stdin"]))
        late = outcome.status == "timeout"
        result = {
            "status": "TimeLimitExceeded" if late else "Finished",
            "execution_time": time.monotonic() - start,
            "return_code": None if late else int(outcome.status != "ok"),
            "stdout": outcome.stdout,
            "stderr": outcome.detail,
        }
        done = result["return_code"] == 0
        return {"status": "Success" if done else "Failed", "message": "", "compile_result": None, "run_result": result}

    def reply(self, code, value):
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def service():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RunCode) as server:
        server.seen, server.forced, server.code = [], None, 200
        server.url = f"http://127.0.0.1:{server.server_address[1]}/run_code"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def reward(service, **options):
    return code_tests("remote", url=service.url, service="sandboxfusion", headers={"X-Token": "t0k"}, **options)


def test_programs_and_calls_score(service):
    judge = reward(service)
    assert judge(fenced("a, b = map(int, input().split())\nprint(a + b)"), TESTS) == 1.0
    assert judge(fenced("a, b = map(int, input().split())\nprint(a * b)"), TESTS) == pytest.approx(1 / 3)
    assert judge(fenced("def f(x): return [x + 1, x]"), CALLS) == 1.0
    assert judge(fenced("def f(x): return [4, 3]"), CALLS) == 0.5
    assert judge(fenced("raise SystemExit(0)"), TESTS) == 0.0
    assert judge(fenced("import os\nprint('7'); os._exit(1)"), {"inputs": ["3 4"], "outputs": ["7"]}) == 0.0


def test_what_is_sent(service):
    reward(service, limits={"timeout_s": 2.5})(fenced("print(input())"), {"inputs": ["in"], "outputs": ["secret"]})
    path, headers, body = service.seen[-1]
    assert path == "/run_code" and headers["X-Token"] == "t0k"
    assert body == {"language": "python", "code": "print(input())\n", "stdin": "in", "run_timeout": 2.5}
    assert "secret" not in json.dumps([each for *_, each in service.seen])


def test_time_limit(service):
    start = time.monotonic()
    logged = {}
    judge = reward(service, limits={"timeout_s": 0.3})
    assert judge(fenced("while True: pass"), TESTS, log_metric=logged.__setitem__) == 0.0
    assert logged["timed_out"] == 1.0 and time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("code", "forced", "text"),
    [
        (200, {"status": "SandboxError", "message": "no room", "run_result": None}, "reports 'SandboxError'"),
        (200, {"status": "Failed", "run_result": {"status": "Error", "return_code": None, "stdout": ""}}, "reports 'Error'"),
        (200, {"status": "Success"}, "another form"),
        (200, {"status": "Success", "run_result": {"status": "Finished", "return_code": 0, "stdout": None}}, "another form"),
        (503, {"status": "Success"}, "answered 503"),
    ],
)  # fmt: skip
def test_an_outage_is_a_fault_and_no_zero(service, code, forced, text):
    judge = reward(service)
    service.code, service.forced = code, forced
    with pytest.raises(SandboxError, match=text):
        judge(fenced("print(7)"), TESTS)


def test_the_probe_refuses_another_api(service):
    with pytest.raises(SandboxError, match="answered 422"):
        probe("remote", url=service.url + "/other", service="sandboxfusion")
    with pytest.raises(SandboxError, match="answered 422"):
        probe("remote", url=service.url, service="piston")
    with pytest.raises(SandboxError, match="want one of piston, sandboxfusion"):
        probe("remote", url=service.url, service="e2b")
