"""The planner against what the real objects hold, and against peaks measured on a GPU (profiling/results/)."""

import json
import weakref
from dataclasses import replace
from pathlib import Path as File

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo import planner
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
from grpo.planner import Planner, auto_kv_cache, auto_tokens_per_batch, documents_per_step, plan, plan_of_run
from grpo.rollout.engine import Sampling
from grpo.rollout.hf_engine import HFEngine, sample

from .tiny import tiny_model, tokenizer

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


# --- sampling --------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Most bytes of tensors made inside that were alive at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.users = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                self._born(tensor)
        return result

    def _born(self, tensor):
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        self.users[place] = self.users.get(place, 0) + 1
        if self.users[place] == 1:
            self.live += size
            self.peak = max(self.peak, self.live)
        weakref.finalize(tensor, self._gone, place, size)

    def _gone(self, place, size):
        self.users[place] -= 1
        if self.users[place] == 0:
            self.live -= size


def test_logits_take_what_sampling_really_holds():
    rows, vocabulary = 3, 50_000
    logits = torch.randn(rows, vocabulary)
    draws = torch.rand(rows, dtype=torch.float64)
    with LiveBytes() as counted:
        sample(logits, draws, Sampling(2, 4, 0.7, 1.0, 0, 0.0, (1,), 0))
    assert logits.nbytes + counted.peak == pytest.approx(logit_bytes(rows, vocabulary), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_kv_cache_is_the_engines_own(family):
    model = tiny_model(family, dtype=torch.bfloat16)
    engine = HFEngine(Policy(model), tokenizer())
    with torch.no_grad(), engine.policy.evaluating():
        state = engine._prefill([[2, 3, 4, 5, 6]] * 3)
        engine._advance(state, torch.tensor([7, 8, 9]))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in state.cache.layers)
    assert held == 3 * 6 * kv_bytes_per_token(model.config, "bfloat16")
    run = config(None, num_generations=3, max_sequences=3, max_prompt_length=5, max_completion_length=1)
    parts = hf_parts(facts_of(model, run), Path.of(run, facts_of(model, run)), held // 18, Sequences.of(run))
    assert parts["KV cache"] == held


def test_the_design_pages_own_figure_of_a_cache():
    assert kv_bytes_per_token(model_config("qwen3-1.7b")) == 112 * 1024
    assert 64 * 8 * 640 * kv_bytes_per_token(model_config("qwen3-1.7b")) == 35 * GIB


def test_sequences_at_once():
    run = config(None, prompts_per_step=5, num_generations=8, max_sequences=24)
    assert (Sequences.of(run).count, Sequences.of(run).prompts) == (24, 3)
    run = config(None, prompts_per_step=2, num_generations=8, max_sequences=256)
    assert (Sequences.of(run).count, Sequences.of(run).prompts) == (16, 2)


def vllm(**values):
    given = {"engine": "vllm", "max_sequences": 64, "max_prompt_length": 1024, "max_completion_length": 1024}
    return config({"r": 16}, **(given | values))


def test_auto_kv_cache_is_what_is_left_and_no_more_than_is_used():
    hf = model_config("qwen3-1.7b")
    facts = facts_of(hf, vllm())
    adapter_slot = facts.counts.trained * 2
    graphs = 2 * (19 + 11) * 28 * 174_000  # sizes 1, 2, 4, 8, 16, … 128, and those up to 64
    working = 64 * 151_936 * 4 + adapter_slot + int(0.2 * GIB) + graphs + 8192 * (2 * 2048 + 2 * 6144) * 2
    weights = weight_bytes(facts, vllm())
    trainer = sum(resident_parts(facts, vllm()).values()) + optimizer_bytes(facts, vllm())
    free = 9 * GIB
    assert auto_kv_cache(vllm(), hf, free) == int((free - trainer) * 0.95) - working
    assert auto_kv_cache(vllm(), hf, free - weights, model_loaded=True) == auto_kv_cache(vllm(), hf, free)
    own = auto_kv_cache(vllm(share_weights=False), hf, 14 * GIB)
    assert own == int((14 * GIB - trainer) * 0.95) - working - weights
    full = vllm().model_copy(update={"adapter": None})  # its base is trained, so the engine has its own
    every = facts_of(hf, full)
    trained = sum(resident_parts(every, full).values()) + optimizer_bytes(every, full)
    smaller = working - adapter_slot - graphs // 2  # no adapter, and graphs of one kind
    assert auto_kv_cache(full, hf, 24 * GIB) == int((24 * GIB - trained) * 0.95) - smaller - weights
    assert auto_kv_cache(vllm(), hf, 80 * GIB) == int(1.05 * 64 * 2048 * 112 * 1024)
    with pytest.raises(InputError, match=r"rollout.kv_cache is auto: the cache of one sequence takes 0.22 GiB"):
        auto_kv_cache(vllm(), hf, working + trainer)
    assert kv_cache_of(vllm(kv_cache="5GB"), facts, 1, 0, None) == 5 * 10**9
    for gpu in (None, "80GB"):  # what was asked for, whether or not the card is known
        assert Planner(hf, gpu).plan(vllm(kv_cache="5GB")).phase("rollout").parts["KV cache"] == 5 * 10**9
    unknown = Planner(hf).plan(vllm()).phase("rollout").parts["KV cache"]
    assert unknown == Planner(hf).plan(vllm(kv_cache=0.5)).phase("rollout").parts["KV cache"]
    assert unknown == int(1.05 * 64 * 2048 * 112 * 1024)
    assert kv_cache_of(vllm(kv_cache=0.25), facts, 1, 0, 80 * GIB) == 20 * GIB


# --- auto bins, verdict, advice --------------------------------------------------------------------------------------


def long_run(**values):
    given = {"prompts_per_step": 4, "num_generations": 8, "max_prompt_length": 1024, "max_completion_length": 7168}
    return config({"r": 16}, **(given | values))


def update_peak(run, hf, tokens):
    longest = 8192
    phases = Planner(hf, 1).update(run, Bin.full(tokens, longest).lengths, several_bins=tokens < 32 * longest)
    return max(phase.bytes for phase in phases)


def test_auto_bins_are_the_largest_that_fit():
    run, hf = long_run(), model_config("llama-3.1-8b")
    resident = sum(resident_parts(facts_of(hf, run), run).values())
    for free in (8 * GIB, 20 * GIB):
        tokens = auto_tokens_per_batch(run, hf, free)
        assert tokens % 1024 == 0 and 8192 < tokens < 32 * 8192
        room = (resident + free) / 1.05
        assert update_peak(run, hf, tokens) <= room < update_peak(run, hf, tokens + 1024)


def test_auto_bins_have_bounds(monkeypatch):
    run, hf = long_run(), model_config("llama-3.1-8b")
    assert auto_tokens_per_batch(run, hf, 0) == 8192  # a document is never cut
    assert auto_tokens_per_batch(run, hf, 10**15) == 65_536  # more would only cost memory
    small = long_run(max_prompt_length=64, max_completion_length=448)
    assert auto_tokens_per_batch(small, hf, 10**15) == 32 * 512  # a whole step
    offload = long_run(activation_checkpointing="offload")
    monkeypatch.setattr(planner, "available_host_bytes", lambda: 10 * GIB)
    assert auto_tokens_per_batch(offload, hf, 10**15) == int(0.8 * 10 * GIB / (31 * 4096 * 2)) // 1024 * 1024
    assert auto_tokens_per_batch(run, hf, 10**15) == 65_536
    assert auto_tokens_per_batch(run, hf, None) == 16_384
    sft = SFTConfig(model={"name_or_path": "x"}, adapter={"r": 16}, examples_per_step=3, max_completion_length=1000)
    assert auto_tokens_per_batch(sft, hf, 10**15) == 6 * 1024  # 3 · (1024 + 1000), whole steps of 1,024


def test_a_model_that_the_caller_made_is_planned_as_it_is():
    """An adapter of its own, weights in 4 bit: the configuration knows of neither."""
    run, hf = config(None, max_tokens_per_batch=8192), model_config("llama-3.1-8b")
    tokens, found = plan_of_run(run, hf, torch.device("cuda"), adapted=True, four_bit=True)
    wanted = plan(config({"r": 16}, max_tokens_per_batch=8192, model={"load_in_4bit": True}), hf_config=hf)
    assert tokens == 8192
    assert found.phases == wanted.phases


def test_phases_are_sums_of_named_parts():
    run, hf = long_run(beta=0.1), model_config("llama-3.1-8b")
    found = plan(run, "80GB", hf_config=hf)
    assert [phase.name for phase in found.phases] == [
        "load", "rollout", "score", "reference", "forward", "backward", "optimizer", "save"
    ]  # fmt: skip
    facts = facts_of(hf, run)
    score = resident_parts(facts, run) | {"optimizer state": optimizer_bytes(facts, run)}
    assert found.phase("score").parts == score
    assert found.phase("optimizer").bytes == sum(score.values()) + 2 * gradient_bytes(facts)  # gradients, √v
    assert found.phase("rollout").parts["KV cache"] == 32 * 8192 * 128 * 1024
    assert found.bytes_of("update") == max(found.phase(n).bytes for n in ("forward", "backward", "optimizer"))
    full = plan(config(None, beta=0.1), hf_config=hf)
    assert full.phase("save").parts["reference copy"] == full.phase("save").parts["weights"]


def test_it_fits_on_a_card_of_just_the_size_needed():
    run, hf = long_run(max_sequences=4), model_config("qwen3-1.7b")
    needed = plan(run, "80GB", hf_config=hf).needed
    assert needed == int(plan(run, "80GB", hf_config=hf).peak.bytes * 1.05) + CUDA_CONTEXT
    assert plan(run, needed, hf_config=hf).fits and not plan(run, needed - 1, hf_config=hf).fits


def test_a_bin_is_never_smaller_than_the_longest_document():
    run, hf = long_run(max_tokens_per_batch=4096), model_config("qwen2.5-0.5b")
    found = plan(run, "80GB", hf_config=hf)
    assert found.tokens_per_bin == 8192
    assert "update.max_tokens_per_batch is 4,096, the longest document has 8,192 tokens" in found.notes[0]


def test_savings_are_what_planning_again_gives():
    run, hf = long_run(max_sequences=2, activation_checkpointing="recompute"), model_config("llama-3.1-8b")
    planner = Planner(hf, "80GB")
    found = planner.plan(run)
    by_name = {saving.knob.text: saving.bytes for saving in savings(planner, found)}
    offload = run.model_copy(update={"update": run.update.model_copy(update={"activation_checkpointing": "offload"})})
    assert by_name["update.activation_checkpointing=offload"] == found.peak.bytes - planner.plan(offload).peak.bytes
    assert list(by_name.values()) == sorted(by_name.values(), reverse=True)
    assert min(by_name.values()) > 0


def test_savings_of_auto_bins_are_those_of_bins_of_that_size():
    planner = Planner(model_config("qwen3-1.7b"), "48GB")
    auto = planner.plan(long_run(max_sequences=2, max_tokens_per_batch="auto"))
    fixed = planner.plan(long_run(max_sequences=2, max_tokens_per_batch=auto.tokens_per_bin))
    assert auto.peak.name == "backward" and auto.tokens_per_bin > 16_384
    found = [[(saving.knob.text, saving.bytes) for saving in savings(planner, p)] for p in (auto, fixed)]
    assert found[0] == found[1]


def test_savings_of_an_auto_cache_are_those_of_a_cache_of_that_size():
    """It would otherwise grow into what a knob frees, and nothing would seem to help but sampling one at a time."""
    planner = Planner(model_config("qwen3-1.7b"), "24GB")
    auto = planner.plan(vllm(max_sequences=512, num_generations=8, prompts_per_step=16))
    assert auto.peak.name == "rollout" and auto.fits
    size = auto.phase("rollout").parts["KV cache"]
    fixed = planner.plan(vllm(max_sequences=512, num_generations=8, prompts_per_step=16, kv_cache=str(size)))
    found = [[(saving.knob.text, saving.bytes) for saving in savings(planner, p)] for p in (auto, fixed)]
    assert [pair for pair in found[1] if "kv_cache" not in pair[0]] == found[0]
    by_name = dict(found[0])
    assert by_name["rollout.max_sequences=64"] > 2**28  # half of what is sampled at once; graphs and logits
    assert by_name["model.load_in_4bit=true"] > 2**28


@pytest.mark.parametrize(
    ("shape", "gpu", "values"),
    [
        ("llama-3.1-8b", "24GB", {"max_sequences": 2}),
        ("llama-3.1-8b", "24GB", {}),
        ("llama-3.1-8b", "12GB", {}),
        ("llama-3.1-8b", "9GB", {"max_completion_length": 65_536}),
        ("qwen2.5-0.5b", "4GB", {"max_completion_length": 65_536}),
    ],
)
def test_the_proposal_fits_and_needs_each_of_its_knobs(shape, gpu, values):
    planner = Planner(model_config(shape), gpu)
    run = long_run(**values)
    found = planner.plan(run)
    assert not found.fits
    change = smallest_change(planner, found)

    def fits(chosen):
        config = run
        for knob in chosen:
            config = knob.applied(config)
        return planner.plan(config).fits

    assert change and fits(change)
    assert not any(fits([knob for knob in change if knob is not left_out]) for left_out in change)
    if len(change) == 2:
        assert not any(fits([knob]) for knob in knobs(run))


def test_where_nothing_helps_that_is_said():
    planner = Planner(model_config("qwen3-14b"), "6GB")
    found = planner.plan(long_run())
    assert smallest_change(planner, found) is None
    assert "no change of these knobs makes it fit" in plan_table(found, planner)[-1]


def test_host_memory_counts_for_the_verdict():
    planner = Planner(model_config("llama-3.1-8b"), "80GB")
    found = planner.plan(long_run(max_sequences=4, activation_checkpointing="offload"))
    assert found.host == {"layer inputs": 31 * 16_384 * 4096 * 2}
    assert replace(found, host_free=found.host["layer inputs"]).fits
    poor = replace(found, host_free=found.host["layer inputs"] - 1)
    assert not poor.fits and "too little" in plan_lines(poor)[-1]


def test_the_summary_and_the_comparison():
    run, hf = long_run(max_sequences=4), model_config("qwen3-1.7b")
    found = plan(run, "80GB", hf_config=hf)
    lines = plan_lines(found)
    assert lines[0].startswith("plan: peak ") and f"bins of {found.tokens_per_bin:,} tokens" in lines[0]
    assert lines[1].startswith("plan: fits: peak")
    planned = found.bytes_of("update") / GIB
    row = {
        "phase/rollout/peak_gib": 1.0, "phase/rollout/reserved_gib": 2.0, "phase/update/seconds": 3.0,
        "phase/update/peak_gib": planned * 0.97, "phase/update/reserved_gib": 99.0, "phase/save/seconds": 1.0,
        "phase/unknown/peak_gib": 500.0, "phase/unknown/reserved_gib": 500.0,
    }  # fmt: skip
    assert compare_line(found, row) == f"update: planned {planned:.2f} GiB, measured {planned * 0.97:.2f} GiB (−3 %)"
    assert compare_line(found, {"phase/update/peak_gib": 1.0}) is None  # memory of the process, not of a GPU
    assert documents_per_step(run) == 32


def test_the_scratch_of_packed_weights_is_the_kernels_own():
    pytest.importorskip("bitsandbytes")
    from grpo.bench_models import quantise, random_model
    from grpo.kernels.nf4 import SCRATCH

    run = config({"r": 4}, model={"load_in_4bit": True})
    SCRATCH.release()
    Policy(add_adapter(quantise(random_model("toy", "cpu", torch.bfloat16)), run.adapter))  # its probes run every layer
    held = SCRATCH.num_bytes
    SCRATCH.release()
    assert held == resident_parts(facts_of(model_config("toy"), run), run)["NF4 scratch"] > 0
