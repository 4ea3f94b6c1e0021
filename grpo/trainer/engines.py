"""Policy and rollout engine, built in the order that the engine asks for.

`hf` needs the policy first. `vllm` comes first itself: it takes the base weights to the GPU, and the trainer's frozen
weights become views of them. `server` is elsewhere.
Left out: what an engine does (grpo/rollout), and how large its cache may be (planner.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grpo.batch import Prompt
from grpo.config import GRPOConfig, ModelConfig
from grpo.errors import InputError
from grpo.model.adapter import adapter_modules, add_adapter, base_of, is_adapted
from grpo.model.load import base_source, context_length, load_model, load_model_config, meta_model, resolve_device
from grpo.model.policy import Policy
from grpo.plan_parts import Facts, weight_bytes
from grpo.planner import auto_kv_cache, kv_cache_room
from grpo.rollout.engine import RolloutEngine
from grpo.rollout.hf_engine import HFEngine
from grpo.rollout.probe import WeightProbe
from grpo.sizes import format_bytes, parse_bytes

if TYPE_CHECKING:
    from grpo.rollout.vllm_start import VLLMOptions

MakePolicy = Callable[[nn.Module], Policy]


def make_engine(
    config: GRPOConfig,
    model: nn.Module | None,
    peft_config: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    say: Callable[[str], None],
    make_policy: MakePolicy,
) -> tuple[RolloutEngine, Policy]:
    """The engine that `config.rollout.engine` names, and the policy.

    Args:
        model: an object the user passed, or None: load `config.model`.
        peft_config: the user's own, or None: `config.adapter`.
        prompts: the training prompts; the first of them are what engine and policy are compared on.
        make_policy: adds the adapter to the loaded model and prepares it.

    Raises:
        InputError: the engine cannot carry this model, or does not fit.
    """
    rollout = config.rollout
    if rollout.engine == "vllm":
        return _vllm(config, model, peft_config, tokenizer, prompts, say, make_policy)
    policy = make_policy(model if model is not None else load_model(config.model))
    if rollout.engine == "hf":
        return HFEngine(policy, tokenizer, rollout.max_sequences, say), policy
    from grpo.rollout.server_engine import ServerEngine

    folder = Path(rollout.server_adapter_dir or Path(config.output_dir) / "adapters")
    engine = ServerEngine(
        rollout.servers,
        base_source(config.model),
        folder.expanduser().resolve(),
        tokenizer,
        timeout_s=rollout.server_timeout_s,
        probe=_probe(prompts, say),
        say=say,
    )
    return engine, policy


def _probe(prompts: Sequence[Prompt], say: Callable[[str], None]) -> WeightProbe:
    return WeightProbe([prompt.token_ids for prompt in prompts[:64]], say)


def _vllm(
    config: GRPOConfig,
    model: nn.Module | None,
    peft_config: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    say: Callable[[str], None],
    make_policy: MakePolicy,
) -> tuple[RolloutEngine, Policy]:
    from grpo.rollout.vllm_engine import VLLMEngine
    from grpo.rollout.vllm_start import check_vllm

    check_vllm()  # before anything is loaded
    adapter = peft_config if peft_config is not None else config.adapter
    rank, targets = _adapter_form(config, model, adapter)
    source, temporary = _source(config, model)
    wanted, reason = config.rollout.share_weights, _unshareable(config, rank)
    if reason and wanted is True:
        raise InputError(f"rollout.share_weights is true (want auto: {reason})")
    options = replace(
        _options(config, source, _hf_config(config, model), _on_gpu(model)),
        adapter_rank=rank,
        adapter_targets=targets,
        share_weights=bool(wanted) and not reason,
    )
    if model is not None:
        options = replace(options, dtype=str(next(model.parameters()).dtype).removeprefix("torch."))
    cache = format_bytes(options.kv_cache_bytes)
    say(f"starting vLLM: KV cache of {cache}, {options.max_sequences} sequences at a time")
    try:
        engine = VLLMEngine(options, tokenizer, probe=_probe(prompts, say), say=say)
    finally:
        if temporary:
            shutil.rmtree(source, ignore_errors=True)
    if not options.share_weights:
        size = format_bytes(weight_bytes(Facts(_hf_config(config, model)).of(config), config))
        why = reason or "rollout.share_weights is false"
        say(f"rollout: the engine has its own copy of the base weights, {size} on the GPU while it is awake ({why})")
        own = model.to(resolve_device(config.model.device)) if model is not None else load_model(config.model)
        return engine, make_policy(own)
    base = base_of(model) if model is not None else load_model(_on_cpu(config.model))
    shared = engine.share_base(base, resolve_device(config.model.device))
    if shared.own and wanted is True:
        raise InputError(f"rollout.share_weights is true (want auto: {shared.own[0]} differs between engine and model)")
    twice = f", {format_bytes(shared.own_bytes)} held twice ({', '.join(shared.own[:3])} …)" if shared.own else ""
    say(f"rollout: {format_bytes(shared.num_bytes)} of base weights shared with the engine{twice}")
    return engine, make_policy(model if model is not None else base)


def _hf_config(config: GRPOConfig, model: Any) -> Any:
    return model.config if model is not None else load_model_config(config.model)


def _on_gpu(model: nn.Module | None) -> bool:
    return model is not None and next(model.parameters()).is_cuda


def _options(config: GRPOConfig, source: str, hf_config: Any, loaded: bool) -> VLLMOptions:
    from grpo.rollout.vllm_start import VLLMOptions

    return VLLMOptions(
        source=source,
        dtype=config.model.dtype,
        max_length=_longest(config, hf_config),
        max_sequences=config.rollout.max_sequences,
        kv_cache_bytes=_kv_cache_bytes(config, hf_config, loaded),
        kv_cache_room=kv_cache_room(config, hf_config, torch.cuda.mem_get_info()[0], model_loaded=loaded),
        load_in_4bit=config.model.load_in_4bit,
        cuda_graphs=config.rollout.cuda_graphs,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )


def _on_cpu(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"device": "cpu"})


def _adapter_form(config: GRPOConfig, model: nn.Module | None, adapter: Any) -> tuple[int | None, tuple[str, ...]]:
    """Largest rank and the last parts of the adapted modules' names; (None, ()) for full fine-tuning."""
    if model is not None and is_adapted(model):
        adapted: Any = model
    elif adapter is None:
        return None, ()
    else:
        # Names and shapes alone: the engine is built before the weights are loaded.
        adapted = add_adapter(meta_model(_hf_config(config, model), config.model), adapter)
    modules = adapter_modules(base_of(adapted))
    return max(parts.a.shape[0] for parts in modules.values()), tuple(
        sorted({path.rpartition(".")[2] for path in modules})
    )


def _source(config: GRPOConfig, model: nn.Module | None) -> tuple[str, bool]:
    """Full weights that the engine can load, and whether they were written for it (an object, a merged adapter)."""
    if model is None and base_source(config.model) == str(Path(config.model.name_or_path).expanduser()):
        return base_source(config.model), False
    if model is not None and is_adapted(model):
        raise InputError(
            "the model carries an adapter (want the bare model beside peft_config for rollout.engine vllm)"
        )
    folder = Path(config.output_dir) / "engine_base"
    base: Any = model if model is not None else load_model(_on_cpu(config.model))
    base.save_pretrained(folder)
    return str(folder), True


def _unshareable(config: GRPOConfig, rank: int | None) -> str | None:
    if rank is None:
        return "all weights are trained"
    if config.model.load_in_4bit:
        return "4-bit weights are laid out differently there"
    return None


def _longest(config: GRPOConfig, hf_config: Any) -> int:
    """Tokens of the longest prompt and completion together, at most what the architecture states."""
    wanted = config.data.max_prompt_length + config.rollout.max_completion_length
    return min(wanted, context_length(hf_config) or wanted)


def _kv_cache_bytes(config: GRPOConfig, hf_config: Any, loaded: bool) -> int:
    free, total = torch.cuda.mem_get_info()
    asked = config.rollout.kv_cache
    if asked == "auto":
        return auto_kv_cache(config, hf_config, free, model_loaded=loaded)
    if isinstance(asked, float) and asked < 1:
        return int(asked * total)
    return parse_bytes(asked)
