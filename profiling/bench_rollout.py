"""Tokens/s of the vLLM rollout engine against a bare `LLM.generate` of the same engine, its sync, sleep and memory.

    python -m profiling.bench_rollout                     # Qwen3-1.7B shape on the first CUDA device, about 200 s
    python -m profiling.bench_rollout --quick             # fewer tokens and cycles
    python -m profiling.bench_rollout --toy --device cpu  # seconds, `hf` in place of vLLM; checks the program alone

Weights are random; 16 prompts × 8 generations × 1,024 forced tokens (nothing stops early), prompts of 256 tokens, LoRA
r=16 on all linear layers. Both sides send the same ids, seeds and adapter, and start from an empty prefix cache.
Figures are written as they come. Left out: whole steps (bench_step.py).
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo.batch import Prompt, Rollouts
from grpo.bench_models import random_model
from grpo.config import AdapterConfig, ModelConfig
from grpo.model.adapter import add_adapter
from grpo.model.load import load_model
from grpo.model.policy import Policy
from grpo.packing import Document, pack_documents
from grpo.rollout.engine import Sampling
from grpo.rollout.hf_engine import HFEngine
from profiling.measure import GIB, device_slug, environment, with_origin, write_json, write_tables

HERE = Path(__file__).parent
MIB = 2**20
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16


@dataclass(frozen=True)
class Size:
    """A workload: prompts, generations of each, tokens of a prompt and of a completion; bytes of the KV cache."""

    prompts: int = 16
    generations: int = 8
    prompt_tokens: int = 256
    completion_tokens: int = 1024
    cycles: int = 20
    rounds: int = 2
    kv_cache_bytes: int = 20 * GIB
    shape: str = "qwen3-1.7b"
    toy: bool = False

    @property
    def tokens(self) -> int:
        """Completion tokens of one rollout."""
        return self.prompts * self.generations * self.completion_tokens


FULL = Size()
QUICK = Size(completion_tokens=256, cycles=5, rounds=1)
TOY = Size(
    prompts=2, generations=2, prompt_tokens=8, completion_tokens=6, cycles=2, rounds=1, shape="toy-qwen3", toy=True
)


def make_tokenizer(vocabulary: int) -> Any:
    """One word per id ("t3", "t4", …), so that any sampled id has a text and a prompt has as many tokens as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    words = [*special, *(f"t{i}" for i in range(len(special), vocabulary))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def write_model(folder: Path, size: Size, device: torch.device) -> Any:
    """Random weights, made on `device`, and a tokenizer, in `folder`; the model names no EOS. Returns the tokenizer."""
    dtype = torch.float32 if size.toy else torch.bfloat16
    nothing_stops = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model: Any = random_model(size.shape, device, dtype, max_position_embeddings=4096, **nothing_stops)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer = make_tokenizer(model.config.vocab_size)
    tokenizer.save_pretrained(folder)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return tokenizer


@contextmanager
def model_folder(size: Size, device: torch.device) -> Iterator[tuple[Path, Any]]:
    """The folder (in memory where there is /dev/shm) and the tokenizer; gone afterwards."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="leangrpo-bench-", dir=shm if shm.is_dir() else None))
    try:
        yield folder, write_model(folder, size, device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prompt_words(size: Size, count: int, vocabulary: int) -> list[list[int]]:
    """Token ids of `count` different prompts, without the first three ids (pad, EOS, unknown)."""
    source = random.Random(0)
    return [[source.randrange(3, vocabulary) for _ in range(size.prompt_tokens)] for _ in range(count)]


class Clock:
    """Seconds by phase name, as an engine's `phase`."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name].append(time.perf_counter() - start)


def build(size: Size, folder: Path, tokenizer: Any, device: torch.device) -> tuple[Any, Policy, dict[str, Any]]:
    """Engine, policy with a non-zero adapter, and bytes: on the device before, shared, the trainer's own."""
    where = ModelConfig(name_or_path=str(folder), dtype="float32" if size.toy else "bfloat16", device="cpu")
    facts: dict[str, Any] = {"used_before_bytes": used_bytes(device)}
    if device.type == "cuda":
        from grpo.rollout.vllm_engine import VLLMEngine
        from grpo.rollout.vllm_start import VLLMOptions

        start = time.perf_counter()
        engine: Any = VLLMEngine(
            VLLMOptions(
                source=str(folder),
                dtype="bfloat16",
                max_length=size.prompt_tokens + size.completion_tokens,
                max_sequences=size.prompts * size.generations,
                kv_cache_bytes=size.kv_cache_bytes,
                adapter_rank=RANK,
                adapter_targets=TARGETS,
                share_weights=True,
            ),
            tokenizer,
        )
        facts["engine_start_seconds"] = time.perf_counter() - start
        base = load_model(where)
        shared = engine.share_base(base, device)
        facts |= {"shared_bytes": shared.num_bytes, "own_bytes": shared.own_bytes}
    else:
        base = load_model(where)
    model = add_adapter(base, AdapterConfig(r=RANK)).to(device)
    with torch.no_grad():  # B is zero at first: the adapter would do nothing
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.01)
    policy = Policy(model)
    facts["adapter_bytes"] = sum(p.numel() * p.element_size() for p in policy.trainable().values())
    if device.type != "cuda":
        engine = HFEngine(policy, tokenizer, size.prompts * size.generations, lambda line: None)
    engine.phase = Clock()
    return engine, policy, facts


def used_bytes(device: torch.device) -> int:
    """Bytes in use on the device by the driver's count (all processes); 0 on the CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    used_bytes(device)  # synchronises
    start = time.perf_counter()
    found = call()
    used_bytes(device)
    return time.perf_counter() - start, found


def _bare(engine: Any, prompts: list[Prompt], sampling: Sampling, adapter: Any) -> list[Any]:
    """`LLM.generate` of the very requests that our engine sends."""
    from grpo.rollout.vllm_engine import _parameters

    requests = [(prompt, g) for prompt in prompts for g in range(sampling.num_generations)]
    found: list[Any] = engine._llm.generate(
        [{"prompt_token_ids": list(prompt.token_ids)} for prompt, _ in requests],
        [_parameters(sampling, sampling.seed_of(prompt, g)) for prompt, g in requests],
        lora_request=adapter,
        use_tqdm=False,
    )
    return found


class Bench:
    """The figures, one method each; `row` is what the JSON keeps."""

    def __init__(self, size: Size, folder: Path, tokenizer: Any, device: torch.device) -> None:
        self.size, self.device = size, device
        self.engine, self.policy, self.row = build(size, folder, tokenizer, device)
        self.vllm = device.type == "cuda"
        ids = prompt_words(size, size.prompts, self.policy.causal_lm.config.vocab_size)
        self.prompts = [Prompt(i, words, {}) for i, words in enumerate(ids)]
        self.sampling = Sampling(size.generations, size.completion_tokens, 1.0, 1.0, 0, 0.0, (), 0)
        self.rollouts: Rollouts | None = None

    def _one(self, name: str, call: Callable[[], Any], count: Callable[[Any], int], keep: bool = True) -> Any:
        if self.vllm and not self.engine._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not emptied: blocks are still held")
        seconds, found = _timed(call, self.device)
        if count(found) != self.size.tokens:
            raise RuntimeError(f"{name}: {count(found)} tokens (want {self.size.tokens}: nothing may stop early)")
        if keep:
            self.row.setdefault(f"{name}_tokens_per_s", []).append(self.size.tokens / seconds)
        return found

    def _ours(self, keep: bool = True) -> None:
        self.rollouts = self._one("ours", lambda: self.engine.generate(self.prompts, self.sampling), _ours_count, keep)

    def speed(self) -> None:
        """Ours, bare, ours, bare, …; then the base without the adapter."""
        with self.engine.awake():
            self.row["first_sync_seconds"] = self.engine.load_weights(self.policy).seconds
            self._ours(keep=False)
            for _ in range(self.size.rounds):
                self._ours()
                if self.vllm:
                    self._one("bare", self._bare(self.engine._adapter), _bare_count)
            if self.vllm:
                self._one("bare_base", self._bare(None), _bare_count)
        for name in ("ours", "bare", "bare_base"):
            if f"{name}_tokens_per_s" in self.row:
                self.row[f"{name}_median"] = statistics.median(self.row[f"{name}_tokens_per_s"])
        if self.vllm:
            self.row["ours_over_bare"] = self.row["ours_median"] / self.row["bare_median"]

    def _bare(self, adapter: Any) -> Callable[[], Any]:
        return lambda: _bare(self.engine, self.prompts, self.sampling, adapter)

    def mismatch(self) -> None:
        """Mean and max |Δlogp| of eight completions, sampler against policy."""
        assert self.rollouts is not None
        pairs = [(p, group[0]) for p, group in zip(self.rollouts.prompts, self.rollouts.completions, strict=True)][:8]
        gaps = []
        for prompt, completion in pairs:
            document = Document(0, prompt.token_ids, completion.token_ids)
            (batch,) = pack_documents([document], document.length)
            with torch.no_grad(), self.policy.evaluating():
                own = self.policy.logprobs(batch.to(self.device), 1.0).logprobs.float().cpu()
            gaps.append((own - torch.tensor(completion.sampler_logprobs)).abs())
        found = torch.cat(gaps)
        self.row |= {"mean_abs_dlogp": float(found.mean()), "max_abs_dlogp": float(found.max())}

    def cycles(self) -> None:
        """Sync, wake and sleep by the clock; bytes in use after each sleep."""
        clock = self.engine.phase = Clock()
        used, syncs = [], []
        for _ in range(self.size.cycles + 1):  # the first is not counted
            with self.engine.awake():
                syncs.append(self.engine.load_weights(self.policy).seconds)
                if self.vllm:
                    self.engine._map_cache()
            used.append(used_bytes(self.device))
        self.row["sync_seconds"] = syncs[1:]
        for name in ("wake", "sleep"):
            if clock.seconds[name]:
                self.row[f"{name}_seconds"] = clock.seconds[name][1:]
        if self.vllm:
            known = self.row["used_before_bytes"] + self.row["adapter_bytes"] + self.row["own_bytes"]
            self.row |= {
                "leak_mib": (used[-1] - used[0]) / MIB,
                "asleep_used_gib": used[-1] / GIB,
                "asleep_beside_shared_gib": (used[-1] - known - self.row["shared_bytes"]) / GIB,
                "torch_reserved_gib": torch.cuda.memory_reserved() / GIB,
                "pools": self.engine.memory(),
            }


def _ours_count(rollouts: Rollouts) -> int:
    return sum(len(completion.token_ids) for group in rollouts.completions for completion in group)


def _bare_count(outputs: list[Any]) -> int:
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def table(row: dict[str, Any]) -> str:
    """The figures as Markdown; lists by their median (syncs, wakes and sleeps also by their maximum)."""
    lines = ["| figure | value |", "|---|---|"]
    flat = {name: value for name, value in row.items() if not isinstance(value, dict)}
    flat |= {f"pool_{name}_bytes": size for name, size in row.get("pools", {}).items()}
    for name, value in flat.items():
        if name.endswith("_bytes"):
            name, value = name.removesuffix("bytes") + "gib", value / GIB
        if name.endswith("_seconds") and isinstance(value, list):
            value = f"{statistics.median(value):.4f} (max {max(value):.4f})"
        elif isinstance(value, list):
            value = ", ".join(f"{one:,.0f}" for one in value)
        elif isinstance(value, float):
            value = f"{value:,.4f}"
        lines.append(f"| {name} | {value} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, for checking this program")
    parser.add_argument("--quick", action="store_true", help="256 tokens, one round, 5 cycles")
    parser.add_argument("--budget", type=float, default=200.0, help="seconds; no new figure is begun after it")
    parser.add_argument("--out", type=Path, help="default: profiling/results/<device>/rollout.json")
    parser.add_argument("--commit", help="recorded in the JSON where the checkout has no git")
    parser.add_argument("--table", action="store_true", help="rewrite profiling/README.md, measure nothing")
    given = parser.parse_args(arguments)
    if given.table:
        write_tables("rollout", with_origin(table, "figures"))
        return
    start = time.monotonic()
    device = torch.device(given.device)
    if device.type != "cuda" and not given.toy:
        parser.error("without --toy this needs CUDA and vLLM")
    size = TOY if given.toy else QUICK if given.quick else FULL
    out = given.out or HERE / "results" / device_slug(device) / "rollout.json"
    data: dict[str, Any] = {"environment": environment(device, given.commit)}
    with model_folder(size, device) as (folder, tokenizer):
        bench = Bench(size, folder, tokenizer, device)
        data |= {"engine": "vllm" if bench.vllm else "hf", "size": vars(size), "figures": bench.row}
        for figure in (bench.speed, bench.mismatch, bench.cycles):
            if time.monotonic() - start > given.budget:
                data.setdefault("skipped", []).append(figure.__name__)
                continue
            figure()
            write_json(out, data)
            print(f"{figure.__name__}: {time.monotonic() - start:.0f} s", flush=True)
        write_json(out, data)
        bench.engine.close()
    print(table(bench.row), *[f"skipped (--budget): {name}" for name in data.get("skipped", [])], sep="\n")


if __name__ == "__main__":
    main()
