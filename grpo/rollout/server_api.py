"""What is said to `vllm serve` and read from it: the JSON of vLLM 0.26's routes, and the checks at start.

    GET /health, /version, /v1/models
    POST /v1/load_lora_adapter {lora_name, lora_path}, /v1/unload_lora_adapter {lora_name}
    POST /inference/v1/generate {model, token_ids, sampling_params} → {model, choices, prompt_logprobs}

Left out: the routes of VLLM_SERVER_DEV_MODE (they open a server to arbitrary calls), and streaming.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from grpo.errors import InputError, RunError, clip
from grpo.rollout.completions import MISSING, Answer, checked
from grpo.rollout.engine import Sampling
from grpo.rollout.server_client import Reply, Server, UnreachableError

TESTED = "0.26.0"
COMMAND = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank R "
    "--logprobs-mode processed_logprobs"
)
_EXACT = 1e-4  # processed log-prob of the only token that top_k = 1 leaves, against 0

# --- requests and answers --------------------------------------------------------------------------------------------

Reader = Callable[[dict[str, Any], dict[str, Any]], Any]  # (answer, request) -> what was asked for


def sampling_parameters(sampling: Sampling, seed: int) -> dict[str, Any]:
    """`ignore_eos`: it stops at our stop tokens alone, whatever the model's generation config adds to them."""
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_completion_length,
        "seed": seed,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,
        "logprobs": 0,
    }


def payload_of(reply: Reply) -> dict[str, Any]:
    """The JSON object of a reply. Raises UnreachableError where it is none: another attempt may help."""
    try:
        payload = reply.json()
    except ValueError:
        payload = None
    if not isinstance(payload, dict):
        raise UnreachableError(f"an answer that is no JSON object: {clipped(reply)}")
    return payload


def check_model(payload: dict[str, Any], body: dict[str, Any]) -> None:
    """Raises RunError where another model or adapter answered than the one asked."""
    if payload["model"] != body["model"]:
        raise RunError(f"answered with {clip(payload['model'], 60)} (asked for {body['model']})")


def read_answer(payload: dict[str, Any], body: dict[str, Any], sampling: Sampling) -> Answer:
    """`choices`: one {token_ids, logprobs: {"content": [{"logprob", …}]}, finish_reason}."""
    (choice,) = payload["choices"]
    content = (choice["logprobs"] or {}).get("content") or []
    logprobs = [entry["logprob"] for entry in content]
    return checked((choice["token_ids"] or [], logprobs, choice["finish_reason"]), sampling)


def read_prompt_logprobs(payload: dict[str, Any], body: dict[str, Any]) -> list[float]:
    """`prompt_logprobs`: one {token id: {"logprob", …}} per token of the prompt, null for the first."""
    rows = payload["prompt_logprobs"][1:]
    found = [row[str(token)]["logprob"] for row, token in zip(rows, body["token_ids"][1:], strict=True)]
    return [math.nan if value <= MISSING else float(value) for value in found]


def clipped(reply: Reply) -> str:
    """The beginning of a reply, on one line."""
    return clip(reply.body[:400].decode(errors="replace"), 120)


def generate_body(model: str, token_ids: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
    """Body of POST /inference/v1/generate. `max_tokens` must be in `sampling`: without it vLLM picks a length."""
    return {"model": model, "token_ids": token_ids, "sampling_params": {"detokenize": False, **sampling}}


def refused(server: Server, what: str, reply: Reply) -> RunError:
    """One line for an answer that a repetition would not change."""
    return RunError(f"server {server.url} refused {what}: {reply}")


# --- what is checked before a server is used -------------------------------------------------------------------------


def check_server(server: Server, model_name: str, say: Callable[[str], None]) -> None:
    """Everything that can be seen from outside; sets `server.max_length`.

    Raises:
        InputError: it is not healthy, serves another model, or lacks what an adapter and its log-probs need.
        UnreachableError: it went away meanwhile.
    """
    if not server.is_healthy():
        raise InputError(f"rollout.servers: {server.url} does not answer /health (want a running: {COMMAND})")
    version = _json(server, "GET", "/version").get("version")
    if version != TESTED:
        say(f"warning: {server.url} is vLLM {clip(version, 40)}; {TESTED} is the version tested")
    base = _base_model(server, model_name)
    server.max_length = base.get("max_model_len")
    _check_adapters(server)
    _check_logprobs(server, str(base["id"]))


def _json(server: Server, method: str, path: str, body: Any = None) -> dict[str, Any]:
    reply = server.call(method, path, body)
    try:
        value = reply.json() if reply.status == 200 else None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"rollout.servers: {server.url}{path} is not vLLM's: {reply} (want: {COMMAND})")
    return value


def _base_model(server: Server, model_name: str) -> dict[str, Any]:
    cards = _json(server, "GET", "/v1/models").get("data") or []
    bases = [card for card in cards if not card.get("parent")]
    for card in bases:
        if model_name in (card.get("id"), card.get("root")):
            return card
    served = ", ".join(str(card.get("id")) for card in bases) or "nothing"
    raise InputError(
        f"rollout.servers: {server.url} serves {clip(served)} (want {clip(model_name)}: start it with that model, or "
        f"with --served-model-name {clip(model_name)})"
    )


def _check_adapters(server: Server) -> None:
    """An empty name is refused with 400 where the route exists; the route does not exist without the variable."""
    reply = server.call("POST", "/v1/load_lora_adapter", {"lora_name": "", "lora_path": ""})
    if reply.status in (404, 405):
        raise InputError(f"rollout.servers: {server.url} cannot load adapters while it runs (want: {COMMAND})")


def _check_logprobs(server: Server, base: str) -> None:
    """Under top_k = 1 one token is left: its log-prob is 0 after processing, and below 0 before it."""
    body = generate_body(base, [1], {"max_tokens": 1, "temperature": 1.0, "top_k": 1, "seed": 1, "logprobs": 0})
    reply = server.call("POST", "/inference/v1/generate", body)
    if reply.status != 200:
        raise InputError(f"rollout.servers: {server.url} cannot generate from token ids: {reply} (want: {COMMAND})")
    try:
        value = float(reply.json()["choices"][0]["logprobs"]["content"][0]["logprob"])
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"rollout.servers: {server.url} reports no log-probs: {reply} (want: {COMMAND})") from error
    if abs(value) > _EXACT:
        raise InputError(
            f"rollout.servers: {server.url} reports log-probs of another distribution than the one it samples from "
            f"(want --logprobs-mode processed_logprobs: {COMMAND})"
        )
