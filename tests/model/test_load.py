"""4-bit loading, mixtures of experts, and the adapter: dtypes, what is frozen, and its parts.

NF4 is compared with its own definition (Dettmers et al. 2023, QLoRA): 16 quantiles of a normal variable, one scale for
64 weights, and scales that are 8-bit numbers themselves.
"""

import sys

import peft
import pytest
import torch
import transformers
from torch import nn

from grpo.config import AdapterConfig, ModelConfig
from grpo.errors import InputError
from grpo.model import load
from grpo.model.adapter import LoRAParts, adapter_off, adapters_disabled, add_adapter, lora_parts
from grpo.model.load import load_model
from tests.tiny import tiny_gpt2, tiny_model
from tests.tolerances import relative_error

NF4_CODE = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)  # fmt: skip
WIDEST_GAP = 0.3038072  # between the two lowest codes
SCALE_ERROR = 0.05  # of the 8-bit scales, relative to their largest deviation from the mean in 256 of them
FORMULA = 1e-6  # float32 projection against the formula, relative


def families_of_lora(**changes):
    """A tiny model whose layers carry a LoRA adapter that is not zero."""
    model = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], **changes})
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.manual_seed(1)
            nn.init.normal_(parameter)
    return model


def projection(model):
    return model.get_base_model().model.layers[0].self_attn.q_proj


# --- parts of a projection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_parts_are_the_formula(rslora):
    layer = projection(families_of_lora(use_rslora=rslora, lora_dropout=0.25)).eval()
    parts = lora_parts(layer)
    assert isinstance(parts, LoRAParts)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    wanted = x.double() @ parts.base.weight.double().T + 12 / (2 if rslora else 4) * (
        x.double() @ parts.a.double().T @ parts.b.double().T
    )
    assert relative_error(layer(x), wanted) < FORMULA
    assert (parts.scale, parts.dropout) == (12 / (2 if rslora else 4), 0.25)
    assert parts.a is layer.lora_A["default"].weight and parts.b is layer.lora_B["default"].weight


def test_parts_are_given_with_the_adapter_off_too():
    model = families_of_lora()
    layer = projection(model)
    assert not adapters_disabled(layer)
    with adapter_off(model):
        assert adapters_disabled(layer)
        assert isinstance(lora_parts(layer), LoRAParts)
    assert not adapters_disabled(layer)
    assert lora_parts(nn.Linear(2, 2)) is None and not adapters_disabled(nn.Linear(2, 2))
    assert lora_parts(layer.base_layer) is None


def second_adapter(model):
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])


class Odd(nn.Linear):
    pass


def odd_base(model):
    projection(model).base_layer.__class__ = Odd


@pytest.mark.parametrize(
    ("changes", "act", "reason"),
    [
        ({"use_dora": True}, None, "DoRA"),
        ({"lora_bias": True}, None, "the adapter has a bias"),
        ({}, lambda model: model.merge_adapter(), "the adapter is merged"),
        ({}, second_adapter, "2 active adapters"),
        ({}, odd_base, "the base layer is Odd"),
        ({}, lambda model: projection(model).lora_A["default"].register_forward_hook(print), "hooks"),
        ({}, lambda model: projection(model).base_layer.register_forward_pre_hook(print), "hooks"),
    ],
)
def test_parts_refuse_what_is_more_than_the_formula(changes, act, reason):
    if "lora_bias" in changes:
        model = tiny_model("qwen2")  # the only one here whose projection has a bias
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], **changes))
    else:
        model = families_of_lora(**changes)
    if act is not None:
        act(model)
    assert lora_parts(projection(model)) == reason


def test_parts_of_other_peft_layers():
    model = peft.get_peft_model(tiny_model(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    assert lora_parts(projection(model)) == "Linear is not a LoRA layer"
    model = families_of_lora(modules_to_save=["lm_head"])
    assert lora_parts(model.get_base_model().lm_head) == "ModulesToSaveWrapper is not a LoRA layer"
    gpt2 = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    assert "Conv1D" in lora_parts(gpt2.get_base_model().transformer.h[0].attn.c_attn)
    model = families_of_lora()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))  # there, but not active
    assert isinstance(lora_parts(projection(model)), LoRAParts)


# --- dtype of the adapter ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapter_has_its_dtype_and_nothing_else_changes(base, dtype):
    plain = tiny_model(dtype=base)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    model = add_adapter(plain, AdapterConfig(r=4, dropout=0.3, dtype=dtype))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {getattr(torch, dtype)}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == len(dict(plain.named_parameters())) - len(trained)
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(after[name].dtype == base and torch.equal(after[name], value) for name, value in before.items())
    parts = lora_parts(projection(model))
    assert (parts.dropout, parts.scale) == (0.3, 8.0)
    loss = model(input_ids=torch.tensor([[1, 2, 3]])).logits.float().logsumexp(-1).sum()
    loss.backward()
    grads = [p.grad for name, p in trained.items() if "lora_B" in name]
    assert {g.dtype for g in grads} == {getattr(torch, dtype)} and all(g.abs().sum() > 0 for g in grads)


def test_a_configuration_of_the_users_own_keeps_its_meaning():
    own = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.125, use_rslora=True, task_type="CAUSAL_LM")
    model = add_adapter(tiny_model(dtype=torch.bfloat16), own)
    parts = lora_parts(projection(model))
    assert parts.a.dtype == parts.b.dtype == torch.float32  # peft's own rule
    assert (parts.dropout, parts.scale) == (0.125, pytest.approx(8 / 2**0.5))
    assert model.peft_config["default"] is own
