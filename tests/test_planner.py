"""The planner against what the real objects hold, and against peaks measured on a GPU (profiling/results/)."""

import json
from dataclasses import replace
from pathlib import Path as File

import pytest
import torch

from grpo.bench_models import model_config
from grpo.config import GRPOConfig, OptimizerConfig, SFTConfig
from grpo.errors import InputError
from grpo.kernels.logprobs_tiles import scratch_bytes
from grpo.model.adapter import add_adapter
from grpo.model.host_arena import HostArena
from grpo.model.policy import Policy
from grpo.optim import make_optimizer
from grpo.packing import Document, pack_documents
from grpo.plan_parts import (
    CUDA_CONTEXT,
    Facts,
    gradient_bytes,
    kv_bytes_per_token,
    optimizer_bytes,
    resident_parts,
    weight_bytes,
)
from grpo.plan_report import compare_line, knobs, plan_lines, plan_table, savings, smallest_change
from grpo.plan_rollout import Sequences, hf_parts, kv_cache_of, logit_bytes
from grpo.plan_update import Bin, Pass, Path, tile_bytes
from grpo.planner import Planner, auto_kv_cache, auto_tokens_per_batch, documents_per_step, plan
from grpo.rollout.engine import Sampling
from grpo.rollout.hf_engine import sample

from .tiny import tiny_model

GIB = 2**30
RESULTS = File(__file__).parent.parent / "profiling" / "results"


def config(adapter=None, **values):
    return GRPOConfig(model={"name_or_path": "tiny", **values.pop("model", {})}, adapter=adapter, **values)


def facts_of(model_or_config, run):
    return Facts(getattr(model_or_config, "config", model_or_config)).of(run)


# --- what stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("adapter", [None, {"r": 4}, {"r": 3, "dtype": "bfloat16", "target_modules": ["q_proj"]}])
def test_weights_adapter_and_gradients_are_those_of_the_real_model(family, adapter):
    model = tiny_model(family, dtype=torch.bfloat16)
    run = config(adapter)
    facts = facts_of(model, run)
    assert weight_bytes(facts, run) == sum(p.nbytes for p in model.parameters())
    if run.adapter is not None:
        model = add_adapter(model, run.adapter)
        adapters = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
        assert resident_parts(facts, run)["adapter"] == adapters
        copies = sum(p.numel() * 2 for name, p in model.named_parameters() if "lora_" in name)
        assert resident_parts(facts, run)["adapter in the model's dtype"] == copies
    assert gradient_bytes(facts) == sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_the_copies_of_adapters_are_what_the_checkpointer_refreshes():
    model = tiny_model("llama", dtype=torch.bfloat16)
    run = config({"r": 4})
    policy = Policy(add_adapter(model, run.adapter), activation_checkpointing="recompute")
    copies = sum(copy.nbytes for copy, _ in policy.checkpointer.refreshed)
    assert resident_parts(facts_of(model, run), run)["adapter in the model's dtype"] == copies


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_optimizer_state_is_what_a_real_step_leaves(name):
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    model = tiny_model("llama", vocab_size=300)
    run = config(None, model={"dtype": "float32"}, optimizer={"name": name})
    facts = facts_of(model, run)
    optimizer = make_optimizer(dict(model.named_parameters()), OptimizerConfig(name=name))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = {id(v): v for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v) and k != "step"}
    assert optimizer_bytes(facts, run) == sum(tensor.nbytes for tensor in tensors.values())


def test_packed_weights_are_what_bitsandbytes_holds():
    pytest.importorskip("bitsandbytes")
    from grpo.bench_models import quantise, random_model

    run = config({"r": 4}, model={"load_in_4bit": True})
    model = quantise(random_model("toy", "cpu", torch.bfloat16))
    held = sum(p.nbytes for p in model.parameters())
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            parts = (state.absmax, state.code, state.state2.code, state.state2.absmax, state.offset)
            held += sum(part.nbytes for part in parts)
    assert weight_bytes(facts_of(model_config("toy"), run), run) == held


# --- one layer -------------------------------------------------------------------------------------------------------


def saved_bytes(family, layers, run, rows):
    """Bytes of the distinct storages that autograd keeps of a forward pass, parameters aside."""
    dtype = getattr(torch, run.model.dtype)
    model = tiny_model(family, num_hidden_layers=layers, dtype=dtype)
    module = model if run.adapter is None else add_adapter(model, run.adapter)
    policy = Policy(module, fused_kernels=bool(run.update.fused_kernels), tiled_mlp=run.update.tiled_mlp)
    batch = pack_documents([Document(0, list(range(2, 10)), [3] * (rows - 7), (), 1.0)], rows)[0]
    assert batch.input_ids.shape[0] == rows
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    policy.module.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = policy.logprobs(batch, 1.0)
    assert output.logprobs.requires_grad
    return sum(found.values())


PATHS = [
    ("llama", {"r": 4}, "float32", {}),
    ("llama", {"r": 4}, "bfloat16", {}),
    ("qwen3", {"r": 4}, "bfloat16", {}),
    ("llama", {"r": 4}, "bfloat16", {"tiled_mlp": True}),
    ("qwen3", None, "float32", {}),
    ("llama", None, "bfloat16", {}),
    ("llama", None, "bfloat16", {"fused_kernels": False}),
    ("llama", {"r": 4}, "bfloat16", {"fused_kernels": False}),
    ("qwen3", {"r": 4}, "bfloat16", {"fused_kernels": False}),
]


@pytest.mark.parametrize(("family", "adapter", "dtype", "update"), PATHS)
def test_what_a_layer_keeps_is_what_autograd_saves(family, adapter, dtype, update):
    rows = 63
    run = config(adapter, model={"dtype": dtype}, update={"activation_checkpointing": "none", **update})
    model = tiny_model(family)
    one = Pass(facts_of(model, run), Path.of(run, facts_of(model, run)), Bin((rows,)))
    real = saved_bytes(family, 3, run, rows) - saved_bytes(family, 2, run, rows)
    expected = one.layer_input() + one.attention_kept() + one.mlp_kept()
    stock = update.get("fused_kernels") is False
    if stock and dtype == "bfloat16":
        expected -= one.layer_input()  # only its float32 copy, which the norm keeps, is saved
    if stock and adapter:
        expected += 7 * rows * 4 * 4  # x·Aᵀ of seven projections: less than a row per token
    if not (stock and adapter):
        # The CPU's attention hands its result out in another layout, so o_proj gets a copy; a GPU's does not.
        expected += one.of_width(one.facts.widths.queries)
    assert real == expected


@pytest.mark.parametrize("keep_attention", [False, True])
def test_host_bytes_are_those_of_an_arena_that_takes_the_same_tensors(keep_attention):
    run = config({"r": 4}, update={"activation_checkpointing": "offload", "keep_attention": keep_attention})
    facts = facts_of(model_config("llama-3.2-3b"), run)
    one = Pass(facts, Path.of(run, facts), Bin((20_480,)))
    sizes = [20_480 * 3072 * 2] + ([20_480 * 3072 * 2, 24 * 20_480 * 4] if keep_attention else [])
    assert all(size % 512 == 0 for size in sizes)
    wanted = 27 * sum(size for size in sizes if size >= 2 * 2**20)  # the last layer's input stays on the GPU
    assert one.host_bytes() == wanted
    small = config({"r": 4}, update={"activation_checkpointing": "offload"})
    tiny = facts_of(model_config("toy"), small)
    assert Pass(tiny, Path.of(small, tiny), Bin((600,))).host_bytes() == 0  # tensors below 2 MiB stay where they are
    arena = HostArena(pinned=False)
    arena.reserve(3, 513)
    assert arena.capacity == 3 * 1024  # as `host_bytes` rounds


def test_the_tile_is_the_kernels_own_count():
    run = config({"r": 4})
    for shape, chunk in (("llama-3.1-8b", 512), ("qwen3-1.7b", 128), ("qwen2.5-0.5b", 32)):
        facts = facts_of(model_config(shape), run)
        widths = facts.widths
        wanted = scratch_bytes(widths.hidden, widths.vocabulary, chunk)
        assert tile_bytes(facts, chunk, 10**6, with_product=True) == wanted


def test_the_head_without_gradient_allocates_the_tile_alone():
    run = config({"r": 4}, model={"dtype": "float32"})
    facts = facts_of(model_config("toy"), run)
    height, width = 40, 320  # 300 columns in a multiple of 64
    assert tile_bytes(facts, 512, 40, with_product=False) == height * (4 * width + 16)
    assert tile_bytes(facts, 512, 40, with_product=True) == height * (4 * width + 16 + 4 * width + (4 + 4) * 64)


# --- bins ------------------------------------------------------------------------------------------------------------


def test_rows_of_a_bin():
    assert Bin((4352,)).rows == 4608
    assert Bin((1000,)).rows == 1000
    assert Bin((4352, 4352)).rows == 8704
    assert Bin.full(10_000, 4_000).lengths == (4000, 4000, 2000)


def test_documents_that_share_a_bin_are_padded_and_copied():
    run = config({"r": 4})
    facts = facts_of(model_config("llama-3.1-8b"), run)
    path = Path.of(run, facts)
    alone = Pass(facts, path, Bin((8192,))).attention_kept()
    q, kv, out = 4096, 2 * 1024, 4096
    for lengths, more in (
        ((4096, 4096), out * 8192),  # read in place; the two results are put together
        ((4100, 4092), (q + kv) * (4608 + 4096 - 8192) + out * (4608 + 4096 - 8192) + out * 8192),
        ((7168, 1024), out * 8192),  # one alone, the rest in one call
        ((1024,) * 8, 0),
    ):
        assert Pass(facts, path, Bin(lengths)).attention_kept() - alone == more * 2, lengths


# --- measured peaks --------------------------------------------------------------------------------------------------

# The commits whose peaks stand in update.json kept the recomputed layer's output, one [T, H] more than the code does
# now; where weights were packed their probe refused packed attention, so that attention ran peft's own layers; and the
# first of them had no copies of the adapters.
OUTPUT_KEPT = ("20f12fdb", "10b5e4a2")
NO_COPIES = "20f12fdb"
CASES = {
    "llama-8b-lora": ("llama-3.1-8b", (20_480,), 1, False),
    "llama-8b-qlora": ("llama-3.1-8b", (20_480,), 1, True),
    "llama-8b-lora-group": ("llama-3.1-8b", (20_480,), 8, False),
    "qwen3-1.7b-lora": ("qwen3-1.7b", (4_352,) * 4, 2, False),
}
METHODS = {
    "ours, offload": {"activation_checkpointing": "offload"},
    "ours, offload, attention kept": {"activation_checkpointing": "offload", "keep_attention": True},
    "ours, recompute": {"activation_checkpointing": "recompute"},
    "ours, offload, tiled MLP": {"activation_checkpointing": "offload", "tiled_mlp": True},
}


def measured():
    for file in sorted(RESULTS.glob("*/update.json")):
        for name, case in json.loads(file.read_text())["cases"].items():
            for row in case["rows"]:
                if name in CASES and row["method"] in METHODS and "peak_gib" in row:
                    yield pytest.param(case["environment"]["commit"], name, row, id=f"{name}: {row['method']}")


def predicted(shape, lengths, bins, packed, update, *, as_then=None):
    """GiB of the peak, now or as the code of a commit had it; and of the arena."""
    run = config({"r": 16}, model={"load_in_4bit": packed}, update=update)
    facts = facts_of(model_config(shape), run)
    path, resident = Path.of(run, facts), resident_parts(facts, run)
    old = as_then is not None and as_then.startswith(OUTPUT_KEPT)
    if old and packed:
        path = replace(path, fused_attention=False)
    one = Pass(facts, path, Bin(lengths))
    peak = sum(resident.values()) + sum(one.backward(earlier_bins=bins > 1).values())
    if old:
        peak += one.layer_input()
        peak -= resident["adapter in the model's dtype"] if as_then.startswith(NO_COPIES) else 0
    return peak / GIB, one.host_bytes() / GIB


@pytest.mark.parametrize(("commit", "case", "row"), list(measured()))
def test_peaks_measured_on_a_gpu(commit, case, row):
    shape, lengths, bins, packed = CASES[case]
    then, host = predicted(shape, lengths, bins, packed, METHODS[row["method"]], as_then=commit)
    assert then == pytest.approx(row["peak_gib"], rel=0.01)
    assert host == pytest.approx(row.get("payload_gib", 0), rel=0.001)
    now, _ = predicted(shape, lengths, bins, packed, METHODS[row["method"]])
    if not packed:  # that one's attention is another path now
        assert now == pytest.approx(row["peak_gib"], rel=0.05)


def test_the_longest_step_measured_on_a_gpu():
    files = sorted(RESULTS.glob("*/update.json"))
    rows = [
        (e["environment"]["commit"], r) for f in files for e in json.loads(f.read_text())["longest"] for r in e["rows"]
    ]
    for commit, row in rows:
        if "peak_gib" in row and commit.startswith(OUTPUT_KEPT):
            update = METHODS["ours, offload, tiled MLP"]
            then, host = predicted("llama-3.1-8b", (row["tokens"],), 1, True, update, as_then=commit)
            assert then == pytest.approx(row["peak_gib"], rel=0.05)
            assert host == pytest.approx(row["pinned_gib"], rel=0.001)
