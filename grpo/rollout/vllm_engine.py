"""`vllm`: vLLM in this process, on the trainer's GPU. Awake only inside the rollout phase, asleep during the update.

    case                     asleep                     each step
    LoRA, shared base        KV cache unmapped          adapter into its slot (vllm_weights.set_adapter)
    LoRA, own base           weights in host memory     adapter
    full fine-tuning         weights dropped            wake weights, write them, wake the KV cache

The engine is started before the trainer's model is built: with a shared base the model's frozen weights are views of
the engine's. The order inside `awake()` is weights, sync, KV cache, probe, so the sync never competes with the cache.
Left out: several GPUs for one engine, vision inputs, and 4-bit weights shared with the trainer (a second copy is held).
"""

from __future__ import annotations

import atexit
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from grpo.batch import Prompt, Rollouts
from grpo.errors import InputError, RunError, clip
from grpo.model.adapter import adapter_modules
from grpo.model.policy import Policy
from grpo.rollout.completions import to_completions
from grpo.rollout.engine import Phase, Progress, Sampling, SyncReport, unbilled, unseen
from grpo.rollout.probe import WeightProbe
from grpo.rollout.vllm_start import VLLMOptions, free_memory, start
from grpo.rollout.vllm_weights import (
    Shared,
    copy_weights,
    kv_only_sleep,
    pool_bytes,
    set_adapter,
    share_base,
    unmapped_bytes,
)
from grpo.seeds import generators_kept

_NO_PATH = "/nonexistent/leangrpo-adapter"  # adapters are set in memory: being asked for a path must fail loudly


_LIVE: set[VLLMEngine] = set()  # not closed; a process can hold one, since vLLM's pool of weights is one


class VLLMEngine:
    """A rollout engine (see engine.py) around `vllm.LLM`.

    Args:
        options: see there.
        tokenizer: decodes completions, once.
        probe: compares log-probs after each sync; None: no comparison.
        say: told what a person should know, one line each.

    Raises:
        InputError: vLLM is absent, of another version, or does not fit into the GPU's memory.
    """

    def __init__(
        self,
        options: VLLMOptions,
        tokenizer: Any,
        *,
        probe: WeightProbe | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.probe = probe
        self.policy_version = -1
        self.phase: Phase = unbilled
        self.progress: Progress = unseen
        self._say = say or (lambda line: None)
        self._adapter: Any = None  # the LoRARequest of the present version
        self._syncs = 0
        self._cache_mapped = True
        self._unmapped = 0
        self._awake = False
        self._llm = _only_one(options)
        _LIVE.add(self)
        if options.share_weights:
            self._worker()._sleep_mode_backend = kv_only_sleep()
        # Level 2 forgets adapter slots, level 1 keeps everything in host memory.
        self._level = 2 if options.adapter_rank is None else 1
        atexit.register(_end_process_group)
        self._sleep()

    # --- the base weights -----------------------------------------------------------------------------------

    def share_base(self, model: nn.Module, device: torch.device) -> Shared:
        """Make `model`'s frozen weights views of the engine's, wherever they are the same bits; `model` moves to
        `device`. Call it before the adapter is added.

        Raises:
            RuntimeError: the engine was started without `share_weights`: its sleep would unmap what is viewed.
        """
        if not self.options.share_weights:
            raise RuntimeError("share_base() of an engine that was started without share_weights")
        return share_base(model, self._model(), device)

    # --- the protocol ---------------------------------------------------------------------------------------

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Weights are resident inside the block, the KV cache from the first request on; both leave at its end.

        Raises:
            RunError: the engine does not wake up.
        """
        torch.cuda.empty_cache()  # the trainer's free blocks are what the cache is mapped into
        if not self.options.share_weights:
            with self.phase("wake"):
                self._wake(["weights"])
        self._awake = True
        try:
            yield
        finally:
            self._awake = False
            with self.phase("sleep"):
                self._abort()
                self._sleep()

    def load_weights(self, policy: Policy) -> SyncReport:
        """Bring the adapter (or all weights) over, read some back, compare log-probs.

        Raises:
            RunError: outside `awake()`, or the engine does not hold what was sent.
        """
        if not self._awake:
            raise RunError("load_weights() outside awake()")
        start = time.monotonic()
        with self.phase("sync"):
            num_bytes = self._send(policy)
            torch.cuda.synchronize()
        seconds = time.monotonic() - start
        self.policy_version += 1
        gap = self._check(policy)
        return SyncReport(self.policy_version, num_bytes, seconds, gap)

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> Rollouts:
        """`num_generations` completions for each prompt, each with a seed of its own.

        Raises:
            RuntimeError: before the first `load_weights`.
            RunError: the engine failed, or returned something that is no completion.
        """
        if self.policy_version < 0:
            raise RuntimeError("generate() before load_weights()")
        too_long = max((len(prompt.token_ids) for prompt in prompts), default=0) + sampling.max_completion_length
        if too_long > self.options.max_length:
            raise RunError(
                f"a prompt and its completion may take {too_long} tokens, but the engine was built for "
                f"{self.options.max_length}"
            )
        requests = [(prompt, g) for prompt in prompts for g in range(sampling.num_generations)]
        outputs = self._run(
            [prompt.token_ids for prompt, _ in requests],
            [_parameters(sampling, sampling.seed_of(prompt, g)) for prompt, g in requests],
            use_tqdm=partial(_bar, self.progress),
        )
        found = [_answer(output) for output in outputs]
        completions = to_completions(found, sampling, self.tokenizer)
        size = sampling.num_generations
        groups = [completions[p * size : (p + 1) * size] for p in range(len(prompts))]
        return Rollouts(list(prompts), groups, self.policy_version)

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs at temperature 1 of every token but the first of each sequence."""
        from vllm import SamplingParams

        asked = SamplingParams(max_tokens=1, temperature=1.0, seed=1, prompt_logprobs=0, detokenize=False)
        outputs = self._run(sequences, [asked] * len(sequences))
        return [
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for ids, output in zip(sequences, outputs, strict=True)
        ]

    def memory(self) -> dict[str, int]:
        """Bytes the engine's pools hold on the device now, by tag ("weights", "kv_cache")."""
        return pool_bytes()

    def unmapped_bytes(self) -> int:
        """Of the KV cache, and of weights that sleep too."""
        return self._unmapped

    def release(self) -> None:
        """Nothing is elsewhere."""

    def close(self) -> None:
        """End the engine. Shared weights stay valid: their storage belongs to whoever views it."""
        if self._llm is None:
            return
        self._abort()
        with suppress(RunError):  # vLLM's allocator complains of freeing what is not mapped
            if not (self._cache_mapped or self._awake or self.options.share_weights):
                self._wake(["weights"])
            self._map_cache()
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        _LIVE.discard(self)
        gc.collect()
        torch.cuda.empty_cache()

    # --- inside ---------------------------------------------------------------------------------------------

    def _worker(self) -> Any:
        found = self._llm.collective_rpc(lambda wrapper: wrapper.worker)
        return found[0]

    def _model(self) -> Any:
        return self._worker().model_runner.model

    def _send(self, policy: Policy) -> int:
        self._syncs += 1
        if self.options.adapter_rank is None:
            return copy_weights(policy.causal_lm, self._model())
        from vllm.lora.request import LoRARequest

        previous = None if self._adapter is None else self._adapter.lora_int_id
        # A new name and a new id each time: prefix cache blocks belong to names, slots to ids.
        request = LoRARequest(f"policy-{self._syncs}", self._syncs, f"{_NO_PATH}-{self._syncs}")
        self._adapter = None
        num_bytes = set_adapter(self._worker(), adapter_modules(policy.causal_lm), self._syncs, previous)
        self._adapter = request
        return num_bytes

    def _check(self, policy: Policy) -> float | None:
        """Cold cache, then log-probs. The engine's cache is left empty, as the first real request expects it."""
        if self.probe is None or not self.probe.sequences:
            return None
        with self.phase("probe"):
            from vllm import SamplingParams

            # The longest, since only whole blocks are cached; `score` itself never reads the cache.
            longest = max(self.probe.sequences, key=len)
            first = self._run([longest], [SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)])
            if first[0].num_cached_tokens:
                raise RunError("the rollout engine answers from a prefix cache of older weights")
            gap = self.probe.check(policy, self.score)
            if not self._llm.reset_prefix_cache():
                raise RunError("the rollout engine did not empty its prefix cache: blocks are still held")
        return gap

    def _run(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Any], use_tqdm: Any = False) -> list[Any]:
        """One request per prompt, finished, in order. Nothing stays behind in the engine if an exception passes."""
        self._map_cache()
        try:
            with generators_kept():
                outputs = self._llm.generate(
                    [{"prompt_token_ids": list(ids)} for ids in prompts],
                    list(parameters),
                    lora_request=self._adapter,
                    use_tqdm=use_tqdm,
                )
        except (RuntimeError, ValueError) as error:
            self._abort()
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RunError(f"the rollout engine failed: {clip(error, 300)}") from error
        except BaseException:
            self._abort()
            raise
        if len(outputs) != len(prompts):
            raise RunError(f"the rollout engine returned {len(outputs)} answers to {len(prompts)} requests")
        return outputs

    def _abort(self) -> None:
        """Unfinished requests would otherwise come back, first, in the next call."""
        if self._llm is None:
            return
        engine = self._llm.llm_engine
        waiting = [*engine.output_processor.request_states, *engine.output_processor.parent_requests]
        if waiting:
            engine.abort_request(waiting, internal=True)

    def _map_cache(self) -> None:
        if not self._cache_mapped:
            with self.phase("wake"):
                self._wake(None if self.options.share_weights else ["kv_cache"])
            self._cache_mapped = True

    def _wake(self, tags: list[str] | None) -> None:
        try:
            self._llm.wake_up(tags)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise RunError(
                f"the rollout engine did not wake up ({', '.join(tags or ['all'])}; {free_memory()}; want a smaller "
                f"rollout.kv_cache or update.max_tokens_per_batch): {clip(error, 200)}"
            ) from error
        self._unmapped = unmapped_bytes()

    def _sleep(self) -> None:
        if self._llm is None:
            return  # closed while awake
        if not self._cache_mapped:
            if self.options.share_weights:
                return  # it never woke up
            self._map_cache()  # vLLM puts nothing to sleep that is half awake
        torch.cuda.synchronize()
        try:
            self._llm.sleep(level=self._level)
        except (RuntimeError, AssertionError) as error:  # it asserts that the whole device has more memory than before
            raise RunError(
                f"the rollout engine did not go to sleep ({free_memory()}; did another process take GPU memory?): "
                f"{clip(error, 200)}"
            ) from error
        self._cache_mapped = False
        self._unmapped = unmapped_bytes()


def _parameters(sampling: Sampling, seed: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        n=1,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_completion_length,
        seed=seed,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,  # our stop tokens alone, whatever the model's configuration adds to them
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
    )


def _answer(output: Any) -> tuple[list[int], list[float], str | None]:
    """Token ids, log-probs of the distribution sampled from, and the engine's finish reason."""
    (completion,) = output.outputs
    flat = completion.logprobs
    logprobs = [] if flat is None else [flat.logprobs[start] for start in flat.start_indices]
    return list(completion.token_ids), logprobs, completion.finish_reason


def _end_process_group() -> None:
    """vLLM makes the default process group where there is none; left open, torch warns as the process ends."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _bar(progress: Progress, iterable: Any = None, **display: Any) -> Any:
    """vLLM's `use_tqdm`: called around the prompts, whose preparation is not worth showing, then for the requests."""
    return _Bar(progress, display["total"]) if iterable is None else iterable


class _Bar:
    """What `LLM.generate` asks of a tqdm bar, told on to `progress(done, total)`."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._start = progress, time.monotonic()
        self.total, self.n, self.postfix = total, 0, ""

    @property
    def format_dict(self) -> dict[str, float]:
        return {"elapsed": max(1e-9, time.monotonic() - self._start)}

    def update(self, count: int) -> None:
        self.n += count
        self._progress(self.n, self.total)

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass


def _only_one(options: VLLMOptions) -> Any:
    """The engine, awake. Raises `InputError` where this process holds another."""
    if _LIVE:
        raise InputError(
            "rollout.engine is 'vllm' but this process has an engine already (want one trainer a process, or the first "
            "one's engine.close())"
        )
    return start(options)
