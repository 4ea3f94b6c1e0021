"""The checkpointer: its gradients are those of no checkpointing, bit for bit, whatever is kept where."""

import gc

import pytest
import torch
from torch import nn

from grpo.config import AdapterConfig
from grpo.errors import RunError
from grpo.model import host_arena
from grpo.model.adapter import add_adapter
from grpo.model.host_arena import ALIGNMENT, HostArena
from grpo.model.offload import Checkpointer
from grpo.model.policy import Policy
from grpo.packing import Document, pack_documents
from tests.tiny import tiny_model

MODES = ["none", "recompute", "offload"]


def adapted(family="qwen3", seed=0, dropout=0.0, size=0.3, **changes):
    model = add_adapter(tiny_model(family, seed=seed, **changes), AdapterConfig(r=4, dropout=dropout))
    torch.manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=size)
    return model


def bins(count=3, seed=0, length=12, budget=24):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 60, (count, length), generator=generator).tolist()
    return pack_documents([Document(i, row[:4], row[4:]) for i, row in enumerate(ids)], budget)


def gradients(policy, batches, seed=0):
    policy.module.train()
    policy.module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    for batch in batches:
        policy.logprobs(batch.to(policy.device), 1.0).logprobs.sum().backward()
    return {name: p.grad.clone() for name, p in policy.trainable().items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert any(value.abs().sum() > 0 for value in wanted.values())


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_gradients_are_those_without_checkpointing(family, fused, mode):
    """LoRA on a frozen embedding: the first layer's input needs no gradient, its adapter does."""
    wanted = gradients(Policy(adapted(family), fused_kernels=fused), bins())
    policy = Policy(adapted(family), fused_kernels=fused, activation_checkpointing=mode)
    assert_same(gradients(policy, bins()), wanted)
    first = next(value for name, value in wanted.items() if ".0." in name and "lora_A" in name)
    assert first.abs().sum() > 0


@pytest.mark.parametrize("mode", MODES[1:])
def test_full_fine_tuning_too(mode):
    wanted = gradients(Policy(tiny_model()), bins())
    assert_same(gradients(Policy(tiny_model(), activation_checkpointing=mode), bins()), wanted)


@pytest.mark.parametrize("mode", MODES[1:])
def test_dropout_draws_the_same_numbers_twice(mode):
    policy = Policy(adapted(dropout=0.5), activation_checkpointing=mode)
    found = gradients(policy, bins())
    after = torch.rand(1)
    wanted = gradients(Policy(adapted(dropout=0.5)), bins())
    assert_same(found, wanted)
    assert torch.equal(after, torch.rand(1))  # the generator went on from where the forward pass left it


def test_layers_run_twice_under_checkpointing_and_once_without_gradient():
    policy = Policy(adapted(), activation_checkpointing="recompute")
    counts = []
    for layer in policy.backbone.layers:
        layer.mlp.register_forward_hook(lambda *_: counts.append(1))
    gradients(policy, bins(1))
    assert len(counts) == 2 * len(policy.backbone.layers)
    counts.clear()
    with torch.no_grad():
        policy.logprobs(bins(1)[0], 1.0)
    assert len(counts) == len(policy.backbone.layers)


@pytest.mark.parametrize("before", ["ours", "transformers"])
def test_none_means_none_whoever_switched_it_on_before(before):
    wanted = gradients(Policy(adapted(), fused_kernels=False), bins())
    model, counts = adapted(), []
    if before == "ours":
        Policy(model, activation_checkpointing="recompute")
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model, fused_kernels=False)
    for layer in policy.backbone.layers:
        layer.mlp.register_forward_hook(lambda *_: counts.append(1))
    assert_same(gradients(policy, bins()), wanted)
    assert len(counts) == len(policy.backbone.layers) * len(bins())


def test_scoring_in_between_leaves_checkpointing_on():
    """Layers run once while scoring and twice again afterwards."""
    policy, counts = Policy(adapted(), activation_checkpointing="offload"), []
    for layer in policy.backbone.layers:
        layer.mlp.register_forward_hook(lambda *_: counts.append(1))
    layers = len(policy.backbone.layers)
    for _ in range(2):
        gradients(policy, bins(1))
        assert len(counts) == 2 * layers
        counts.clear()
        with policy.reference() as reference:
            reference.logprobs(bins(1)[0], 1.0)
        with policy.evaluating(), torch.no_grad():
            policy.logprobs(bins(1)[0], 1.0)
        assert len(counts) == 2 * layers
        counts.clear()


def test_offload_says_so_where_there_is_nothing_to_offload_to():
    assert any("offload: on cpu" in line for line in Policy(tiny_model(), activation_checkpointing="offload").notes())
    assert not any("offload" in line for line in Policy(tiny_model(), activation_checkpointing="recompute").notes())


def test_graphs_may_be_in_flight_together_and_finish_in_any_order():
    batches = bins(6)
    wanted = gradients(Policy(adapted()), batches)
    policy = Policy(adapted(), activation_checkpointing="offload")
    policy.module.train()
    losses = [policy.logprobs(batch, 1.0).logprobs.sum() for batch in batches]
    assert len(losses) > 2
    for loss in losses:
        loss.backward()
    assert_same({name: p.grad for name, p in policy.trainable().items()}, wanted)


def test_remove_leaves_the_layers_as_they_were():
    model = tiny_model("llama")
    layers = list(model.model.layers)
    before = [dict(vars(layer)) for layer in layers]
    checkpointer = Checkpointer("recompute")
    checkpointer.install(layers)
    assert all(layer.gradient_checkpointing for layer in layers)
    checkpointer.remove()
    assert [dict(vars(layer)).keys() for layer in layers] == [values.keys() for values in before]
    assert not any(layer.gradient_checkpointing for layer in layers)


def test_an_argument_that_needs_a_gradient_is_refused():
    layer = nn.Linear(4, 4)
    checkpointer = Checkpointer("recompute")
    checkpointer.install([layer])
    with pytest.raises(ValueError, match="argument beside the hidden states"):
        layer._gradient_checkpointing_func(lambda x, y: layer(x) + y, torch.ones(4), torch.ones(4, requires_grad=True))
    with pytest.raises(ValueError, match="more than hidden states"):
        layer._gradient_checkpointing_func(lambda x: (layer(x), x), torch.ones(4))


def test_a_layer_that_returns_a_tuple_with_none_keeps_its_tuple():
    layer = nn.Linear(4, 4)
    checkpointer = Checkpointer("recompute")
    checkpointer.install([layer])
    out, rest = layer._gradient_checkpointing_func(lambda x: (layer(x), None), torch.ones(4))
    out.sum().backward()
    assert rest is None
    assert torch.equal(layer.weight.grad, torch.ones(4, 4))


# --- host memory -----------------------------------------------------------------------------------------------------


def test_bins_a_little_longer_than_any_before_do_not_pin_anew(monkeypatch):
    arena, slabs = HostArena(pinned=False), []
    monkeypatch.setattr(arena, "_add", lambda size, add=arena._add: slabs.append(size) or add(size))
    for tokens in (1000, 1001, 1005, 1012, 1030, 1031):
        arena.reserve(8, tokens * ALIGNMENT)
        leases = [arena.lease(tokens * ALIGNMENT) for _ in range(8)]
        assert arena.capacity <= 1.05 * arena.peak
        del leases
    assert slabs == [8000 * ALIGNMENT, (8008 + 241) * ALIGNMENT]
    monkeypatch.setattr(host_arena, "available_host_bytes", lambda: 8801 * ALIGNMENT)
    arena.reserve(8, 1100 * ALIGNMENT)  # 3 % more than this are not there
    assert slabs[2:] == [8800 * ALIGNMENT]


def test_the_arena_is_as_large_as_what_it_holds():
    arena = HostArena(pinned=False)
    arena.reserve(7, 1000 * ALIGNMENT)
    leases = [arena.lease(1000 * ALIGNMENT) for _ in range(7)]
    assert arena.capacity == arena.leased == arena.peak == 7000 * ALIGNMENT
    del leases
    assert arena.leased == 0
    arena.reserve(9, 2000 * ALIGNMENT)  # larger bins: the old slab goes, and sizes are known to vary
    assert arena.capacity == 18_540 * ALIGNMENT
    arena.reserve(5, 1000 * ALIGNMENT)  # smaller ones fit in what is there
    assert arena.capacity == 18_540 * ALIGNMENT


def test_leases_never_overlap_and_free_ranges_join():
    torch.manual_seed(0)
    arena = HostArena(pinned=False)
    arena.reserve(1, 64 * ALIGNMENT)
    held = {}
    for step in range(400):
        if held and torch.rand(()) < 0.5:
            lease, tensor, mark = held.pop(list(held)[int(torch.randint(len(held), ()))])
            assert torch.equal(tensor, torch.full_like(tensor, mark))
            lease.release()
            lease.release()  # twice does nothing
        else:
            lease = arena.lease(int(torch.randint(1, 9 * ALIGNMENT, ())))
            tensor = lease.view(torch.empty(lease._size // 4 // 2, 2, dtype=torch.float32))
            tensor.fill_(step)
            held[step] = lease, tensor, step
        assert arena.leased <= arena.capacity
    held.clear()
    del lease
    assert arena.leased == 0
    assert all(slab.free == [(0, slab.memory.numel())] for slab in arena._slabs)


def test_a_lease_ends_with_its_owner():
    arena = HostArena(pinned=False)
    owner = [arena.lease(100)]
    assert arena.leased == ALIGNMENT
    owner.clear()
    gc.collect()
    assert arena.leased == 0


def test_more_than_the_host_has_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(host_arena, "available_host_bytes", lambda: 3 * 2**30)
    with pytest.raises(RunError, match=r"offload: layer inputs need 4\.0 GiB of host memory and 3\.0 GiB are free"):
        HostArena(pinned=False).reserve(4, 2**30)


def test_the_containers_limit_counts(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    monkeypatch.setattr(host_arena, "_CGROUP", tmp_path)
    assert host_arena.available_host_bytes() == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert host_arena.available_host_bytes() > 10**8


# --- on a GPU --------------------------------------------------------------------------------------------------------


def wide(mode, dtype=torch.bfloat16, **options):
    """A model whose layer inputs are worth offloading."""
    model = tiny_model(
        "llama", hidden_size=1024, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, dtype=dtype
    ).cuda()
    options.setdefault("fused_kernels", True)
    return Policy(add_adapter(model, AdapterConfig(r=4)), activation_checkpointing=mode, **options)


@pytest.mark.gpu
def test_gpu_offload_is_bitwise_recompute():
    batches = bins(4, length=200, budget=4000) * 2
    batches += bins(40, length=200, budget=8000)
    recompute, offload = wide("recompute", torch.float32), wide("offload", torch.float32)
    assert_same(gradients(offload, batches), gradients(recompute, batches))
    arena = offload.checkpointer.host.arena
    assert arena.peak > 0
    assert arena.leased == 0
    assert arena.capacity <= 1.05 * arena.peak


@pytest.mark.gpu
def test_gpu_attention_that_was_kept_is_not_computed_again():
    """Log-probs to the bit; gradients as near as two runs of cuDNN's backward pass are."""
    batch = bins(1, length=3000, budget=4000)[0].to("cuda")
    peaks, results = [], []
    for keep in (False, True):
        policy = wide("offload", keep_attention=keep)
        policy.module.train()
        logprobs = policy.logprobs(batch, 1.0).logprobs
        logprobs.sum().backward()
        results.append((logprobs.detach(), [p.grad.clone() for p in policy.trainable().values()]))
        peaks.append(policy.checkpointer.host.arena.peak)
    (stock, wanted), (kept, found) = results
    assert torch.equal(stock, kept)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))
    assert peaks[1] >= 1.9 * peaks[0]  # five layer inputs and five attention outputs


@pytest.mark.gpu
def test_gpu_memory_does_not_grow_with_graphs_in_flight():
    """With offload each further graph leaves almost nothing on the device; without, it leaves its layer inputs."""
    grown = {}
    for mode in ("offload", "recompute"):
        policy = wide(mode)
        policy.module.train()
        batch = bins(20, length=200, budget=8000)[0].to("cuda")
        policy.logprobs(batch, 1.0).logprobs.sum().backward()
        held, levels = [], []
        for _ in range(6):
            held.append(policy.logprobs(batch, 1.0).logprobs.sum())
            torch.cuda.synchronize()
            levels.append(torch.cuda.memory_allocated())
        grown[mode] = (levels[-1] - levels[1]) / 4
        for loss in held:
            loss.backward()
        policy.module.zero_grad()
        del held, policy
        gc.collect()
    payload = 4000 * 1024 * 2
    assert grown["offload"] < 0.3 * payload, grown  # the rotary tables, [T, 128] each, and the log-probs
    assert grown["recompute"] > 4 * payload, grown


@pytest.mark.gpu
def test_gpu_one_graph_gradients_equal_one_by_one():
    batches = [b.to("cuda") for b in bins(40, length=200, budget=4000)]
    policy = wide("offload", torch.float32)
    wanted = gradients(policy, batches)
    policy.module.zero_grad(set_to_none=True)
    sum(policy.logprobs(batch, 1.0).logprobs.sum() for batch in batches).backward()
    for name, p in policy.trainable().items():
        assert torch.allclose(p.grad, wanted[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.gpu
def test_gpu_a_forward_pass_that_fails_leaves_nothing_behind():
    batch = bins(20, length=200, budget=8000)[0].to("cuda")

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def once():
        policy = wide("offload")
        policy.module.train()
        policy.layers[4].register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            policy.logprobs(batch, 1.0)

    once()  # what libraries allocate once
    gc.collect()
    level = torch.cuda.memory_allocated()
    once()
    gc.collect()
    assert torch.cuda.memory_allocated() == level


@pytest.mark.gpu
def test_gpu_memory_returns_to_its_level_after_each_bin():
    policy = wide("offload")
    policy.module.train()
    levels = []
    for batch in bins(60, length=200, budget=4000):
        policy.logprobs(batch.to("cuda"), 1.0).logprobs.sum().backward()
        torch.cuda.synchronize()
        levels.append(torch.cuda.memory_allocated())
    assert len(levels) >= 3
    assert max(levels[1:]) - min(levels[1:]) < 2**20, levels


@pytest.mark.gpu
def test_gpu_the_host_never_waits_in_a_step():
    """A synchronising call raises in this mode."""
    policy = wide("offload")
    batch = bins(20, length=200, budget=8000)[0].to("cuda")
    gradients(policy, [batch])
    policy.module.train()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy.logprobs(batch, 1.0).logprobs.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
