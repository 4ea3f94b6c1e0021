"""Views, copies and adapter slots on a stand-in for the engine's model: fused projections, padded embedding, wrappers.

The real engine's layouts are held against these rules on a GPU (test_vllm_engine.py).
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from grpo.config import AdapterConfig
from grpo.errors import InputError, RunError
from grpo.model.adapter import adapter_modules, add_adapter, base_of
from grpo.rollout.vllm_weights import (
    check_rank,
    copy_weights,
    engine_views,
    read_back,
    set_adapter,
    share_base,
)
from tests.tiny import tiny_model

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
PADDING = 3  # rows of the engine's embedding beyond the vocabulary


class EngineModel(nn.Module):
    """A Hugging Face model as vLLM holds it: q, k, v and gate, up concatenated, embedding padded, perhaps wrapped."""

    packed_modules_mapping = FUSED

    def __init__(self, model, wrapped=False):
        super().__init__()
        tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            parent, _, part = module.rpartition(".")
            whole = next((w for w, parts in FUSED.items() if part in parts), None)
            if whole is None:
                if "embed_tokens" in name:
                    tensor = torch.cat([tensor, torch.full((PADDING, tensor.shape[1]), 9.0)])
                self.put(module + (".base_layer" if wrapped and part == "o_proj" else ""), leaf, tensor)
            elif part == FUSED[whole][0]:
                rows = torch.cat([tensors[f"{parent}.{other}.{leaf}"] for other in FUSED[whole]])
                self.put(f"{parent}.{whole}" + (".base_layer" if wrapped else ""), leaf, rows)

    def put(self, path, leaf, tensor):
        module = self
        for part in path.split("."):
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, nn.Parameter(tensor.clone(), requires_grad=False))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_tensor_is_found_in_the_fused_model(family, wrapped):
    model = tiny_model(family)
    views = engine_views(EngineModel(model, wrapped), model.named_parameters())
    assert set(views) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(views[name], parameter), name


def test_shared_weights_are_the_engines_memory_and_give_the_same_logits():
    model, ids = tiny_model(), torch.arange(5)[None]
    wanted = model(ids).logits
    engine = EngineModel(model)
    total = sum(p.nbytes for p in model.parameters())
    shared = share_base(model, engine, torch.device("cpu"))
    assert (shared.num_bytes, shared.own_bytes, shared.own) == (total, 0, ())
    theirs = {p.untyped_storage().data_ptr() for p in engine.parameters()}
    assert all(p.untyped_storage().data_ptr() in theirs and not p.requires_grad for p in model.parameters())
    assert torch.equal(model(ids).logits, wanted)
    engine.model.layers._modules["0"].self_attn.qkv_proj.weight.data.zero_()
    assert not torch.equal(model(ids).logits, wanted)


def test_a_tensor_that_differs_by_one_bit_stays_the_models_own():
    model = tiny_model()
    engine = EngineModel(model)
    engine.model.layers._modules["1"].mlp.gate_up_proj.weight.data[-1, -1] += 1  # the last row of up_proj
    value = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    shared = share_base(model, engine, torch.device("cpu"))
    assert shared.own == ("model.layers.1.mlp.up_proj.weight",)
    assert shared.own_bytes == value.nbytes
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, value)


def test_copying_makes_the_engine_equal():
    model = tiny_model()
    engine = EngineModel(model)
    trained = tiny_model(seed=7)
    assert copy_weights(trained, engine) == sum(p.nbytes for p in trained.parameters())
    again = EngineModel(trained)
    for (name, found), (_, wanted) in zip(engine.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(found, wanted), name


def test_a_weight_without_a_place_and_an_engine_weight_without_a_source_are_refused():
    model = tiny_model()
    engine = EngineModel(model)
    del engine.model.layers._modules["0"].self_attn.qkv_proj.weight
    with pytest.raises(RunError, match=r"no place for 3 weights, e\.g\. model\.layers\.0\.self_attn\.q_proj"):
        copy_weights(model, engine)
    engine = EngineModel(model)
    engine.put("model.extra", "weight", torch.ones(3))
    with pytest.raises(RunError, match=r"belong to no weight of the policy, e\.g\. model\.extra\.weight"):
        copy_weights(model, engine)


def test_reading_back_compares_after_the_cast():
    sent = torch.tensor([1.0, 1.001])
    read_back([("a", sent, sent.bfloat16())], "weights")
    with pytest.raises(RunError, match="does not hold the weights that were sent: b differs"):
        read_back([("a", sent, sent), ("b", sent, torch.tensor([1.0, 1.002]))], "weights")


# --- adapters ------------------------------------------------------------------------------------------------


class Slots:
    """What `set_adapter` needs of vLLM's adapter manager, with its rules: ids are keys, `add` scales B in place."""

    def __init__(self, model, rank, skip=()):
        self.model = SimpleNamespace()
        self.modules, self.packed_modules, self.lora_index_to_id, self.registered = {}, {}, [None], {}
        shapes = {path: parts.base.weight.shape for path, parts in adapter_modules(model).items() if path not in skip}
        for path, (rows, width) in shapes.items():
            parent, _, part = path.rpartition(".")
            whole = next((w for w, parts in FUSED.items() if part in parts), part)
            name = f"{parent}.{whole}"
            layer = self.modules.setdefault(name, SimpleNamespace(lora_a_stacked=[], lora_b_stacked=[]))
            layer.lora_a_stacked.append(torch.zeros(1, 1, rank, width))
            layer.lora_b_stacked.append(torch.zeros(1, 1, rows, rank))
            if whole != part:
                self.packed_modules.setdefault(name, []).append(path)
        self.removed = []

    def remove_adapter(self, number):
        self.removed.append(number)
        self.lora_index_to_id = [None]

    def add_adapter(self, lora):
        for layer in lora.loras.values():
            layer["b"].mul_(lora.scale)  # as the engine does: its own copy, or the trainer's adapter would follow
        self.registered[lora.id] = lora

    def activate_adapter(self, number):
        self.lora_index_to_id[0] = number
        for name, layer in self.modules.items():
            for place, path in enumerate(self.packed_modules.get(name, [name])):
                found = self.registered[number].loras[path]
                layer.lora_a_stacked[place][0, 0, : found["a"].shape[0]] = found["a"]
                layer.lora_b_stacked[place][0, 0, :, : found["b"].shape[1]] = found["b"]


class LoRAModel:
    def __init__(self, number, loras, scale):
        self.id, self.loras, self.scale = number, loras, scale

    @classmethod
    def from_lora_tensors(cls, number, tensors, helper, *, device, dtype, model_vocab_size, weights_mapper):
        loras = {}
        for name, tensor in tensors.items():
            path, _, matrix = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            loras.setdefault(path, {})[matrix[-1].lower()] = tensor.to(dtype)
        return cls(number, loras, helper.scale)


class PEFTHelper:
    @classmethod
    def from_dict(cls, values):
        helper = cls()
        helper.scale = values["lora_alpha"] / values["r"]
        return helper

    def validate_legal(self, config):
        pass


@pytest.fixture
def vllm(monkeypatch):
    """The two classes of vLLM that `set_adapter` imports."""
    monkeypatch.setitem(sys.modules, "vllm.lora.lora_model", SimpleNamespace(LoRAModel=LoRAModel))
    monkeypatch.setitem(sys.modules, "vllm.lora.peft_helper", SimpleNamespace(PEFTHelper=PEFTHelper))


def adapted(alpha=32.0):
    model = base_of(add_adapter(tiny_model(), AdapterConfig(r=4, alpha=alpha)))
    with torch.no_grad():
        for parts in adapter_modules(model).values():
            parts.b.normal_()
    return model


def worker_of(slots):
    manager = SimpleNamespace(
        _adapter_manager=slots, lora_config=SimpleNamespace(lora_dtype=torch.float32), vocab_size=61
    )
    return SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager), device=torch.device("cpu"))


def test_slots_hold_a_and_scaled_b_and_the_trainers_own_are_untouched(vllm):
    model = adapted()
    before = {path: (p.a.detach().clone(), p.b.detach().clone()) for path, p in adapter_modules(model).items()}
    slots = Slots(model, rank=8)
    num_bytes = set_adapter(worker_of(slots), adapter_modules(model), 1, None)
    assert num_bytes == sum(p.a.nbytes + p.b.nbytes for p in adapter_modules(model).values())
    for path, parts in adapter_modules(model).items():
        parent, _, part = path.rpartition(".")
        whole = next((w for w, members in FUSED.items() if part in members), part)
        place = FUSED.get(whole, [part]).index(part)
        layer = slots.modules[f"{parent}.{whole}"]
        assert torch.equal(layer.lora_a_stacked[place][0, 0, :4], before[path][0])
        assert torch.equal(layer.lora_b_stacked[place][0, 0, :, :4], before[path][1] * 8)  # alpha / r
        assert torch.equal(parts.a, before[path][0])
        assert torch.equal(parts.b, before[path][1])


def test_a_new_version_takes_the_place_of_the_old_one(vllm):
    model = adapted()
    slots = Slots(model, rank=4)
    set_adapter(worker_of(slots), adapter_modules(model), 1, None)
    with torch.no_grad():
        for parts in adapter_modules(model).values():
            parts.b.mul_(2)
    set_adapter(worker_of(slots), adapter_modules(model), 2, 1)
    assert (slots.removed, slots.lora_index_to_id) == ([1], [2])


def test_a_projection_without_a_slot_is_refused(vllm):
    model = adapted()
    slots = Slots(model, rank=4, skip=("model.layers.1.self_attn.o_proj",))
    with pytest.raises(
        RunError, match=r"no adapter slot for 1 projections, e\.g\. model\.layers\.1\.self_attn\.o_proj"
    ):
        set_adapter(worker_of(slots), adapter_modules(model), 1, None)


def test_a_slot_that_kept_its_old_values_is_noticed(vllm):
    model = adapted()
    slots = Slots(model, rank=4)
    slots.activate_adapter = lambda number: slots.lora_index_to_id.__setitem__(0, number)
    with pytest.raises(RunError, match="does not hold the adapter that were sent"):
        set_adapter(worker_of(slots), adapter_modules(model), 1, None)


def test_ranks_round_up_to_what_the_engine_has():
    assert [check_rank(r, (1, 8, 16, 32)) for r in (1, 2, 8, 9, 24)] == [1, 8, 8, 16, 32]
    with pytest.raises(InputError, match=r"adapter\.r is 33 \(want at most 32"):
        check_rank(33, (1, 8, 16, 32))
