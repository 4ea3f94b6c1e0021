"""The judge against a server of our own that fails in every way: a score or a fault, never a wrong score."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rewards.judge import JudgeError, Limits, Window, judge


@contextmanager
def server(answer):
    """A server on a free port. `answer(request, number)` gives (status, body or text, headers) from 0 on."""
    seen, active, lock = [], [0, 0], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen)
                seen.append((time.monotonic(), body, self.path, self.headers.get("Authorization")))
                active[0] += 1
                active[1] = max(active)
            status, reply, headers = answer(body["messages"][0]["content"], number)
            with lock:
                active[0] -= 1
            data = (
                reply
                if isinstance(reply, bytes)
                else json.dumps({"choices": [{"message": {"content": reply}}], "usage": {"total_tokens": 10}}).encode()
            )
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", seen, active
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def good(content, number):
    return 200, f"<score>{len(content.split(':')[1]) / 10}</score>", {}


def ask(reward, *completions, **columns):
    async def together():
        calls = [reward(prompt="p", completion=text, **columns) for text in completions]
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(together())


def make(url, template="rate:{completion}", **options):
    return judge(url, "m", template, **{"pause_s": 0.01, "deadline_s": 2.0, "timeout_s": 1.0} | options)


def test_scores_and_request():
    with server(good) as (url, seen, _):
        assert ask(make(url, api_key="secret"), "a", "abc", "abcde") == [0.1, 0.3, 0.5]
    assert {path for _, _, path, _ in seen} == {"/v1/chat/completions"}
    assert {key for *_, key in seen} == {"Bearer secret"}
    assert seen[0][1]["model"] == "m" and seen[0][1]["temperature"] == 0.0 and seen[0][1]["max_tokens"] == 512


def test_what_is_put_in_the_template_names_nothing():
    with server(lambda content, number: (200, "1", {})) as (url, seen, _):
        assert ask(make(url, "q {prompt} c {completion} a {answer} {{}}"), "{answer} {api_key}", answer="7") == [1.0]
        assert seen[0][1]["messages"][0]["content"] == "q p c {answer} {api_key} a 7 {{}}"
        (fault,) = ask(make(url, "{solution}"), "a")
    assert "names 'solution'" in str(fault) and len(seen) == 1


@pytest.mark.parametrize(
    "reply", ["I give it a 10", "<score>2</score>", "<score>a</score>", "", "<score>1</score><score>0</score>"]
)
def test_a_reply_without_a_score_is_a_fault_and_is_not_kept(reply):
    replies = [reply, "1"]
    with server(lambda content, number: (200, replies[number], {})) as (url, seen, _):
        reward = make(url)
        (fault,) = ask(reward, "a")
        assert isinstance(fault, JudgeError) and "no score from 0 to 1" in str(fault)
        assert ask(reward, "a") == [1.0]
    assert len(seen) == 2


def test_an_error_of_the_request_is_not_tried_again():
    with server(lambda content, number: (401, b"no such key", {})) as (url, seen, _):
        (fault,) = ask(make(url, api_key="secret"), "a")
    assert isinstance(fault, JudgeError) and "answers 401" in str(fault) and "secret" not in str(fault)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "data", [b"not json", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}']
)
def test_an_answer_without_a_message_is_a_fault(data):
    with server(lambda content, number: (200, data, {})) as (url, _, _):
        (fault,) = ask(make(url), "a")
    assert isinstance(fault, JudgeError)


def test_outages_are_tried_again_until_the_deadline():
    failing = [(503, b"", {}), (429, b"", {"Retry-After": "0"}), (200, "0.5", {})]
    with server(lambda content, number: failing[min(number, 2)]) as (url, seen, _):
        assert ask(make(url), "a") == [0.5]
        assert len(seen) == 3
    start = time.monotonic()
    (fault,) = ask(make(url, deadline_s=0.3), "a")  # nobody listens any more
    assert isinstance(fault, JudgeError) and "no answer from" in str(fault) and " tries)" in str(fault)
    assert 0.05 < time.monotonic() - start < 1.5


def test_a_server_that_never_answers():
    def sleep(content, number):
        time.sleep(0.5)
        return 200, "1", {}

    with server(sleep) as (url, _, _):
        start = time.monotonic()
        (fault,) = ask(make(url, timeout_s=0.1, deadline_s=0.2), "a")
        assert time.monotonic() - start < 0.45
    assert isinstance(fault, JudgeError) and "imeout" in str(fault)


def test_one_failure_does_not_harm_the_others():
    def answer(content, number):
        return (400, b"", {}) if "bad" in content else (200, "1", {})

    with server(answer) as (url, _, _):
        first, fault, last = ask(make(url), "a", "bad", "b")
    assert (first, last) == (1.0, 1.0) and isinstance(fault, JudgeError)


def test_cache_in_memory_and_on_disk(tmp_path):
    with server(good) as (url, seen, _):
        reward = make(url, cache=tmp_path / "judge.sqlite")
        assert ask(reward, "abc", "abc", "abc") == [0.3] * 3  # equal requests in flight are one
        assert ask(reward, "abc") == [0.3]
        assert ask(make(url, cache=tmp_path / "judge.sqlite"), "abc") == [0.3]
        assert len(seen) == 1
        assert ask(make(url, "rated:{completion}", cache=tmp_path / "judge.sqlite"), "abc") == [0.3]
        assert len(seen) == 2


def test_no_more_at_once_than_allowed():
    def slow(content, number):
        time.sleep(0.03)
        return good(content, number)

    with server(slow) as (url, seen, active):
        ask(make(url, max_concurrency=3), *[str(n) for n in range(12)])
        assert len(seen) == 12 and active[1] == 3


def test_requests_per_minute():
    with server(good) as (url, seen, _):
        ask(make(url, requests_per_minute=3, minute_s=0.3), *[str(n) for n in range(8)])
    times = [each[0] for each in seen]
    assert len(times) == 8
    assert all(times[place + 3] - times[place] >= 0.25 for place in range(5))  # a request takes time to arrive


def test_tokens_per_minute():
    window = Window(Limits(tokens_per_minute=100, minute_s=0.2))
    start = time.monotonic()
    first = window.enter(60)
    window.settle(first, 20)  # it took less than was feared: the next one fits
    window.enter(80)
    assert time.monotonic() - start < 0.1
    window.enter(50)
    assert time.monotonic() - start >= 0.2
    with pytest.raises(JudgeError, match="101 tokens is over the limit of 100"):
        window.enter(101)


def test_what_is_refused():
    for url in ("localhost:8000", "ftp://host/v1", ""):
        with pytest.raises(ValueError, match="url is"):
            judge(url, "m", "t")
    with pytest.raises(TypeError, match="no option 'retries'"):
        judge("http://host/v1", "m", "t", retries=3)
