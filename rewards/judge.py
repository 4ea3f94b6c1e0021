"""A language model as judge, behind an OpenAI-compatible `POST <url>/chat/completions`.

    r = number in the reply to template(prompt, completion, answer, …)

An outage, a refusal or a reply without a number is a fault (an exception), never a score. Replies are cached, equal
requests in flight are asked once, and requests and tokens of the last minute stay below their limits.
Source: judges as rewards (arXiv 2306.05685); limits as providers state them.
Left out: proxies, redirects, streaming, and reading keys from the environment.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rewards.extract import xml_tag
from rewards.probes import plain_prompt

if TYPE_CHECKING:  # imported where they are used: `import rewards` stays fast
    from concurrent.futures import Future

_AGAIN = {408, 425, 429, 500, 502, 503, 504, 529}
MAX_REPLY = 4 << 20
CHARACTERS_PER_TOKEN = 3


class JudgeError(RuntimeError):
    """The judge gave no score: an outage, an error of the server, or a reply that cannot be read.

    >>> raise JudgeError("judge: no answer")
    Traceback (most recent call last):
    rewards.judge.JudgeError: judge: no answer
    """


def score_tag(reply: str) -> float | None:
    """The number in the one `<score>…</score>` of a reply, or the reply when it is a number alone.

    >>> score_tag("Good. <score>0.5</score>"), score_tag(" 1 "), score_tag("I give 10"), score_tag("<score>a</score>")
    (0.5, 1.0, None, None)
    """
    text = xml_tag(reply, "score") if "<score>" in reply else reply.strip()
    return float(text) if text and re.fullmatch(r"-?\d{1,6}(\.\d{1,9})?", text) else None


@dataclass(frozen=True)
class Limits:
    """Of the traffic: per-minute limits (None: none), requests at once, seconds of one request and of all tries.

    >>> Limits(requests_per_minute=60).max_concurrency
    8
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int = 8
    timeout_s: float = 60.0
    deadline_s: float = 300.0
    minute_s: float = field(default=60.0, repr=False)


class Window:
    """Requests and tokens of the last minute. `enter` waits until one more fits.

    >>> Window(Limits(tokens_per_minute=10)).enter(11)
    Traceback (most recent call last):
    rewards.judge.JudgeError: one request of 11 tokens is over the limit of 10 a minute
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._entries: deque[list[float]] = deque()  # [time, tokens], oldest first

    def enter(self, tokens: int) -> list[float]:
        """Wait for room, take it, and return the entry, whose tokens `settle` may correct."""
        most = self._limits.tokens_per_minute
        if most is not None and tokens > most:
            raise JudgeError(f"one request of {tokens} tokens is over the limit of {most} a minute")
        while True:
            with self._lock:
                wait = self._wait(tokens, time.monotonic())
                if wait <= 0:
                    self._entries.append([time.monotonic(), tokens])
                    return self._entries[-1]
            time.sleep(wait)

    def settle(self, entry: list[float], tokens: int) -> None:
        """What the request really took."""
        with self._lock:
            entry[1] = tokens

    def _wait(self, tokens: int, now: float) -> float:
        limits = self._limits
        while self._entries and self._entries[0][0] <= now - limits.minute_s:
            self._entries.popleft()
        count, used = len(self._entries), sum(entry[1] for entry in self._entries)
        full = limits.requests_per_minute is not None and count >= limits.requests_per_minute
        full = full or (count > 0 and limits.tokens_per_minute is not None and used + tokens > limits.tokens_per_minute)
        return self._entries[0][0] + limits.minute_s - now if full else 0.0


class Cache:
    """Replies by request: in memory, or in one SQLite file that outlives the run.

    >>> cache = Cache(None)
    >>> cache.put("key", "reply"); cache.get("key"), cache.get("other")
    ('reply', None)
    """

    def __init__(self, path: str | Path | None) -> None:
        import sqlite3

        self._lock = threading.Lock()
        self._file = sqlite3.connect(path or ":memory:", check_same_thread=False)
        self._file.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")

    def get(self, key: str) -> str | None:
        """The reply, or None."""
        with self._lock:
            row = self._file.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def put(self, key: str, reply: str) -> None:
        """Keep a reply."""
        with self._lock, self._file:
            self._file.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))


class Judge:
    """See `judge`, which makes one."""

    def __init__(self, url: str, model: str, template: str, options: dict[str, Any], limits: Limits) -> None:
        from concurrent.futures import ThreadPoolExecutor

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"judge: url is {url!r} (want http:// or https://, host and path up to /v1)")
        self.__name__ = options["name"]
        self._parts, self._model, self._template, self._options, self._limits = parts, model, template, options, limits
        self._window, self._cache = Window(limits), Cache(options["cache"])
        self._pool = ThreadPoolExecutor(limits.max_concurrency, thread_name_prefix="judge")
        self._lock = threading.Lock()
        self._running: dict[str, Future[str]] = {}

    async def __call__(self, prompt: Any, completion: str, **columns: Any) -> float:
        """The score of one completion; called together, many are asked at once."""
        import asyncio

        body = self._body(columns | {"prompt": plain_prompt(prompt), "completion": completion})
        reply = await asyncio.wrap_future(self._asked(body))
        return self._score(reply)

    def _score(self, reply: str) -> float:
        value = self._options["parse"](reply)
        low, high = self._options["range"]
        if value is None or not math.isfinite(value) or not low <= value <= high:
            raise JudgeError(f"{self.__name__}: no score from {low:g} to {high:g} in the reply {reply[-80:]!r}")
        return float(value)

    def _body(self, values: dict[str, Any]) -> str:
        def put(match: re.Match[str]) -> str:
            if match[1] not in values:
                raise JudgeError(f"{self.__name__}: the template names {match[1]!r}, which the row does not have")
            return str(values[match[1]])

        text = re.sub(r"\{([A-Za-z_]\w*)\}", put, self._template)  # in one pass: what is put in names nothing
        request = {"model": self._model, "messages": [{"role": "user", "content": text}]}
        request |= {"temperature": self._options["temperature"], "max_tokens": self._options["max_tokens"]}
        return json.dumps(request, sort_keys=True)

    def _asked(self, body: str) -> Future[str]:
        """The reply: from the cache, from an equal request under way, or from a new one."""
        from concurrent.futures import Future

        key = hashlib.sha256(f"{self._parts.geturl()}\n{body}".encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            if key in self._running:
                return self._running[key]
            future = Future[str]()
            if (known := self._cache.get(key)) is not None:
                future.set_result(known)
                return future
            self._running[key] = future
        self._pool.submit(self._fetch, key, body, future)
        return future

    def _fetch(self, key: str, body: str, future: Future[str]) -> None:
        try:
            reply = self._with_retries(body)
            self._score(reply)  # what cannot be read is not kept
            self._cache.put(key, reply)
        except BaseException as error:  # handed to whoever waits
            self._forget(key)
            future.set_exception(error)
        else:
            self._forget(key)
            future.set_result(reply)

    def _forget(self, key: str) -> None:
        with self._lock:
            self._running.pop(key, None)

    def _with_retries(self, body: str) -> str:
        """Tries until the deadline, with growing pauses; the wait for the limits does not count."""
        left, attempt = self._limits.deadline_s, 0
        while True:
            entry = self._window.enter(len(body) // CHARACTERS_PER_TOKEN + self._options["max_tokens"])
            start = time.monotonic()
            try:
                reply, tokens = self._request(body, max(0.01, min(self._limits.timeout_s, left)))
            except _AgainError as error:
                pause = max(error.after, min(30.0, self._options["pause_s"] * 2**attempt) * (0.5 + random.random()))
                left -= time.monotonic() - start + pause
                attempt += 1
                if left <= 0:
                    raise JudgeError(f"{self.__name__}: {error} ({attempt} tries)") from None
                time.sleep(pause)
            else:
                if tokens is not None:
                    self._window.settle(entry, tokens)
                return reply

    def _request(self, body: str, seconds: float) -> tuple[str, int | None]:
        import http.client

        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=seconds)
        headers = {"Content-Type": "application/json"}
        if self._options["api_key"]:
            headers["Authorization"] = f"Bearer {self._options['api_key']}"
        try:
            connection.request("POST", f"{self._parts.path.rstrip('/')}/chat/completions", body.encode(), headers)
            response = connection.getresponse()
            status, data = response.status, response.read(MAX_REPLY)
            after = response.getheader("Retry-After") or ""
        except (OSError, http.client.HTTPException) as error:
            raise _AgainError(f"no answer from {self._parts.netloc}: {type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if status in _AGAIN:
            raise _AgainError(f"{self._parts.netloc} answers {status}", float(after) if after.isdigit() else 0.0)
        if status != 200:
            raise JudgeError(f"{self.__name__}: {self._parts.netloc} answers {status}: {data[:200]!r}")
        return _read(data, self.__name__)


class _AgainError(Exception):
    """Worth another try, after so many seconds."""

    def __init__(self, text: str, after: float = 0.0) -> None:
        super().__init__(text)
        self.after = after


def _read(data: bytes, name: str) -> tuple[str, int | None]:
    try:
        answer = json.loads(data)
        reply = answer["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise JudgeError(f"{name}: the server's answer holds no message: {data[:200]!r}") from None
    if not isinstance(reply, str):
        raise JudgeError(f"{name}: the server's message has no text")
    usage = answer.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    return reply, tokens if isinstance(tokens, int) else None


def judge(
    url: str,
    model: str,
    template: str,
    *,
    parse: Callable[[str], float | None] = score_tag,
    range: tuple[float, float] = (0.0, 1.0),
    **options: Any,
) -> Judge:
    """A judge as an async reward, `f(completion, prompt, …)`.

    Args:
        url: up to `/v1`.
        model: its name there.
        template: what the judge reads, with {prompt}, {completion} and columns of the row in their places.
        parse: the score in a reply, or None where there is none.
        range: (lowest, highest) score; another one is a fault.
        options: name = "judge"; api_key; cache = None (memory) or a file; temperature = 0; max_tokens = 512; pause_s =
            0.5 before the second try; and the fields of `Limits`.

    Raises:
        TypeError, ValueError: an unknown option, or a url that is none.
        JudgeError: (when called) there is no score.

    >>> judge("http://localhost:8000/v1", "m", "Rate: {completion}. End with <score>0 to 1</score>.").__name__
    'judge'
    """
    known = {"name": "judge", "api_key": None, "cache": None, "temperature": 0.0, "max_tokens": 512, "pause_s": 0.5}
    limits = {key: options.pop(key) for key in list(options) if key in Limits.__dataclass_fields__}
    if unknown := sorted(options.keys() - known.keys()):
        raise TypeError(
            f"judge: no option {unknown[0]!r} (there are {', '.join([*known, *Limits.__dataclass_fields__])})"
        )
    return Judge(url, model, template, {**known, **options, "parse": parse, "range": range}, Limits(**limits))
