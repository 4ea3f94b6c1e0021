"""Names that users of TRL's GRPOConfig and SFTConfig already type: kept, translated (and said so), or refused with the
replacement.

Left out: anything of TRL's that has no counterpart here; such a name is unknown and the nearest known one is named.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Flat names that differ from the leaf in their section (the leaf alone would be ambiguous or already has a name).
FLAT_ALIASES = {
    "lora_r": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_dtype": "adapter.dtype",
    "lora_target_modules": "adapter.target_modules",
    "train_data": "data.train",
    "eval_data": "data.eval",
    "reward_functions": "rewards.functions",
    "reward_weights": "rewards.weights",
    "optim": "optimizer.name",
    "num_generations_eval": "evaluation.num_generations",
    "temperature_eval": "evaluation.temperature",
    "eval_steps": "evaluation.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "logging.every_steps",
    "report_to": "logging.trackers",
    "log_completions": "logging.completions",
}

_RENAMED = {  # theirs: (ours, how the value is read)
    "bf16": ("dtype", lambda value: "bfloat16" if value else "float32"),
    "gradient_checkpointing": ("activation_checkpointing", lambda value: "recompute" if value else "none"),
}
_GRPO_RENAMED = {
    "loss_type": ("recipe", lambda value: value),
    "use_bias_correction_kl": ("kl", lambda value: "k3_ratio" if value else "k3"),
    "vllm_importance_sampling_clip_max": ("correction_max", lambda value: value),
    "vllm_importance_sampling_clip_min": ("correction_min", lambda value: value),
}
_REREAD = {  # the same name, another kind of value
    "scale_rewards": lambda value: {True: "group", False: "none"}[value] if isinstance(value, bool) else value,
    "log_completions": lambda value: (3 if value else 0) if isinstance(value, bool) else value,
    "report_to": lambda value: [] if value in (None, "none") else [value] if isinstance(value, str) else value,
}

_OPTIMIZERS = {  # values of optim: theirs → ours
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw",
}

_REFUSED = {
    "use_liger_kernel": "the log-prob head is always chunked; remove it",
    "num_train_epochs": "use max_steps",
    "fp16": "use bf16: true or model.dtype: float32",
}
_GRPO_REFUSED = {
    "steps_per_generation": "one batch of rollouts is one optimizer step; use num_iterations to reuse it",
    "generation_batch_size": "use prompts_per_step × num_generations",
    "sync_ref_model": "the reference stays fixed; restart from the trained model instead",
    "use_adaptive_entropy": "use entropy_coef",
    "vllm_gpu_memory_utilization": "use rollout.kv_cache: auto, a size like 24GB or a share of the GPU",
}
_SFT_REFUSED = {
    "max_length": "use data.max_prompt_length and max_completion_length",
    "completion_only_loss": "the loss is on the completion only; remove it",
    "assistant_only_loss": "use rows of a prompt and its completion",
    "dataset_text_field": "use columns prompt and completion",
    "packing": "examples always share bins, and none sees another; remove it",
    "padding_free": "nothing is padded; remove it",
}
_HARMLESS = {
    "use_liger_kernel": (False,),
    "sync_ref_model": (False,),
    "fp16": (False,),
    "max_length": (None,),
    "completion_only_loss": (True, None),
    "assistant_only_loss": (False,),
    "packing": (True,),
    "padding_free": (True,),
}

Rename = Callable[[str, str, Any], None]


def translate(values: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Names of TRL's GRPOConfig → ours. Returns (values, notes to print once, problems)."""
    notes: list[str] = []
    problems: list[str] = []
    rename = _common(values, _GRPO_REFUSED, _GRPO_RENAMED, notes, problems)
    if values.get("recipe") == "vespo":
        problems.append("loss_type is 'vespo' (want one of the recipes; gspo or cispo come nearest)")
        values.pop("recipe")
    _engine(values, rename, problems)
    _sampler_correction(values, rename)
    group = values.get("num_generations", (values.get("rollout") or {}).get("num_generations", 8))
    _batch_size(values, rename, problems, "prompts_per_step", group)
    return values, notes, problems


def translate_sft(values: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """The same of TRL's SFTConfig."""
    notes: list[str] = []
    problems: list[str] = []
    rename = _common(values, _SFT_REFUSED, {}, notes, problems)
    _batch_size(values, rename, problems, "examples_per_step", 1)
    return values, notes, problems


def _common(
    values: dict[str, Any], refused: dict[str, str], renamed: dict[str, Any], notes: list[str], problems: list[str]
) -> Rename:
    """What both configurations share, and their own tables. Returns what renames one value."""
    reasons = _REFUSED | refused
    for name in reasons.keys() & values.keys():
        given = values.pop(name)
        if given not in _HARMLESS.get(name, ()):
            problems.append(f"{name} is {given!r} ({reasons[name]})")

    def rename(old: str, new: str, value: Any) -> None:
        if new in values:
            problems.append(f"{old} and {new} are both given (want one)")
        values[new] = value
        notes.append(f"{old} is understood as {new}: {value}")

    for old, (new, read) in (_RENAMED | renamed).items():
        if old in values:
            rename(old, new, read(values.pop(old)))
    for name in _REREAD.keys() & values.keys():
        values[name] = _REREAD[name](values[name])
    optimizer = str(values.get("optim"))
    if optimizer in _OPTIMIZERS:
        values["optim"] = _OPTIMIZERS[optimizer]
        notes.append(f"optim {optimizer} is understood as {values['optim']}")
    return rename


def _engine(values: dict[str, Any], rename: Rename, problems: list[str]) -> None:
    """use_vllm and vllm_mode → rollout.engine; vllm_server_base_url → rollout.servers."""
    use, mode = values.pop("use_vllm", None), values.pop("vllm_mode", "colocate")
    url = values.pop("vllm_server_base_url", None)
    if mode not in ("colocate", "server"):
        problems.append(f"vllm_mode is {mode!r} (want colocate or server)")
    elif use:
        rename("use_vllm", "engine", "vllm" if mode == "colocate" else "server")
        if mode == "server" and url is not None:
            rename("vllm_server_base_url", "servers", [url])


def _sampler_correction(values: dict[str, Any], rename: Rename) -> None:
    enabled = values.pop("vllm_importance_sampling_correction", None)
    mode = values.pop("vllm_importance_sampling_mode", None)
    if enabled is False:
        rename("vllm_importance_sampling_correction", "sampler_correction", "none")
    elif mode is not None:
        level, _, kind = str(mode).rpartition("_")
        rename("vllm_importance_sampling_mode", "sampler_correction", kind)
        rename(
            "vllm_importance_sampling_mode",
            "correction_level",
            "sequence_sum" if level == "sequence" else level,
        )
    elif enabled:
        rename("vllm_importance_sampling_correction", "sampler_correction", "truncate")


def _batch_size(values: dict[str, Any], rename: Rename, problems: list[str], ours: str, group: Any) -> None:
    """per_device_train_batch_size × gradient_accumulation_steps rows → `ours`, of `group` rows each."""
    if "per_device_train_batch_size" not in values and "gradient_accumulation_steps" not in values:
        return
    size = values.pop("per_device_train_batch_size", 8)
    accumulation = values.pop("gradient_accumulation_steps", 1)
    if not all(isinstance(number, int) for number in (size, accumulation, group)):
        problems.append("per_device_train_batch_size or gradient_accumulation_steps is not a whole number")
    elif group < 1 or size * accumulation % group:
        problems.append(
            f"per_device_train_batch_size × gradient_accumulation_steps is {size * accumulation} completions "
            f"(want a multiple of num_generations = {group})"
        )
    else:
        rename(
            "per_device_train_batch_size × gradient_accumulation_steps",
            ours,
            size * accumulation // group,
        )
