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
from tests.tolerances import FORMULA, SCALE_ERROR, relative_error

NF4_CODE = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)  # fmt: skip
WIDEST_GAP = 0.3038072  # between the two lowest codes


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


# --- 4 bit ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama", hidden_size=64, intermediate_size=192).save_pretrained(folder)
    return folder


def four_bit(folder, **changes):
    return load_model(ModelConfig(**{"name_or_path": str(folder), "load_in_4bit": True, "device": "cpu", **changes}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_4bit_weights_are_double_quantised_nf4(llama_folder, dtype):
    import bitsandbytes

    held = getattr(torch, dtype)
    stored = {name: value.to(held) for name, value in tiny_llama(llama_folder).state_dict().items()}
    model = four_bit(llama_folder, dtype=dtype)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        check_nf4(layer.weight, stored.pop(f"{name}.weight").float())
        assert layer.compute_dtype == held
    others = {name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in layers}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= others.keys() == stored.keys()
    assert all(p.dtype == held and torch.equal(p, stored[name]) for name, p in others.items())


def tiny_llama(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def check_nf4(weight, original):
    """Decode [out, in] by hand: high nibble first, 64 weights a scale, 256 scales (8 bit) a scale of their own."""
    import bitsandbytes.functional as bnb

    state = weight.quant_state
    assert (state.quant_type, state.nested, state.absmax.dtype) == ("nf4", True, torch.uint8)
    assert weight.dtype == torch.uint8 and weight.numel() == original.numel() // 2
    scales = state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256)[: state.absmax.numel()]
    scales = scales + state.offset
    largest = original.reshape(-1, 64).abs().amax(1)
    assert (scales - largest).abs().max() <= SCALE_ERROR * (largest - largest.mean()).abs().max()
    packed = weight.detach().reshape(-1).long()
    nibbles = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)
    decoded = (NF4_CODE[nibbles].reshape(-1, 64) * scales[:, None]).reshape(original.shape)
    library = bnb.dequantize_4bit(weight.data, state).float()
    assert relative_error(library, decoded) < (1e-6 if state.dtype == torch.float32 else 4e-3)
    bound = WIDEST_GAP / 2 * largest + (scales - largest).abs()
    assert ((decoded - original).abs().reshape(-1, 64) <= bound[:, None] * (1 + 1e-5)).all()
    assert 0.05 < relative_error(decoded, original) < 0.12  # normal weights: 0.09; more means a wrong code or order


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_over_4bit_trains_and_leaves_the_base_alone(llama_folder, dtype):
    model = four_bit(llama_folder, dtype="bfloat16")
    before = {name: (p.dtype, p.clone()) for name, p in model.named_parameters()}
    adapted = add_adapter(model, AdapterConfig(r=4, dtype=dtype))
    parts = lora_parts(projection(adapted))
    assert isinstance(parts, LoRAParts) and type(parts.base).__name__ == "Linear4bit"
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and {p.dtype for p in trained.values()} == {getattr(torch, dtype)}
    adapted.eval()(input_ids=torch.tensor([[1, 2, 3]]))  # an evaluation before: it must not repack the weights
    adapted.train()(input_ids=torch.tensor([[1, 2, 3]])).logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)
    for name, p in adapted.named_parameters():
        if name not in trained:
            held, value = before[name.removeprefix("base_model.model.").replace(".base_layer", "")]
            assert p.dtype == held and torch.equal(p, value) and p.grad is None


def test_4bit_that_a_cpu_would_decode_wrongly_is_refused(tmp_path):
    tiny_model("llama", hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="multiple of 64 are decoded wrongly .model.layers.0.mlp.down_proj has 96;"):
        four_bit(tmp_path)
    import bitsandbytes.functional as bnb

    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    decoded = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4"))
    if relative_error(decoded, weight) < 0.12:
        pytest.skip("bitsandbytes is mended: the refusal may go")


def test_4bit_without_bitsandbytes_is_one_line(llama_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="^model.load_in_4bit is true but bitsandbytes cannot be imported") as error:
        four_bit(llama_folder)
    assert len(error.value.lines) == 1 and "\n" not in str(error.value)


def test_an_adapter_folder_in_4bit_is_refused_before_weights_are_read(llama_folder, tmp_path, monkeypatch):
    add_adapter(tiny_llama(llama_folder), AdapterConfig(r=2)).save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(InputError, match="want a full model: an adapter is not merged"):
        four_bit(tmp_path)


# --- mixtures of experts -------------------------------------------------------------------------------------

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
EXPERTS = {
    "Mixtral": ({**SMALL, "num_local_experts": 4}, 4),
    "Qwen3Moe": ({**SMALL, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}, 6),
    "DeepseekV3": ({"n_routed_experts": 16}, 16),
    "Dbrx": ({"ffn_config": {"moe_num_experts": 5}}, 5),
    "GraniteMoe": ({"num_local_experts": 1, "num_experts_per_tok": 2}, 0),
    "Lfm2": ({"num_experts": [1, 8, 8]}, 8),  # a list, as code that ships with a model may give
    "Llama": (SMALL, 0),
    "Qwen3": (SMALL, 0),
    "Gemma3": ({}, 0),
}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_counted_in_the_configuration(family):
    values, wanted = EXPERTS[family]
    assert load.num_experts(getattr(transformers, f"{family}Config")(**values)) == wanted


def test_experts_of_a_configuration_that_names_only_those_per_token():
    config = transformers.LlamaConfig(**SMALL, num_experts_per_tok=2)
    assert load.num_experts(config) == 2
    assert load.num_experts(transformers.LlamaConfig(**SMALL, num_experts_per_tok=1, n_shared_experts=3)) == 0


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_a_mixture_in_4bit_is_refused_before_weights_are_read(family, tmp_path):
    values, count = EXPERTS[family]
    getattr(transformers, f"{family}Config")(**values).save_pretrained(tmp_path)  # there are no weights to read
    with pytest.raises(InputError) as error:
        four_bit(tmp_path)
    assert str(error.value) == (
        f"model.load_in_4bit is true on a mixture of {count} experts, whose routing suffers from 4-bit weights "
        "(want bf16 LoRA: load_in_4bit false and dtype bfloat16; or model.allow_4bit_moe: true)"
    )
    with pytest.raises(InputError, match=r"model\.name_or_path"):  # permitted, it goes on to the missing weights
        four_bit(tmp_path, allow_4bit_moe=True)


def test_a_mixture_loads_in_4bit_when_permitted_and_in_16_bit_always(tmp_path):
    values, _ = EXPERTS["Mixtral"]
    values = {**values, "hidden_size": 64, "intermediate_size": 64}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**values)).save_pretrained(tmp_path)
    model = four_bit(tmp_path, allow_4bit_moe=True)
    quantised = [name for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"]
    assert "model.layers.0.self_attn.q_proj" in quantised
    assert {p.dtype for p in four_bit(tmp_path, load_in_4bit=False).parameters()} == {torch.bfloat16}
