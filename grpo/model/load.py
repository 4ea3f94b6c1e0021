"""Weights and tokenizer: from a folder, a hub id, or an object the user already has.

Left out: architecture-specific code. A causal LM is what `AutoModelForCausalLM` loads; `policy.py` probes the rest.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo.config import ModelConfig
from grpo.errors import InputError, clip
from grpo.model.adapter import merged_adapter

_NF4_BLOCK = 64  # weights that share a scale


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises `InputError` when a named device is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"model.device is {name!r} (want auto, cpu, cuda or cuda:N)") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"model.device is {name!r} but there is no CUDA device (want cpu or auto)")
    return device


def _where(config: ModelConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _check_source(config: ModelConfig) -> None:
    name = config.name_or_path
    if not name:
        raise InputError("model.name_or_path is missing (want a folder or a hub id)")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).expanduser().is_dir():
        raise InputError(f"model.name_or_path is {clip(name)!r}: no such folder")


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer beside the model. Raises `InputError` naming the knob when there is none."""
    from transformers import AutoTokenizer

    _check_source(config)
    try:
        return AutoTokenizer.from_pretrained(str(Path(config.name_or_path).expanduser()), **_where(config))
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.name_or_path is {clip(config.name_or_path)!r}: no tokenizer: {clip(error, 200)}"
        ) from error


def base_source(config: ModelConfig) -> str:
    """Where the base weights are: `name_or_path`, or what the adapter in that folder was trained on."""
    folder = Path(config.name_or_path).expanduser()
    adapter_file = folder / "adapter_config.json"
    if adapter_file.is_file() and not (folder / "config.json").is_file():
        return json.loads(adapter_file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return str(folder)


def load_model_config(config: ModelConfig) -> Any:
    """The Hugging Face configuration alone (no weights): architecture and context length."""
    from transformers import AutoConfig

    _check_source(config)
    try:
        return AutoConfig.from_pretrained(base_source(config), **_where(config))
    except (OSError, ValueError) as error:
        raise InputError(f"model.name_or_path is {clip(config.name_or_path)!r}: {clip(error, 200)}") from error


def meta_model(hf_config: Any, config: ModelConfig) -> nn.Module:
    """The causal LM of a configuration without memory behind its weights. Raises `InputError` where there is none."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(hf_config),
                dtype=getattr(torch, config.dtype),
                trust_remote_code=config.trust_remote_code,
                attn_implementation="eager",  # always there; nothing is computed
            )
        except ValueError as error:
            raise InputError(f"model.name_or_path is {clip(config.name_or_path)!r}: {clip(error, 200)}") from error


def load_model(config: ModelConfig) -> nn.Module:
    """A causal LM in `config.dtype` on its device; NF4 with double quantisation when `load_in_4bit`.

    A folder that holds only an adapter gives its base model with that adapter merged in, so that what was warmed up
    is the reference of what follows.

    In 4 bit the linear layers of the blocks are quantised (Dettmers et al. 2023, QLoRA); embedding, head and norms keep
    `config.dtype`.

    Raises:
        InputError: missing folder, unknown hub id, or a folder without weights, naming `model.name_or_path`;
            `model.load_in_4bit` with a mixture of experts, with an adapter's folder or without bitsandbytes.
    """
    from transformers import AutoModelForCausalLM

    _check_source(config)
    device = resolve_device(config.device)
    if config.load_in_4bit:
        _check_4bit(config)
    arguments: dict[str, Any] = {
        **_where(config),
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attn_implementation,
    }
    if config.load_in_4bit:
        arguments |= {"quantization_config": _nf4(config), "device_map": {"": device}}
    try:
        source = base_source(config)
        model: Any = AutoModelForCausalLM.from_pretrained(source, **arguments)
    except (OSError, ValueError) as error:
        raise InputError(f"model.name_or_path is {clip(config.name_or_path)!r}: {clip(error, 200)}") from error
    if source != str(Path(config.name_or_path).expanduser()):
        model = merged_adapter(model, Path(config.name_or_path).expanduser())
    if config.load_in_4bit:
        if device.type == "cpu":
            _make_exact_on_cpu(model)
        return model
    return model.to(device)


def num_experts(hf_config: Any) -> int:
    """Experts a token is routed to or among, by the names families use in their configuration; 0 for a dense model."""
    text_config = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    values = list(_leaves(text_config.to_dict()))
    counts = [count for name, count in values if name.endswith("experts") and "shared" not in name]
    if not counts:  # num_experts_per_tok alone; beside a count of 0 or 1 it is only a default
        counts = [count for name, count in values if "experts_per_tok" in name]
    most = max(counts, default=0)
    return most if most > 1 else 0


def _leaves(values: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Whole numbers of a nested configuration with their names; a list (one number a layer) counts by its largest."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value)
            continue
        for number in value if isinstance(value, list | tuple) else [value]:
            if type(number) is int:
                yield name, number


def _check_4bit(config: ModelConfig) -> None:
    """Everything that can be known before the weights are read."""
    if base_source(config) != str(Path(config.name_or_path).expanduser()):
        raise InputError("model.load_in_4bit is true (want a full model: an adapter is not merged into 4-bit weights)")
    experts = num_experts(load_model_config(config))
    if experts and not config.allow_4bit_moe:
        raise InputError(
            f"model.load_in_4bit is true on a mixture of {experts} experts, whose routing suffers from 4-bit weights "
            "(want bf16 LoRA: load_in_4bit false and dtype bfloat16; or model.allow_4bit_moe: true)"
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"model.load_in_4bit is true but bitsandbytes cannot be imported: {clip(error, 200)} (want it installed, "
            "or load_in_4bit false)"
        ) from error


def _nf4(config: ModelConfig) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )


def _make_exact_on_cpu(model: nn.Module) -> None:
    """Keep bitsandbytes (0.50) from its two silent errors on a CPU; on a GPU it has neither."""
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        if module.in_features % _NF4_BLOCK:  # a block that spans two rows gets the wrong scale
            raise InputError(
                f"model.load_in_4bit is true on the CPU, where widths that are no multiple of {_NF4_BLOCK} are decoded "
                f"wrongly ({name} has {module.in_features}; want load_in_4bit false, or a GPU)"
            )
        # With AVX512-BF16 the first eval forward repacks the weight in place and the input gradient is lost.
        module.support_avx512bf16_for_cpu = False


def context_length(hf_config: Any) -> int | None:
    """The longest sequence the architecture states, or None when it states none."""
    text_config = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def stop_token_ids(tokenizer: Any, model: nn.Module | None = None) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's EOS and those of the generation configuration.

    Raises:
        InputError: there is none, so that no completion could end.
    """
    generation = getattr(model, "generation_config", None)
    found: list[Any] = []
    for value in (getattr(tokenizer, "eos_token_id", None), getattr(generation, "eos_token_id", None)):
        found += list(value) if isinstance(value, list | tuple) else [value]
    ids = tuple(dict.fromkeys(token for token in found if isinstance(token, int)))
    if not ids:
        raise InputError("the tokenizer has no EOS token (want tokenizer.eos_token set): no completion could end")
    return ids


def make_nf4_tables() -> None:
    """bitsandbytes makes its quantisation tables when first asked, and keeps them for the process: now, on the GPU."""
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError:
        return  # loading says what is missing
    dequantize_4bit(*quantize_4bit(torch.zeros(64, 64, device="cuda"), quant_type="nf4", compress_statistics=True))
