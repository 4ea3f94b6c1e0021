"""A fake `vllm serve` on loopback: the routes of vLLM 0.26 that we use, strict about what it is sent, with faults.

The model behind it is any function `logits(token_ids, adapter_path | None) -> list[float]`; `toy_logits` is a table.
A token is drawn by inverting the CDF at a uniform of (seed, position), so that a test can redo it.
"""

import json
import math
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REQUEST_FIELDS = {"request_id", "token_ids", "sampling_params", "model", "stream", "cache_salt", "priority"}
SAMPLING_FIELDS = {
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "ignore_eos", "max_tokens", "logprobs",
    "prompt_logprobs", "detokenize",
}  # fmt: skip
NUM_TOKENS = 11
EOS_OF_MODEL = 2  # in the generation config of the served model: it stops there too, unless `ignore_eos`


def toy_logits(token_ids, adapter_path):
    """[NUM_TOKENS] numbers of the last two tokens, and of the adapter's path."""
    last = tuple(token_ids[-2:]) + ((Path(adapter_path).name[-6:],) if adapter_path else ())
    noise = random.Random(repr(last))
    return [2.0 * noise.gauss(0, 1) for _ in range(NUM_TOKENS)]


def log_softmax(values):
    top = max(values)
    total = top + math.log(sum(math.exp(value - top) for value in values))
    return [value - total for value in values]


def processed(logits, params):
    """Log-probs after temperature, top-k and top-p; −inf outside."""
    temperature = params["temperature"] or 1.0
    values = log_softmax([value / temperature for value in logits])
    order = sorted(range(len(values)), key=lambda token: -values[token])
    if params.get("top_k", 0) > 0:
        order = order[: params["top_k"]]
    kept, mass = [], 0.0
    total = sum(math.exp(values[token]) for token in order)
    for token in order:
        if mass >= params.get("top_p", 1.0):
            break
        kept.append(token)
        mass += math.exp(values[token]) / total
    norm = math.log(sum(math.exp(values[token]) for token in kept))
    return [values[token] - norm if token in kept else -math.inf for token in range(len(values))]


def draw(seed, position, logprobs):
    target, mass = random.Random(f"{seed}/{position}").random(), 0.0
    for token, value in enumerate(logprobs):
        mass += math.exp(value)
        if target < mass:
            return token
    return max(range(len(logprobs)), key=lambda token: logprobs[token])


def sample(logits, prompt, params, adapter_path=None, raw=False):
    """(token ids, log-probs, finish reason) as vLLM would answer."""
    ids, found = [], []
    stops = set(params.get("stop_token_ids") or ()) | (set() if params.get("ignore_eos") else {EOS_OF_MODEL})
    while len(ids) < params.get("max_tokens", 16):
        here = logits(prompt + ids, adapter_path)
        after = processed(here, params)
        if params["temperature"] == 0:
            token = max(range(len(here)), key=lambda token: here[token])
        else:
            token = draw(params["seed"], len(ids), after)
        ids.append(token)
        found.append((log_softmax(here) if raw else after)[token])
        if token in stops:
            return ids, found, "stop"
    return ids, found, "length"


class FakeServer:
    """`faults` are switched by tests:

    hook(body, index) -> None, or what to do instead of an honest answer: ("status", code, text), ("bytes", raw),
    ("die",) close every connection and stop listening, ("drop",) close this connection, ("sleep", seconds) answer late,
    ("edit", function of the answer). `index` counts this server's generate requests from 0.
    """

    def __init__(self, logits=toy_logits, *, model="tiny", port=0, hook=None, raw=False, runtime_lora=True, **more):
        self.logits, self.model, self.hook, self.raw, self.runtime_lora = logits, model, hook, raw, runtime_lora
        self.version, self.max_model_len = more.get("version", "0.26.0"), more.get("max_model_len", 4096)
        self.refuse_adapters, self.served_as = more.get("refuse_adapters"), more.get("served_as")
        self.adapters, self.requests, self.control = {}, [], []
        self.lock = threading.Lock()
        self.active, self.most_active, self.statuses = 0, 0, Counter()
        self.dead = False
        self.http = HTTP(("127.0.0.1", port), Handler)
        self.http.fake = self
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def stop(self):
        if not self.dead:
            self.dead = True
            self.http.shutdown()
            self.http.server_close()

    def die(self):
        """From inside a request: no more connections, and those that are open get no answer."""
        self.dead = True
        self.http.socket.close()
        threading.Thread(target=self.http.shutdown, daemon=True).start()

    # --- routes ---

    def get(self, path):
        if path == "/health":
            return 200, b""
        if path == "/version":
            return 200, {"version": self.version}
        if path == "/v1/models":
            base = {"id": self.served_as or self.model, "root": self.model, "parent": None}
            cards = [base | {"max_model_len": self.max_model_len}]
            cards += [{"id": name, "root": root, "parent": base["id"]} for name, root in self.adapters.items()]
            return 200, {"object": "list", "data": cards}
        return 404, {"detail": "Not Found"}

    def post(self, path, body):
        if path == "/inference/v1/generate":
            return self.generate(body)
        if path == "/v1/load_lora_adapter" and self.runtime_lora:
            return self.load(body)
        if path == "/v1/unload_lora_adapter" and self.runtime_lora:
            known = self.adapters.pop(body["lora_name"], None)
            return (200, b"Success") if known else error(404, "NotFoundError", "cannot be found")
        return 404, {"detail": "Not Found"}

    def load(self, body):
        unknown = set(body) - {"lora_name", "lora_path", "load_inplace"}
        name, path = body.get("lora_name"), body.get("lora_path")
        if unknown or not name or not path:
            return error(400, "InvalidUserInput", f"Both 'lora_name' and 'lora_path' must be provided. {unknown}")
        if body.get("load_inplace") or name in self.adapters:
            return error(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded.")
        if self.refuse_adapters:
            return error(500, "InternalServerError", self.refuse_adapters)
        if not (Path(path) / "adapter_config.json").exists():
            return error(404, "NotFoundError", f"no adapter at {path}")
        self.adapters[name] = path
        return 200, b"Success: LoRA adapter added successfully."

    def generate(self, body):
        params = body.get("sampling_params")
        unknown = set(body) - REQUEST_FIELDS | (set(params) - SAMPLING_FIELDS)
        ids = body.get("token_ids")
        if unknown or not ids or any(type(token) is not int or token < 0 for token in ids):
            return error(400, "Bad Request", f"validation error: {sorted(unknown)} {ids}")
        model = body.get("model")
        if model not in (None, self.model, self.served_as, *self.adapters):
            return error(404, "NotFoundError", f"The model `{model}` does not exist.")
        if len(ids) >= self.max_model_len:
            return error(400, "BadRequestError", "longer than the maximum model length")
        params = {"temperature": 1.0, "seed": random.getrandbits(60), **params}
        path = self.adapters.get(model)
        tokens, found, reason = sample(self.logits, ids, params, path, self.raw)
        choice = {"index": 0, "logprobs": None, "finish_reason": reason, "token_ids": tokens, "routed_experts": None}
        if params.get("logprobs") is not None:
            content = [
                {"token": f"token_id:{token}", "logprob": max(value, -9999.0), "bytes": None, "top_logprobs": []}
                for token, value in zip(tokens, found, strict=True)
            ]
            choice["logprobs"] = {"content": content}
        answer = {"request_id": "x", "model": model, "created": 1, "choices": [choice], "prompt_logprobs": None}
        if params.get("prompt_logprobs") is not None:
            rows = [log_softmax(self.logits(ids[:place], path)) for place in range(1, len(ids))]
            answer["prompt_logprobs"] = [None] + [
                {str(token): {"logprob": row[token], "rank": 1, "decoded_token": None}}
                for token, row in zip(ids[1:], rows, strict=True)
            ]
        return 200, answer


class HTTP(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    counted = False  # in `active`

    @property
    def fake(self):
        return self.server.fake

    def do_GET(self):
        if self.fake.dead:
            self.close_connection = True
        else:
            self.answer(*self.fake.get(self.path))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Content-Type"] == "application/json"
        fake = self.fake
        if self.path != "/inference/v1/generate":
            with fake.lock:
                fake.control.append((self.path, body))
                status, answer = fake.post(self.path, body)
            self.answer(status, answer)
            return
        with fake.lock:
            index = len(fake.requests)
            fake.requests.append(body)
            fake.active += 1
            self.counted = True
            fake.most_active = max(fake.most_active, fake.active)
        try:
            self.faulty(body, (fake.hook(body, index) if fake.hook else None) or ("honest",))
        finally:
            self.leave()

    def leave(self):
        """No longer active: before the answer goes out, since the client may have sent its next request after that."""
        with self.fake.lock:
            self.fake.active -= self.counted
            self.counted = False

    def faulty(self, body, fault):
        kind, *more = fault
        if kind == "die":
            self.fake.die()
        if kind == "sleep":
            time.sleep(more[0])
        if kind in ("die", "drop") or self.fake.dead:
            self.close_connection = True
        elif kind == "status":
            self.answer(*error(more[0], "Fault", more[1]))
        elif kind == "bytes":
            self.answer(200, more[0])
        else:
            status, answer = self.fake.post(self.path, body)
            self.answer(status, more[0](answer) if kind == "edit" else answer)

    def answer(self, status, body):
        self.fake.statuses[status] += 1
        data = body if isinstance(body, bytes) else json.dumps(body, allow_nan=False).encode()
        self.leave()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client has gone: it broke the request off
            self.close_connection = True


def error(status, kind, message):
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}
