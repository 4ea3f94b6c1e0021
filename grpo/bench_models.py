"""Models of known shapes with random weights, made on the device in seconds, and the cases that are measured on them.

    build(Case("mine", "qwen3-1.7b", rows=1, length=8192, bin_tokens=8192), torch.device("cuda"), torch.bfloat16)

Time, memory and rounding of a step depend on widths and lengths, hardly on the values of the weights, so nothing is
downloaded or read. The shapes are those of the published configurations; positions are left open up to 2^20, so that
memory alone bounds a length.
Left out: mixtures of experts in 4 bit (refused), models whose buffers are more than rotary frequencies.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from grpo.config import AdapterConfig, ModelConfig
from grpo.errors import InputError, clip
from grpo.model.adapter import add_adapter
from grpo.model.load import load_model_config, num_experts

MAX_POSITIONS = 2**20
TrainingMethod = Literal["full", "lora", "qlora"]
TRAINING_METHODS: tuple[TrainingMethod, ...] = ("full", "lora", "qlora")
_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {  # family, _WIDTHS
    "qwen2.5-0.5b": ("Qwen2", (896, 4864, 24, 14, 2, 64, 151_936, True)),
    "qwen3-0.6b": ("Qwen3", (1024, 3072, 28, 16, 8, 128, 151_936, True)),
    "qwen3-1.7b": ("Qwen3", (2048, 6144, 28, 16, 8, 128, 151_936, True)),
    "llama-3.2-3b": ("Llama", (3072, 8192, 28, 24, 8, 128, 128_256, True)),
    "llama-3.1-8b": ("Llama", (4096, 14_336, 32, 32, 8, 128, 128_256, False)),
    "qwen3-14b": ("Qwen3", (5120, 17_408, 40, 40, 8, 128, 151_936, False)),
    "toy": ("Llama", (64, 128, 3, 4, 2, 16, 300, False)),
    "toy-llama": ("Llama", (32, 48, 2, 4, 2, 8, 64, False)),
    "toy-qwen3": ("Qwen3", (32, 48, 2, 4, 2, 8, 64, True)),
}


@dataclass(frozen=True)
class Case:
    """`rows` completions of `length` tokens each (prompt included), in bins of at most `bin_tokens`.

    `shape` is one of SHAPES or a folder with a config.json; `rank` 0 trains all weights, without an adapter.
    """

    name: str
    shape: str
    rows: int
    length: int
    bin_tokens: int
    four_bit: bool = False
    rank: int = 16
    options: tuple[tuple[str, Any], ...] = ()  # of Policy

    @property
    def training(self) -> TrainingMethod:
        """What is trained."""
        return "full" if self.rank == 0 else "qlora" if self.four_bit else "lora"


CASES = (
    Case("llama-8b-lora", "llama-3.1-8b", 1, 20_480, 20_480),
    Case("llama-8b-qlora", "llama-3.1-8b", 1, 20_480, 20_480, four_bit=True),
    Case("llama-8b-lora-group", "llama-3.1-8b", 8, 20_480, 20_480),
    Case("qwen3-1.7b-lora", "qwen3-1.7b", 8, 4_352, 17_408),
)
TOY = (Case("toy-lora", "toy", 2, 300, 300, rank=4), Case("toy-group", "toy", 10, 300, 600, rank=4))


def model_config(shape: str, **changes: Any) -> Any:
    """The transformers configuration of a shape, or of the model in a folder (its weights are not read).

    Raises:
        InputError: neither a name in SHAPES nor such a folder.
    """
    import transformers

    if shape in SHAPES:
        family, widths = SHAPES[shape]
        values = {"max_position_embeddings": MAX_POSITIONS, **dict(zip(_WIDTHS, widths, strict=True)), **changes}
        return getattr(transformers, f"{family}Config")(**values)
    folder = Path(shape).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(f"model {clip(shape)!r} is no known shape (want {', '.join(SHAPES)}, or a model's folder)")
    config = load_model_config(ModelConfig(name_or_path=str(folder))).get_text_config()
    for name, value in changes.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def random_model(
    shape: str, device: torch.device | str, dtype: torch.dtype, *, seed: int = 0, **changes: Any
) -> nn.Module:
    """A causal LM of a shape, weights normal with standard deviation 0.02 (norms 1, biases 0); `changes` to its
    configuration. Weights are made on the device: the libraries' own initialisation takes a minute for 8B."""
    from transformers import AutoModelForCausalLM

    config = model_config(shape, **changes)
    torch.manual_seed(seed)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0 if "norm" in name else 0.0)
    for path, module in list(model.named_modules()):
        if hasattr(module, "inv_freq"):  # computed, not loaded
            parent, _, leaf = path.rpartition(".")
            fresh = type(module)(getattr(module, "config", config)).to(next(model.parameters()).device)
            setattr(model.get_submodule(parent), leaf, fresh)
    model.tie_weights()
    return model


def quantise(model: nn.Module) -> nn.Module:
    """The linear layers of `model`, less its LM head, as NF4 with double quantisation, in place, one at a time.

    Raises:
        InputError: bitsandbytes is missing, or the model is a mixture of experts.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise InputError(f"qlora needs bitsandbytes: {clip(error, 200)} (want it installed, or lora)") from error
    whole: Any = model
    if experts := num_experts(whole.config):
        raise InputError(f"qlora on a mixture of {experts} experts (want lora)")
    head = whole.get_output_embeddings()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is not nn.Linear or module is head:
                continue
            weight = module.weight.data
            shape = (module.in_features, module.out_features, module.bias is not None)
            small = Linear4bit(*shape, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
            packed: Any = Params4bit(weight, requires_grad=False, quant_type="nf4")
            small.weight = packed.to(weight.device)
            if module.bias is not None:
                small.bias = module.bias
            small.support_avx512bf16_for_cpu = False  # that CPU layout loses the input gradient
            setattr(parent, name, small)
            module.weight.data = weight.new_empty(0)
    whole.is_loaded_in_4bit = True  # peft asks for it
    del weight
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def build(case: Case, device: torch.device, dtype: torch.dtype, **changes: Any) -> nn.Module:
    """The case's model, ready to train: its weights, or an adapter (see `adapted`)."""
    model = random_model(case.shape, device, dtype, **changes)
    if case.training == "full":
        return model
    return adapted(quantise(model) if case.four_bit else model, case)


def adapted(model: nn.Module, case: Case) -> nn.Module:
    """LoRA on all linear layers of `model`, its head excepted, with a B that is not zero."""
    model = add_adapter(model, AdapterConfig(r=case.rank))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model
