"""What a checkpoint holds: one `Item` per piece of state, each with how to read it and how to put it back.

Resume is exact because the list is complete, and the list is tested by dropping each item in turn. Generators are put
back last, since building anything may draw from them. Left out: the format on disk (checkpoint.py).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo.batch import RolloutBuffer, TokenBatch, Totals
from grpo.errors import InputError, clip
from grpo.optim import load_optimizer_state, optimizer_state
from grpo.packing import segments
from grpo.scoring import load_reward_states, reward_states
from grpo.seeds import generators, restore_generators
from grpo.trainer.checkpoint import Checkpoint

if TYPE_CHECKING:
    from grpo.trainer.base import BaseTrainer

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Item:
    """One piece of state. `file` names the safetensors file of its tensors; None means it is JSON in state.json."""

    name: str
    file: str | None
    capture: Callable[[Any], Any]
    restore: Callable[[Any, Any], None]


def capture(trainer: BaseTrainer) -> Checkpoint:
    """Everything that the coming steps depend on, at a step boundary."""
    tensors: dict[str, Tensors] = {}
    state: dict[str, Any] = {}
    for item in trainer.items():
        value = item.capture(trainer)
        if item.file is None:
            state[item.name] = value
        else:
            tensors.setdefault(item.file, {}).update({f"{item.name}/{key}": tensor for key, tensor in value.items()})
    return Checkpoint(trainer.step, tensors, state)


def restore(trainer: BaseTrainer, checkpoint: Checkpoint) -> None:
    """Put every item back, in the order of `trainer.items()`. A missing one is an `InputError` naming it."""
    for item in trainer.items():
        if item.file is None:
            if item.name not in checkpoint.state:
                raise InputError(f"checkpoint of step {checkpoint.step}: {item.name} is missing")
            item.restore(trainer, checkpoint.state[item.name])
        else:
            prefix = f"{item.name}/"
            held = checkpoint.tensors.get(item.file, {})
            item.restore(trainer, {key.removeprefix(prefix): t for key, t in held.items() if key.startswith(prefix)})


# --- weights and optimizer -----------------------------------------------------------------------------------


def _weights(trainer: Any) -> Tensors:
    return {name: parameter.detach() for name, parameter in trainer.policy.trainable().items()}


def _load_weights(trainer: Any, tensors: Mapping[str, Tensor]) -> None:
    parameters = trainer.policy.trainable()
    if set(parameters) != set(tensors):
        odd = sorted(set(parameters) ^ set(tensors))
        raise InputError(
            f"checkpoint: trained parameters differ from the model's, first {odd[0]!r} ({len(odd)} in all)"
        )
    for name, parameter in parameters.items():
        value = tensors[name]
        if value.shape != parameter.shape or value.dtype != parameter.dtype:
            held, wanted = f"{value.dtype} {list(value.shape)}", f"{parameter.dtype} {list(parameter.shape)}"
            raise InputError(f"checkpoint: {name} is {held}, the model has {wanted}")
        with torch.no_grad():
            parameter.copy_(value)


def _optimizer(trainer: Any) -> Tensors:
    return optimizer_state(trainer.optimizer, trainer.policy.trainable())


def _load_optimizer(trainer: Any, tensors: Mapping[str, Tensor]) -> None:
    load_optimizer_state(trainer.optimizer, trainer.policy.trainable(), tensors)


# --- rollouts not yet used -----------------------------------------------------------------------------------

_BATCH_TENSORS = [name for name in TokenBatch.__dataclass_fields__ if name != "segments"]


def _buffer_tensors(trainer: Any) -> Tensors:
    buffer: RolloutBuffer | None = trainer.buffer
    if buffer is None:
        return {}
    tensors = {
        f"{index}/{name}": value
        for index, batch in enumerate(buffer.batches)
        for name in _BATCH_TENSORS
        if (value := getattr(batch, name)) is not None
    }
    for index, batch in enumerate(buffer.batches):
        tensors[f"{index}/lengths"] = torch.tensor(batch.segments.lengths)
        tensors[f"{index}/prefixes"] = torch.tensor(batch.segments.prefixes)
    return tensors


def _load_buffer_tensors(trainer: Any, tensors: Mapping[str, Tensor]) -> None:
    grouped: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        grouped.setdefault(int(index), {})[name] = value
    batches = [_batch(fields) for _, fields in sorted(grouped.items())]
    trainer.buffer = RolloutBuffer(batches, Totals(0, 0, 0), {}) if batches else None


def _batch(fields: dict[str, Tensor]) -> TokenBatch:
    lengths, prefixes = fields.pop("lengths").tolist(), fields.pop("prefixes").tolist()
    return TokenBatch(segments=segments(lengths, [(first, count) for first, count in prefixes]), **fields)


def _buffer_facts(trainer: Any) -> Any:
    buffer: RolloutBuffer | None = trainer.buffer
    if buffer is None:
        return None
    # JSON has no NaN: what was not measured comes back as one
    metrics = {name: value if math.isfinite(value) else None for name, value in buffer.metrics.items()}
    return {"totals": vars(buffer.totals), "metrics": metrics, "iteration": buffer.iteration}


def _load_buffer_facts(trainer: Any, facts: Any) -> None:
    if facts is None:
        trainer.buffer = None
        return
    buffer = trainer.buffer or RolloutBuffer([], Totals(0, 0, 0), {})
    metrics = {name: math.nan if value is None else value for name, value in facts["metrics"].items()}
    trainer.buffer = replace(buffer, totals=Totals(**facts["totals"]), metrics=metrics, iteration=facts["iteration"])


# --- the lists -----------------------------------------------------------------------------------------------


def _attribute(name: str, *path: str) -> Item:
    """A JSON value that lives at `trainer.<path>`."""

    def owner(trainer: Any) -> Any:
        for part in path[:-1]:
            trainer = getattr(trainer, part)
        return trainer

    return Item(
        name,
        None,
        lambda trainer: getattr(owner(trainer), path[-1]),
        lambda trainer, value: setattr(owner(trainer), path[-1], value),
    )


def common_items(weights_file: str) -> list[Item]:
    """State of any run: weights, optimizer, schedule, data cursor and counters."""
    return [
        Item("weights", weights_file, _weights, _load_weights),
        Item("optimizer", "optimizer", _optimizer, _load_optimizer),
        _attribute("step", "step"),
        _attribute("schedule", "schedule", "position"),
        _attribute("cursor", "data", "consumed"),
        _attribute("num_tokens", "num_tokens"),
        _attribute("nonfinite_in_a_row", "nonfinite_in_a_row"),
        _attribute("tokens_per_bin", "tokens_per_bin"),
    ]


def rollout_items() -> list[Item]:
    """State that only a GRPO run has."""
    return [
        Item("buffer", "rollouts", _buffer_tensors, _load_buffer_tensors),
        Item("buffer_facts", None, _buffer_facts, _load_buffer_facts),
        _attribute("policy_version", "engine", "policy_version"),
        _attribute("empty_in_a_row", "empty_in_a_row"),
        Item(
            "fault_budget",
            None,
            lambda trainer: trainer.fault_budget.state_dict(),
            lambda trainer, value: trainer.fault_budget.load_state_dict(value),
        ),
        Item(
            "rewards",
            None,
            lambda trainer: reward_states(trainer.rewards),
            lambda trainer, value: load_reward_states(trainer.rewards, value),
        ),
    ]


def generator_items() -> list[Item]:
    """The process's random generators, last in every list."""
    return [Item("generators", "rng", lambda trainer: generators(), lambda trainer, value: restore_generators(value))]


def config_differences(saved: Mapping[str, Any], present: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key was A, is B` for each knob on which two resolved configurations differ."""
    lines = []
    for key in dict.fromkeys([*saved, *present]):
        before, now = saved.get(key), present.get(key)
        path = f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += config_differences(before, now, f"{path}.")
        elif before != now:
            lines.append(f"{path} was {clip(before)}, is {clip(now)}")
    return lines


def loaded_versions() -> dict[str, str]:
    """Versions on which bits may depend."""
    return {name: sys.modules[name].__version__ for name in ("torch", "transformers", "numpy") if name in sys.modules}
