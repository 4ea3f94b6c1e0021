"""`server`: samples from one or more `vllm serve` processes over HTTP, on loopback or a private network.

Each server is started by the user, with the trainer's model and dtype (R ≥ `adapter.r`, one of 1, 8, 16, 32, …):

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank R \\
        --logprobs-mode processed_logprobs --dtype bfloat16

One API process each (no --api-server-count): an adapter is known to the process that loaded it. `adapter_dir` must be
the same folder, under the same path, for trainer and servers. Whoever reaches a server may load files into it.

A sync writes the adapter under a new name, loads it everywhere, then unloads the old one: servers key their prefix
cache by the name, so new weights under an old name would meet stale KV. Every sample is its own request with its own
seed and is repeated with it; a dead server is said once, its requests go to another, and it is asked again at the next
sync or rollout. A server that answers but has lost the adapter (a restart) is given it again. Same tokens on a
repetition are promised as far as vLLM does: its rounding depends on the batch.
Left out: full weights (only adapters are sent), sleeping and waking the servers, keys and proxies.
"""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from grpo.batch import Prompt, Rollouts
from grpo.errors import InputError, RunError
from grpo.model.adapter import adapter_modules
from grpo.model.policy import Policy
from grpo.rollout.completions import to_completions
from grpo.rollout.engine import Phase, Progress, Sampling, SyncReport, unbilled, unseen
from grpo.rollout.probe import WeightProbe
from grpo.rollout.server_api import (
    COMMAND,
    Reader,
    check_model,
    check_server,
    clipped,
    generate_body,
    payload_of,
    read_answer,
    read_prompt_logprobs,
    refused,
    sampling_parameters,
)
from grpo.rollout.server_client import Calls, Server, UnreachableError, in_parallel

MAX_OUTSTANDING = 256  # requests at one server at a time; more wait here
MAX_ATTEMPTS = 3  # of one request that servers which are alive do not answer
RETRY_S = 0.5  # before a repetition, times the attempt


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk: its name at the servers, and the folder with `adapter_config.json`."""

    name: str
    folder: Path  # ours, removed with it
    path: Path  # what servers are told: `folder`, or the one inside it that peft made
    num_bytes: int


class ServerEngine:
    """A rollout engine (see engine.py) over HTTP.

    Args:
        servers: http://host:port of each.
        model_name: what the servers must serve: the name or path that `vllm serve` was given, or its served name.
        adapter_dir: folder that trainer and servers see under the same path; made when missing.
        tokenizer: decodes completions, once.
        timeout_s: seconds until a request is repeated.
        probe: compares log-probs after each sync; None: no comparison.
        say: told of dead servers and the like, one line each.

    Attributes:
        progress: called with (samples done, samples in all) during `generate`, in the caller's thread.

    Raises:
        InputError: a server does not answer or was started otherwise; one line for each.
    """

    def __init__(
        self,
        servers: Sequence[str],
        model_name: str,
        adapter_dir: Path,
        tokenizer: Any,
        *,
        timeout_s: float = 600.0,
        probe: WeightProbe | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.servers = [Server(url) for url in servers]
        self.model_name = model_name
        self.adapter_dir = Path(adapter_dir).absolute()
        self.tokenizer = tokenizer
        self.timeout_s = timeout_s
        self.probe = probe
        self.progress: Progress = unseen
        self.policy_version = -1
        self.phase: Phase = unbilled
        self._say = say or (lambda line: None)
        self._lock = threading.Lock()  # of `alive` and `outstanding`
        self._adapter: Adapter | None = None
        self._run = secrets.token_hex(4)  # a server that serves a second run must not take its adapter for ours
        self._start()

    def _start(self) -> None:
        problems = [] if self.servers else [f"rollout.servers is empty (want http://host:port of each: {COMMAND})"]
        for server in self.servers:
            try:
                check_server(server, self.model_name, self._say)
            except InputError as error:
                problems += error.lines
            except UnreachableError as error:
                problems.append(f"rollout.servers: {server.url} went away while it was checked: {error}")
        if problems:
            raise InputError(*problems)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Servers are always awake: their memory is not the trainer's."""
        yield

    def unmapped_bytes(self) -> int:
        """None: nothing sleeps here."""
        return 0

    def release(self) -> None:
        """As `close`; the next `load_weights` sends the adapter again."""
        self.close()

    def close(self) -> None:
        """Take the adapter from the servers and from the disk. The servers run on."""
        adapter, self._adapter = self._adapter, None
        if adapter is not None:
            self._drop(adapter)

    # --- the adapter -----------------------------------------------------------------------------------------

    def load_weights(self, policy: Policy) -> SyncReport:
        """Send the adapter to every server that lives.

        Raises:
            InputError: there is no adapter, or it is not plain LoRA.
            RunError: a server refuses the adapter, none is left, or the probe finds other weights than the policy's.
        """
        started = time.perf_counter()
        with self.phase("sync"):
            num_bytes = self._sync(policy)
        seconds = time.perf_counter() - started
        gap = None
        if self.probe is not None:
            with self.phase("probe"):
                gap = self.probe.check(policy, self.score)
        return SyncReport(self.policy_version, num_bytes, seconds, gap)

    def _sync(self, policy: Policy) -> int:
        adapter = self._write(policy)
        try:
            self._revive()
            self._on_living(partial(self._load, adapter))
            self._living()
            old, self._adapter = self._adapter, adapter
        finally:
            if self._adapter is not adapter:  # refused, or Ctrl-C
                self._drop(adapter)
        self.policy_version += 1
        if old is not None:
            self._drop(old)
        return adapter.num_bytes

    def _write(self, policy: Policy) -> Adapter:
        """Written beside its place and renamed, so that no server can read half of it."""
        if not policy.adapted:
            raise InputError(
                'rollout.engine is "server" without an adapter (want one: only adapters are sent to servers)'
            )
        adapter_modules(policy.causal_lm)  # raises where it is not plain LoRA
        module: Any = policy.module
        name = f"leangrpo-{self._run}-{self.policy_version + 1:06d}"
        folder, partial_folder = self.adapter_dir / name, self.adapter_dir / f".{name}.partial"
        try:
            partial_folder.mkdir(parents=True)
            # the base's embedding is never part of it; left to itself peft asks the hub whether it is
            module.save_pretrained(
                str(partial_folder), selected_adapters=[module.active_adapter], save_embedding_layers=False
            )
            partial_folder.rename(folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial_folder, ignore_errors=True)
            raise RunError(f"rollout.server_adapter_dir: cannot write the adapter: {error}") from error
        inside = folder / str(module.active_adapter)  # peft's own folder for an adapter that is not called "default"
        path = inside if (inside / "adapter_config.json").exists() else folder
        return Adapter(name, folder, path, (path / "adapter_model.safetensors").stat().st_size)

    def _load(self, adapter: Adapter, server: Server) -> None:
        """Never in place. A name that is there already came with a call whose answer was lost."""
        with server.lock:
            if server.adapter == adapter.name:
                return
            body = {"lora_name": adapter.name, "lora_path": str(adapter.path)}
            reply = server.call("POST", "/v1/load_lora_adapter", body)
            if reply.status != 200 and not (reply.status == 400 and b"already been loaded" in reply.body):
                raise RunError(f"{refused(server, f'adapter {adapter.path}', reply)} (want: {COMMAND})")
            server.adapter = adapter.name

    def _load_again(self, adapter: Adapter, server: Server) -> None:
        """After a 404: the first of the calls that saw it loads the adapter, the others wait and find it there."""
        with server.lock:
            there = adapter.name in server.call("GET", "/v1/models").body.decode(errors="replace")
            if not there:
                server.adapter = None
                self._load(adapter, server)
                self._say(f"server {server.url} had lost the adapter (restarted?): loaded again")

    def _unload(self, adapter: Adapter, server: Server) -> None:
        """Frees the name. The server evicts the weights when it needs their slot; one that restarted has neither."""
        reply = server.call("POST", "/v1/unload_lora_adapter", {"lora_name": adapter.name})
        if reply.status not in (200, 404):
            self._say(f"warning: {refused(server, f'to unload adapter {adapter.name}', reply)}")

    def _drop(self, adapter: Adapter) -> None:
        self._on_living(partial(self._unload, adapter))
        shutil.rmtree(adapter.folder, ignore_errors=True)

    # --- which server ----------------------------------------------------------------------------------------

    def _on_living(self, action: Callable[[Server], None]) -> None:
        """`action` at every server that lives, at once; one that does not answer is dead from then on."""

        def at(server: Server) -> None:
            try:
                action(server)
            except UnreachableError as error:
                self._bury(server, str(error))

        living = [server for server in self.servers if server.alive]
        in_parallel([partial(at, server) for server in living], len(self.servers), Calls())

    def _living(self) -> list[Server]:
        living = [server for server in self.servers if server.alive]
        if not living:
            raise RunError(f"no rollout server is left ({', '.join(server.url for server in self.servers)})")
        return living

    def _bury(self, server: Server, reason: str) -> None:
        with self._lock:
            was_alive, server.alive, server.adapter = server.alive, False, None
        if was_alive:
            self._say(f"server {server.url} is dead ({reason}): its requests go to the others")

    def _revive(self) -> None:
        """Ask the dead again. One that lives is checked like at the start: it may have been started otherwise."""
        for server in self.servers:
            if not server.alive and server.is_healthy():
                try:
                    check_server(server, self.model_name, self._say)
                except UnreachableError:
                    continue  # dead it is, and was said to be
                except InputError as error:
                    raise RunError(str(error)) from error
                server.alive = True
                self._say(f"server {server.url} is back")

    def _pick(self, not_again: Server | None) -> Server:
        """The living server with the fewest requests; counts one more for it."""
        with self._lock:
            server = min(self._living(), key=lambda server: (server is not_again, server.outstanding))
            server.outstanding += 1
        return server

    # --- requests --------------------------------------------------------------------------------------------

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> Rollouts:
        """`num_generations` completions for each prompt, in prompt order; every group is complete.

        Raises:
            RuntimeError: before the first `load_weights`.
            InputError: sampling that vLLM would change in silence.
            RunError: no server is left, one refuses a request, or answers against the protocol.
        """
        adapter = self._current()
        if 0 < sampling.temperature < 0.01:  # vLLM would take 0.01 for it
            raise InputError(f"rollout.temperature is {sampling.temperature} (want 0 or at least 0.01 for server)")
        self._revive_and_load(adapter)
        self._check_lengths(prompts, sampling)
        requests = [(prompt, g) for prompt in prompts for g in range(sampling.num_generations)]
        bodies = [
            generate_body(adapter.name, prompt.token_ids, sampling_parameters(sampling, sampling.seed_of(prompt, g)))
            for prompt, g in requests
        ]
        answers = self._ask_all(bodies, partial(read_answer, sampling=sampling), self.progress)
        completions = to_completions(answers, sampling, self.tokenizer)
        size = sampling.num_generations
        groups = [completions[p * size : (p + 1) * size] for p in range(len(prompts))]
        return Rollouts(list(prompts), groups, self.policy_version)

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs at temperature 1 of every token but the first of each sequence; nan where the server has none."""
        adapter = self._current()
        asked = {"max_tokens": 1, "temperature": 1.0, "seed": 1, "prompt_logprobs": 0}
        bodies = [generate_body(adapter.name, ids, asked) for ids in sequences]
        return self._ask_all(bodies, read_prompt_logprobs)

    def _current(self) -> Adapter:
        if self._adapter is None:
            raise RuntimeError("generate() or score() before load_weights(), or after close()")
        return self._adapter

    def _revive_and_load(self, adapter: Adapter) -> None:
        self._revive()
        self._on_living(partial(self._load, adapter))

    def _check_lengths(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """A server would end a completion early, as "length", where its window ends."""
        longest = max((len(prompt.token_ids) for prompt in prompts), default=0) + sampling.max_completion_length
        for server in self.servers:
            if server.max_length is not None and longest > server.max_length:
                raise RunError(
                    f"server {server.url} takes sequences of {server.max_length} tokens (want --max-model-len "
                    f"{longest} or more: the longest prompt + rollout.max_completion_length)"
                )

    def _ask_all(
        self, bodies: list[dict[str, Any]], read: Reader, progress: Callable[[int, int], None] | None = None
    ) -> list[Any]:
        calls = Calls()
        jobs = [partial(self._ask, body, read, calls) for body in bodies]
        return in_parallel(jobs, MAX_OUTSTANDING * len(self.servers), calls, progress)

    def _ask(self, body: dict[str, Any], read: Reader, calls: Calls) -> Any:
        """One request, the same body each time, until a server answers. Servers found dead do not count as attempts."""
        attempts, server = 0, None
        while True:
            server = self._pick(server)
            try:
                return self._attempt(server, body, read, calls)
            except UnreachableError as error:
                reason = str(error)
            finally:
                with self._lock:
                    server.outstanding -= 1
            if not server.is_healthy(calls):
                self._bury(server, reason)
                continue
            attempts += 1
            if attempts == MAX_ATTEMPTS:
                raise RunError(f"server {server.url} failed, attempt {attempts} of the same request: {reason}")
            calls.wait(attempts * RETRY_S)

    def _attempt(self, server: Server, body: dict[str, Any], read: Reader, calls: Calls) -> Any:
        """Raises UnreachableError where another attempt may help, RunError where none would."""
        reply = server.call("POST", "/inference/v1/generate", body, timeout_s=self.timeout_s, calls=calls)
        if reply.status == 404:
            self._load_again(self._current(), server)
        if reply.status in (404, 408, 429) or reply.status >= 500:
            raise UnreachableError(str(reply))
        if reply.status != 200:
            raise refused(server, "a request", reply)
        payload = payload_of(reply)
        try:
            check_model(payload, body)
            return read(payload, body)
        except RunError as error:
            raise RunError(f"server {server.url}: {error}") from error
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"server {server.url} answers in another form than vLLM: {clipped(reply)}") from error
