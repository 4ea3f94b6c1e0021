"""From what the user gave to the parts of a run, in the order in which mistakes can be found: tokenizer, data and
rewards first, weights last.

Left out: the run itself. Nothing here is kept; the trainer owns the parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from grpo.batch import Prompt
from grpo.config import GRPOConfig, RunConfig, UpdateConfig
from grpo.data import PromptStream, build_prompts, load_table
from grpo.errors import InputError
from grpo.model.adapter import add_adapter, is_adapted
from grpo.model.load import (
    context_length,
    load_model,
    load_model_config,
    load_tokenizer,
    resolve_device,
    stop_token_ids,
)
from grpo.model.policy import Policy
from grpo.reward_prefill import prefill_of
from grpo.rollout.engine import RolloutEngine
from grpo.scoring import Reward, RewardSpec, check_columns, load_rewards
from grpo.seeds import seed_for
from grpo.trainer.console import Console
from grpo.trainer.engines import make_engine

Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class Parts:
    """Everything a GRPO run is made of."""

    config: GRPOConfig
    policy: Policy
    tokenizer: Any
    data: PromptStream
    eval_prompts: list[Prompt]
    rewards: list[Reward]
    engine: RolloutEngine
    stop_token_ids: tuple[int, ...]


def build_parts(
    config: GRPOConfig,
    model: str | nn.Module | None,
    reward_funcs: Any,
    datasets: tuple[Any, Any],
    processing_class: Any,
    peft_config: Any,
    console: Console,
) -> Parts:
    """Parts of a GRPO run. Raises `InputError` before any weight is loaded where it can be known before."""
    config = with_names(config, model, datasets)
    resolve_device(config.model.device)
    tokenizer = tokenizer_for(config, model, processing_class)
    room = _room(config, model)
    train, evaluation = datasets
    train_table = load_table(_given(train, config.data.train, "data.train"), "data.train")
    prompts, notes = build_prompts(train_table, tokenizer, config.data, field="data.train", room=room)
    eval_prompts: list[Prompt] = []
    if evaluation is not None or config.data.eval is not None:
        eval_table = load_table(evaluation if evaluation is not None else config.data.eval, "data.eval", "test")
        eval_prompts, eval_notes = build_prompts(eval_table, tokenizer, config.data, field="data.eval", room=room)
        notes += eval_notes
    rewards = _rewards(config, reward_funcs, prompts[0], tokenizer)
    if eval_prompts:
        check_columns(rewards, set(eval_prompts[0].example), "data.eval")
    for line in notes:
        console.say(line)
    engine, policy = make_engine(
        config,
        model if isinstance(model, nn.Module) else None,
        peft_config,
        tokenizer,
        prompts,
        console.say,
        lambda module: build_policy(config, module, peft_config, keep_reference=config.objective.beta > 0),
    )
    return Parts(
        config,
        policy,
        tokenizer,
        PromptStream(prompts, seed_for(config.seed, "data"), config.data.shuffle),
        eval_prompts,
        rewards,
        engine,
        stop_token_ids(tokenizer, policy.causal_lm),
    )


def with_names(config: Config, model: Any, datasets: tuple[Any, Any]) -> Config:
    """The configuration with the names of what was passed in Python, so that config.yaml says what ran."""
    changes: dict[str, Any] = {}
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "name_or_path", None)
    if name:
        changes["model"] = config.model.model_copy(update={"name_or_path": name})
    given = {key: value for key, value in zip(("train", "eval"), datasets, strict=True) if isinstance(value, str)}
    if given:
        changes["data"] = config.data.model_copy(update=given)
    return config.model_copy(update=changes)


def tokenizer_for(config: RunConfig, model: Any, processing_class: Any) -> Any:
    """The tokenizer given, or the one beside the model."""
    if processing_class is not None:
        return processing_class
    if isinstance(model, nn.Module) and not config.model.name_or_path:
        raise InputError(
            "processing_class is None (want the tokenizer: the model was passed as an object without a path)"
        )
    return load_tokenizer(config.model)


def build_policy(config: RunConfig, model: Any, peft_config: Any, *, keep_reference: bool = False) -> Policy:
    """Load the weights, add the adapter, probe head and packing."""
    module = model if isinstance(model, nn.Module) else load_model(config.model)
    adapter = peft_config if peft_config is not None else config.adapter
    if adapter is not None:
        module = add_adapter(module, adapter)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise InputError("the model has no parameter to train (all are frozen; want an adapter section)")
    policy = Policy(
        module,
        keep_reference=keep_reference and not is_adapted(module),
        activation_checkpointing=config.update.activation_checkpointing,
        chunk_mb=config.update.logprob_chunk_mb,
        fused_kernels=bool(config.update.fused_kernels),
        keep_attention=config.update.keep_attention,
        tiled_mlp=config.update.tiled_mlp,
    )
    if problems := [*_unsupported(config.update, policy)]:
        raise InputError(*problems)
    return policy


def _unsupported(update: UpdateConfig, policy: Policy) -> Iterator[str]:
    """What was asked for and this model cannot do, one line each."""
    if update.share_prompts and not policy.packs:
        yield "update.share_prompts is true (want false: this architecture does not keep packed documents apart)"
    surgery = policy.surgery
    if update.fused_kernels is True and surgery is not None:
        left = next((change for change in surgery.changes if not change.done), None)
        if left is not None:
            yield f"update.fused_kernels is true (want auto: {left.path} is left alone: {left.what})"
        elif not surgery.changes:
            yield "update.fused_kernels is true (want auto: nothing in this architecture is of a known form)"
    num_layers = len(policy.layers)
    for knob, asked, part in (
        ("update.tiled_mlp", update.tiled_mlp, "mlp"),
        ("update.keep_attention", update.keep_attention, "self_attn"),
    ):
        found = sum(path.endswith(part) for path in surgery.whole) if surgery else 0
        if asked and found < num_layers:
            yield f"{knob} is true (want false: {found} of {num_layers} layers have one that is fused from end to end)"


def _given(passed: Any, configured: Any, field: str) -> Any:
    source = passed if passed is not None else configured
    if source is None:
        raise InputError(f"{field} is null (want a path, a hub id, or train_dataset=…)")
    return source


def _room(config: GRPOConfig, model: Any) -> int | None:
    hf_config = model.config if isinstance(model, nn.Module) else load_model_config(config.model)
    context = context_length(hf_config)
    if context is None:
        return None
    room = context - config.rollout.max_completion_length
    if room < 1:
        raise InputError(
            f"rollout.max_completion_length is {config.rollout.max_completion_length} "
            f"(want less than the model's context of {context} tokens)"
        )
    return room


def _rewards(config: GRPOConfig, reward_funcs: Any, first: Prompt, tokenizer: Any) -> list[Reward]:
    if reward_funcs is None:
        functions: Sequence[Any] = [RewardSpec(**entry.model_dump()) for entry in config.rewards.functions]
        weights: list[float] | None = None
    else:
        functions = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        weights = config.rewards.weights
    if not functions:
        raise InputError("rewards is empty (want at least one function: `rewards: [{function: module:name}]`)")
    prefill = prefill_of(tokenizer, first.example["prompt"])
    return load_rewards(functions, weights, set(first.example), config.rewards.timeout, prefill)
