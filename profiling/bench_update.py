"""The policy update of real model shapes: seconds and peak memory of forward + backward, and how exact it is.

    python -m profiling.bench_update                         # every case on the first CUDA device
    python -m profiling.bench_update --case llama-8b-lora    # one
    python -m profiling.bench_update --toy --device cpu      # seconds; checks the program, not the machine
    python -m profiling.bench_update --longest 24 80         # completions that still train on a card of so many GB
    python -m profiling.bench_update --table                 # rewrite the table of profiling/README.md from the JSON

Models are built from their configuration with random weights. A call is forward and backward of one bin (or of all bins
of one optimizer step, for a group): 256 prompt tokens, the rest completion, GRPO loss with beta 0.04 and given
reference log-probs. Peers get the same tokens. Every method's gradient is held, on a model of the same widths and two
layers, against that model in float32 without any saving; so is the stock model in bfloat16, which shows what rounding
alone does.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo.algorithm import policy_loss
from grpo.batch import TokenBatch, Totals
from grpo.config import AdapterConfig
from grpo.model.adapter import add_adapter
from grpo.model.policy import Policy
from grpo.packing import Document, pack_documents
from profiling.measure import GIB, Measurement, device_slug, environment, measure

HERE = Path(__file__).parent
MARKERS = ("<!-- update: begin -->", "<!-- update: end -->")
PROMPT = 256
LONG = 4  # more bins than this are timed once
BETA = 0.04

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "Llama",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 2**20,
        },
    ),
    "qwen3-1.7b": (
        "Qwen3",
        {
            "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 2**20,
            "tie_word_embeddings": True,
        },
    ),
    "toy": (
        "Llama",
        {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 2**20,
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`rows` completions of `length` tokens each (prompt included), in bins of at most `bin_tokens`."""

    name: str
    shape: str
    rows: int
    length: int
    bin_tokens: int
    four_bit: bool = False
    rank: int = 16
    options: tuple[tuple[str, Any], ...] = ()  # of Policy


CASES = (
    Case("llama-8b-lora", "llama-3.1-8b", 1, 20_480, 20_480),
    Case("llama-8b-qlora", "llama-3.1-8b", 1, 20_480, 20_480, four_bit=True),
    Case("llama-8b-lora-group", "llama-3.1-8b", 8, 20_480, 20_480),
    Case("qwen3-1.7b-lora", "qwen3-1.7b", 8, 4_352, 17_408),
)
TOY = (Case("toy-lora", "toy", 2, 300, 300, rank=4), Case("toy-group", "toy", 10, 300, 600, rank=4))


# --- models and data -------------------------------------------------------------------------------------------------


def build(case: Case, device: torch.device, dtype: torch.dtype, **changes: Any) -> nn.Module:
    """A causal LM of the case's shape with random weights and LoRA on all linear layers; B is not zero."""
    import transformers

    name, values = SHAPES[case.shape]
    config = getattr(transformers, f"{name}Config")(**{**values, **changes}, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    model.to_empty(device=device)
    _fill(model, config)
    if case.four_bit:
        _quantise(model, dtype)
    model = add_adapter(model, AdapterConfig(r=case.rank))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.02)
    return model


def _fill(model: nn.Module, config: Any) -> None:
    """Random weights, made where they are: the libraries' own initialisation takes a minute for 8B."""
    for key, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0 if "norm" in key else 0.0)
    for path, module in list(model.named_modules()):
        if hasattr(module, "inv_freq"):  # computed, not loaded
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, type(module)(config).to(next(model.parameters()).device))
    model.tie_weights()  # type: ignore[operator]


def _quantise(model: nn.Module, dtype: torch.dtype) -> None:
    """Linear layers but the head → NF4 with double quantisation, one by one."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name.endswith("lm_head"):
            continue
        weight = module.weight.data
        with torch.device("meta"):
            linear = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, dtype, quant_type="nf4"
            )
        linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
        if module.bias is not None:
            linear.bias = module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear.to(weight.device))
        module.weight.data = weight.new_empty(0)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Data:
    """The same tokens as rows (for peers) and as bins (for us), with advantages and reference log-probs."""

    ids: Tensor  # [rows, length]
    prompt: int
    advantages: Tensor  # [rows]
    reference: Tensor  # [rows, length − prompt]
    batches: list[TokenBatch]

    @staticmethod
    def make(case: Case, device: torch.device) -> Data:
        vocabulary = SHAPES[case.shape][1]["vocab_size"]
        generator = torch.Generator().manual_seed(1)
        prompt = min(PROMPT, case.length // 2)
        ids = torch.randint(0, vocabulary, (case.rows, case.length), generator=generator)
        advantages = torch.randn(case.rows, generator=generator)
        reference = -11 + torch.randn(case.rows, case.length - prompt, generator=generator)
        documents = [
            Document(row, ids[row, :prompt].tolist(), ids[row, prompt:].tolist(), (), float(advantages[row]))
            for row in range(case.rows)
        ]
        batches = []
        for batch in pack_documents(documents, case.bin_tokens):
            full = torch.zeros(batch.input_ids.shape[0])
            full[batch.scored_index] = torch.cat([reference[row] for row in batch.row_ids.tolist()])
            batches.append(replace(batch, reference_logprobs=full).to(device))
        return Data(ids.to(device), prompt, advantages.to(device), reference.to(device), batches)

    @property
    def totals(self) -> Totals:
        return Totals(self.reference.numel(), len(self.ids), 1)


def ours(policy: Policy, data: Data) -> Callable[[], None]:
    """Forward and backward of every bin: what grpo/trainer/update.py does with them."""

    def run() -> None:
        policy.module.train()
        for batch in data.batches:
            output = policy.logprobs(batch, 1.0, return_entropy=True)
            assert batch.reference_logprobs is not None
            loss, _ = policy_loss(
                "grpo",
                output.logprobs,
                batch.advantages.index_select(0, batch.scored_index),
                batch.completion_cu_seqlens,
                reference_logprobs=batch.reference_logprobs.index_select(0, batch.scored_index),
                entropy=output.entropy,
                totals=data.totals,
                beta=BETA,
            )
            loss.backward()

    return run


def trl(model: nn.Module, data: Data, device: torch.device) -> Callable[[], None]:
    """TRL's own compute_loss on the same tokens, all rows in one micro-batch."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from grpo.demo import make_tokenizer

    arguments = GRPOConfig(
        output_dir="/tmp/trl",
        per_device_train_batch_size=len(data.ids),
        num_generations=max(2, len(data.ids)),
        generation_batch_size=max(2, len(data.ids)),
        beta=BETA,
        bf16=device.type == "cuda",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to=[],
        use_cpu=device.type == "cpu",
    )
    rows = Dataset.from_list([{"prompt": "x"}] * max(2, len(data.ids)))
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=rows,
        processing_class=make_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    # What `trainer.train()` does before its first step.
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model.enable_input_require_grads()  # type: ignore[operator]
    model.train()
    prompt, completion = data.ids[:, : data.prompt], data.ids[:, data.prompt :]
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "advantages": data.advantages,
        "ref_per_token_logps": data.reference,
        "num_items_in_batch": torch.tensor(completion.numel(), device=device),
    }

    def run() -> None:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()

    return run


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A way to run the update. `options` are Policy's."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    peer: bool = False


METHODS = (
    Method("ours, offload", (("activation_checkpointing", "offload"),)),
    Method("ours, offload, attention kept", (("activation_checkpointing", "offload"), ("keep_attention", True))),
    Method("ours, recompute", (("activation_checkpointing", "recompute"),)),
    Method("ours, offload, tiled MLP", (("activation_checkpointing", "offload"), ("tiled_mlp", True))),
    Method("stock layers, recompute", (("activation_checkpointing", "recompute"), ("fused_kernels", False))),
    Method("TRL", peer=True),
)


def rows(case: Case, methods: list[Method], device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """Seconds and GiB of each method on one case, or why there are none. Our methods share one model, in turn."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    data = Data.make(case, device)
    model = None
    for method in methods:
        result: dict[str, Any] = {"method": method.name}
        policy = None
        try:
            if model is None or method.peer:
                model = None
                _clear(device)
                model = build(case, device, dtype)
                weights = _allocated(device)
            policy = None if method.peer else Policy(model, **dict(method.options))
            run = trl(model, data, device) if policy is None else ours(policy, data)
            first = None
            if policy is not None and len(data.batches) > LONG:  # one bin warms up, then all are timed once
                first = ours(policy, replace(data, batches=data.batches[:1]))
            result |= _measured(run, model, device, seconds, first)
            result["weights_gib"] = round(weights / GIB, 3)
            result["tokens_per_s"] = round(data.ids.numel() / result["forward_backward"]["median_ms"] * 1e3, 1)
            if policy is not None and policy.checkpointer is not None and policy.checkpointer.host is not None:
                arena = policy.checkpointer.host.arena
                result |= {"pinned_gib": round(arena.capacity / GIB, 3), "payload_gib": round(arena.peak / GIB, 3)}
            del run
        except torch.OutOfMemoryError:
            result["skipped"] = "out of memory"
        except ImportError as error:
            result["skipped"] = f"{error}"
        if policy is not None and policy.checkpointer is not None:
            policy.checkpointer.remove()
        del policy
        _clear(device)
        yield result


def _once(run: Callable[[], None], device: torch.device) -> Measurement:
    """One call, for those that take many seconds: its own time and peak."""
    before = _allocated(device)
    start = time.perf_counter()
    run()
    _allocated(device)  # synchronises
    duration = (time.perf_counter() - start) * 1e3
    peak = (torch.cuda.max_memory_allocated() - before) / GIB if device.type == "cuda" else None
    return Measurement(duration, duration, duration, 1, peak)


def _measured(
    run: Callable[[], None],
    model: nn.Module,
    device: torch.device,
    seconds: float,
    warm_up: Callable[[], None] | None,
) -> dict[str, Any]:
    def clean_run() -> None:
        run()
        model.zero_grad(set_to_none=True)

    before = _allocated(device)
    if warm_up is None:
        (found,) = measure([clean_run], device, seconds=seconds)
    else:
        warm_up()
        model.zero_grad(set_to_none=True)
        found = _once(clean_run, device)
    result: dict[str, Any] = {"forward_backward": found.as_json()}
    if found.peak_gib is not None:
        result["peak_gib"] = round(found.peak_gib + before / GIB, 3)
        result["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
    return result


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def gradient_errors(case: Case, device: torch.device) -> dict[str, float]:
    """‖g − g*‖ / ‖g*‖ over all adapter gradients, two layers of the case's widths; g* in float32 without savings.

    With 4-bit weights g* uses the dequantised ones.
    """
    small = replace(case, rows=2, length=min(case.length, 1024), bin_tokens=1024 * 2, options=())
    data = Data.make(small, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    first = build(small, device, dtype, num_hidden_layers=2)
    dense = _dense_weights(first)
    del first

    def gradient(*, exact: bool = False, **options: Any) -> Tensor:
        four_bit = small.four_bit and not exact
        model = build(replace(small, four_bit=four_bit), device, torch.float32 if exact else dtype, num_hidden_layers=2)
        if exact:
            model.load_state_dict(dense, strict=False)
        ours(Policy(model, **options), data)()
        return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])

    truth = gradient(exact=True, fused_kernels=False)
    errors = {}
    plain = gradient(fused_kernels=False)
    errors["stock layers, no savings"] = float((plain - truth).norm() / truth.norm())
    for method in METHODS:
        if not method.peer:
            found = gradient(**dict(method.options))
            errors[method.name] = float((found - truth).norm() / truth.norm())
    return errors


def _dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight as a plain float32 tensor under its name in the state dict."""
    from grpo.kernels.nf4 import NF4Weight, dequantize

    found = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            key = f"{name}.{leaf}" if name else leaf
            quantised = hasattr(parameter, "quant_state") and parameter.quant_state is not None
            found[key] = (dequantize(NF4Weight.of(parameter)) if quantised else parameter.detach()).float().clone()
    return found


@contextmanager
def card_of(gigabytes: float) -> Iterator[None]:
    """This device, allowed to allocate that many GB (10^9 bytes)."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def longest(case: Case, gigabytes: float, lengths: list[int], device: torch.device) -> list[dict[str, Any]]:
    """One step (forward, backward, 8-bit AdamW) at each length, ascending, until one does not fit."""
    found: list[dict[str, Any]] = []
    with card_of(gigabytes):
        for length in lengths:
            gc.collect()
            torch.cuda.empty_cache()
            result: dict[str, Any] = {"card_gb": gigabytes, "tokens": length}
            try:
                found.append(result | _one_step(replace(case, length=length, bin_tokens=length), device))
            except torch.OutOfMemoryError as error:
                found.append(result | {"failed": str(error).splitlines()[0][:120]})
            print(json.dumps(found[-1]), flush=True)
            if "failed" in found[-1]:
                break
    return found


def _one_step(case: Case, device: torch.device) -> dict[str, Any]:
    from grpo.config import OptimizerConfig
    from grpo.optim import make_optimizer

    model = build(case, device, torch.bfloat16)
    policy = Policy(model, activation_checkpointing="offload", tiled_mlp=True)
    optimizer = make_optimizer(policy.trainable(), OptimizerConfig(name="adamw_8bit"))
    data = Data.make(case, device)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    ours(policy, data)()
    optimizer.step()
    torch.cuda.synchronize()
    assert policy.checkpointer is not None and policy.checkpointer.host is not None
    norm = torch.stack([p.grad.float().norm() for p in policy.trainable().values() if p.grad is not None]).norm()
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        "pinned_gib": round(policy.checkpointer.host.arena.capacity / GIB, 3),
        "gradient_norm": float(norm),
    }


# --- the table -------------------------------------------------------------------------------------------------------


def line(case: str, found: dict[str, Any], errors: dict[str, float]) -> str:
    """One row of the table."""
    if "skipped" in found:
        return f"| {case} | {found['method']} | – ({found['skipped']}) |  |  |  |  |  |"
    time_ = found["forward_backward"]
    error = errors.get(found["method"])
    return (
        f"| {case} | {found['method']} | {time_['median_ms'] / 1e3:.3f} | {found['tokens_per_s']:,.0f} "
        f"| {found.get('peak_gib', '')} | {found['weights_gib']} | {found.get('pinned_gib', '')} "
        f"| {'' if error is None else f'{error:.1e}'} |"
    )


HEADER = (
    "| case | method | forward + backward, s | tokens/s | peak GiB | weights GiB | pinned host GiB | gradient error |\n"
    + "|---" * 8
    + "|"
)


def table(data: dict[str, Any]) -> str:
    """Markdown of one results file: each case with the command that gave it."""
    lines = []
    for name, entry in data["cases"].items():
        lines += ["", _origin(entry["environment"]), "", HEADER]
        lines += [line(name, found, entry.get("gradient_errors", {})) for found in entry["rows"]]
        stock = entry.get("gradient_errors", {}).get("stock layers, no savings")
        if stock is not None:
            lines.append(f"| {name} | stock layers, no savings |  |  |  |  |  | {stock:.1e} |")
    for entry in data["longest"]:
        lines += ["", _origin(entry["environment"]), ""]
        lines += ["| card GB | tokens | seconds | peak GiB | reserved GiB | pinned host GiB |", "|---" * 6 + "|"]
        lines += [
            f"| {r['card_gb']:g} | {r['tokens']:,} | {r.get('seconds', 'does not fit')} | {r.get('peak_gib', '')} "
            f"| {r.get('reserved_gib', '')} | {r.get('pinned_gib', '')} |"
            for r in entry["rows"]
        ]
    return "\n".join(lines[1:])


def _origin(env: dict[str, Any]) -> str:
    return f"{env['device']}, torch {env['torch']}, commit {env['commit'][:12]}, {env['date']}: `{env['command']}`"


def write_table(readme: Path = HERE / "README.md") -> None:
    """Put the tables of all devices between the markers."""
    text = "\n\n".join(table(json.loads(p.read_text())) for p in sorted(HERE.glob("results/*/update.json")))
    before, rest = readme.read_text().split(MARKERS[0])
    readme.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, for checking this program")
    parser.add_argument("--case", action="append", help="names (default: all)")
    parser.add_argument("--only", action="append", help="names of methods (default: all)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing per figure")
    parser.add_argument("--no-errors", action="store_true", help="leave the gradient errors out")
    parser.add_argument("--longest", type=float, nargs="*", help="card sizes in GB")
    parser.add_argument("--tokens", type=int, nargs="*", help="lengths to try with --longest, ascending")
    parser.add_argument("--out", type=Path, help="default: profiling/results/<device>/update.json")
    parser.add_argument("--update", action="store_true", help="keep the other cases of an earlier run's JSON")
    parser.add_argument("--commit", help="recorded in the JSON where the checkout has no git")
    parser.add_argument("--table", action="store_true", help="rewrite profiling/README.md, measure nothing")
    given = parser.parse_args(arguments)
    if given.table:
        write_table()
        return
    device = torch.device(given.device)
    out = given.out or HERE / "results" / device_slug(given.device) / "update.json"
    env = environment(given.device, given.commit)
    data: dict[str, Any] = {"cases": {}, "longest": []}
    if given.update and out.exists():
        data |= json.loads(out.read_text())
    for gigabytes in given.longest or []:
        case = next(c for c in CASES if c.four_bit)
        data["longest"].append({"environment": env, "rows": longest(case, gigabytes, given.tokens or [], device)})
        _write(out, data)
    chosen = (
        []
        if given.longest is not None
        else [c for c in (TOY if given.toy else CASES) if not given.case or c.name in given.case]
    )
    for case in chosen:
        data["cases"][case.name] = {"environment": env, "rows": (kept := [])}
        methods = [m for m in METHODS if not given.only or m.name in given.only]
        for found in rows(case, methods, device, given.seconds):
            kept.append(found)
            print(line(case.name, found, {}), flush=True)
            _write(out, data)
        if not given.no_errors:
            data["cases"][case.name]["gradient_errors"] = gradient_errors(case, device)
            _write(out, data)
    print(table(data))


def _write(out: Path, data: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
