"""How weights reach an engine in this process: views of its tensors, adapter slots, and a sleep that keeps weights.

vLLM fuses projections: `qkv_proj.weight` holds the rows of q, k and v one after another, `gate_up_proj.weight` those of
gate and up, and embeddings may have padding rows at their end. Each tensor of the Hugging Face model is therefore a run
of rows of one engine tensor, which is all that `engine_views` needs to know; that the layout is right is not assumed
but checked bit for bit, at the start (shared weights) or after each sync (`read back`).
Left out: tensor parallelism, and quantised engine weights, whose layouts are their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo.errors import InputError, RunError
from grpo.model.adapter import LoRAParts


def engine_views(engine_model: Any, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Where the engine keeps each tensor of the Hugging Face model: name → view of the same shape.

    Args:
        engine_model: vLLM's model, perhaps with LoRA wrappers.
        named: names and tensors of the causal LM, in the order of `named_parameters`.

    A tensor whose place is not found is absent.
    """
    theirs = {
        name.replace(".base_layer.", "."): parameter.data
        for name, parameter in engine_model.named_parameters(remove_duplicate=False)
    }
    fused = {
        part: (whole, parts)
        for whole, parts in getattr(engine_model, "packed_modules_mapping", {}).items()
        for part in parts
        if len(parts) > 1
    }
    tensors = dict(named)
    views = {}
    for name, tensor in tensors.items():
        target, first = _place(name, fused, tensors)
        whole = theirs.get(target)
        if whole is None or whole.dim() != tensor.dim() or whole.shape[1:] != tensor.shape[1:]:
            continue
        if first + tensor.shape[0] <= whole.shape[0]:
            views[name] = whole[first : first + tensor.shape[0]]
    return views


def _place(name: str, fused: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """The engine's name for a tensor, and its first row there."""
    module, _, leaf = name.rpartition(".")
    parent, _, part = module.rpartition(".")
    if part not in fused:
        return name, 0
    whole, parts = fused[part]
    before = [f"{parent}.{other}.{leaf}" for other in parts[: parts.index(part)]]
    if not all(other in tensors for other in before):
        return name, 0
    return f"{parent}.{whole}.{leaf}", sum(tensors[other].shape[0] for other in before)


@dataclass(frozen=True)
class Shared:
    """What became of the base weights: bytes that exist once, and the names and bytes of those that exist twice."""

    num_bytes: int
    own_bytes: int
    own: tuple[str, ...]


@torch.no_grad()
def share_base(model: nn.Module, engine_model: Any, device: torch.device) -> Shared:
    """Make the frozen weights of `model` views of the engine's, wherever both hold the same bits.

    `model` may lie on the CPU; every other tensor of it is moved to `device`, one at a time, so that the base never
    exists twice on the GPU. Nothing is trained here: all parameters are frozen.
    """
    named = list(model.named_parameters())
    views = engine_views(engine_model, named)
    shared_bytes, own_bytes, own = 0, 0, []
    for name, parameter in named:
        parameter.requires_grad_(False)
        view = views.get(name)
        value = parameter.data.to(device)
        if view is not None and view.dtype == value.dtype and torch.equal(view, value):
            parameter.data = view
            shared_bytes += view.nbytes
        else:
            parameter.data = value
            own_bytes += value.nbytes
            own.append(name)
    model.to(device)  # buffers
    return Shared(shared_bytes, own_bytes, tuple(own))


@torch.no_grad()
def copy_weights(model: nn.Module, engine_model: Any) -> int:
    """Full fine-tuning: write every parameter into the engine's tensors. Returns the bytes written.

    Raises:
        RunError: a parameter has no place there, or an engine parameter would keep its old value.
    """
    named = list(model.named_parameters())
    views = engine_views(engine_model, named)
    missing = [name for name, _ in named if name not in views]
    if missing:
        raise RunError(
            f"the engine has no place for {len(missing)} weights, e.g. {missing[0]} (want rollout.engine: hf)"
        )
    for name, parameter in named:
        views[name].copy_(parameter.detach())
    written = {view.untyped_storage().data_ptr() for view in views.values()}
    untouched = [name for name, p in engine_model.named_parameters() if p.untyped_storage().data_ptr() not in written]
    if untouched:
        raise RunError(f"{len(untouched)} weights of the engine belong to no weight of the policy, e.g. {untouched[0]}")
    read_back(((name, p.detach(), views[name]) for name, p in named[:: max(1, len(named) // 8)]), "weights")
    return sum(view.nbytes for view in views.values())


def read_back(triples: Iterable[tuple[str, Tensor, Tensor]], what: str) -> None:
    """Raise `RunError` where an engine tensor is not, bit for bit, what was sent (after the cast to its dtype)."""
    for name, sent, found in triples:
        if not torch.equal(sent.to(found.dtype), found):
            raise RunError(f"the rollout engine does not hold the {what} that were sent: {name} differs")


# --- adapters ------------------------------------------------------------------------------------------------


@torch.no_grad()
def set_adapter(worker: Any, modules: Mapping[str, LoRAParts], number: int, previous: int | None) -> int:
    """Put the adapter into the engine's slot under the id `number`, in place of `previous`. Returns its bytes.

    The scale alpha / r is multiplied into B here, in float32, before the one rounding to the engine's dtype; the engine
    is told a scale of 1. Tensors are copies: the engine would otherwise follow (and rescale) the trainer's own.

    Raises:
        RunError: a projection has no slot in the engine, or a slot does not hold what was sent.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager = worker.model_runner.lora_manager
    adapters = manager._adapter_manager
    dtype = manager.lora_config.lora_dtype
    rank = max(parts.a.shape[0] for parts in modules.values())
    helper = PEFTHelper.from_dict({"r": rank, "lora_alpha": rank, "target_modules": sorted(_leaves(modules))})
    helper.validate_legal(manager.lora_config)
    tensors = {}
    for path, parts in modules.items():
        prefix = f"base_model.model.{path}"
        tensors[f"{prefix}.lora_A.weight"] = parts.a.detach().to(dtype, copy=True)
        tensors[f"{prefix}.lora_B.weight"] = (parts.b.detach().float() * parts.scale).to(dtype)
    mapper = getattr(adapters.model, "hf_to_vllm_mapper", None)
    lora = LoRAModel.from_lora_tensors(
        number,
        dict(tensors),
        helper,
        device=worker.device,
        dtype=dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=mapper.get_unstacked_mapper() if mapper is not None else None,
    )
    slots = adapter_slots(adapters, lora.loras)
    if previous is not None:
        adapters.remove_adapter(previous)
    adapters.add_adapter(lora)
    adapters.activate_adapter(number)
    index = adapters.lora_index_to_id.index(number)
    read_back(_sent_and_found(modules, tensors, slots, index), "adapter")
    return sum(tensor.nbytes for tensor in tensors.values())


def adapter_slots(adapters: Any, names: Iterable[str]) -> dict[str, tuple[Any, int]]:
    """Adapter module → (the engine's LoRA layer, which of its slices). Raises `RunError` for one without a slot."""
    slots: dict[str, tuple[Any, int]] = {}
    for name, layer in adapters.modules.items():
        parts = adapters.packed_modules.get(name, [name])
        slots |= {part: (layer, place) for place, part in enumerate(parts)}
    lost = sorted(set(names) - set(slots))
    if lost:
        raise RunError(
            f"the engine has no adapter slot for {len(lost)} projections, e.g. {lost[0]}: they would not act"
        )
    return slots


def _sent_and_found(
    modules: Mapping[str, LoRAParts], tensors: Mapping[str, Tensor], slots: Mapping[str, tuple[Any, int]], index: int
) -> Iterable[tuple[str, Tensor, Tensor]]:
    """Eight projections spread over the model: what was sent and what their slots hold."""
    for path in list(modules)[:: max(1, len(modules) // 8)]:
        if path not in slots:
            continue  # this family renames its modules; the probe judges them
        layer, place = slots[path]
        for matrix, stacked in (("lora_A", layer.lora_a_stacked), ("lora_B", layer.lora_b_stacked)):
            sent = tensors[f"base_model.model.{path}.{matrix}.weight"]
            yield f"{path}.{matrix}", sent, stacked[place][index, 0, : sent.shape[0], : sent.shape[1]]


def _leaves(modules: Mapping[str, LoRAParts]) -> set[str]:
    return {path.rpartition(".")[2] for path in modules}


# --- sleep ---------------------------------------------------------------------------------------------------


def kv_only_sleep() -> Any:
    """A sleep back end that unmaps the KV cache alone: weights stay where the trainer's views point.

    It goes through vLLM's own extension point, `SleepModeBackend`, which has no engine argument in this version.
    """
    from vllm.device_allocator.cumem import CuMemAllocator, unmap_and_release
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackend

    class KVCacheOnly(SleepModeBackend):
        def suspend(self, level: int = 1) -> None:
            for data in CuMemAllocator.get_instance().pointer_to_data.values():
                if data.tag == "kv_cache" and not data.is_asleep:
                    unmap_and_release(data.handle)
                    data.is_asleep = True
            self._state = "SUSPENDED"

        def resume(self, tags: list[str] | None = None) -> None:
            if tags is None or "kv_cache" in tags:
                CuMemAllocator.get_instance().wake_up(["kv_cache"])
            self._state = "RUNNING"

        @classmethod
        def preserves_communicators(cls) -> bool:
            return True

    return KVCacheOnly()


def pool_bytes() -> dict[str, int]:
    """Bytes that the engine's pools hold on the device now, by tag ("weights", "kv_cache")."""
    from vllm.device_allocator.cumem import CuMemAllocator

    found: dict[str, int] = {}
    for data in CuMemAllocator.get_instance().pointer_to_data.values():
        if not data.is_asleep:
            found[data.tag] = found.get(data.tag, 0) + data.handle[1]
    return found


def unmapped_bytes() -> int:
    """Bytes of the engine's pools that are not on the device now; torch goes on counting them."""
    from vllm.device_allocator.cumem import CuMemAllocator

    return sum(data.handle[1] for data in CuMemAllocator.get_instance().pointer_to_data.values() if data.is_asleep)


def check_rank(r: int, allowed: Iterable[int]) -> int:
    """The smallest rank the engine can be built for that holds `r`. Raises `InputError`."""
    fitting = [rank for rank in allowed if rank >= r]
    if not fitting:
        raise InputError(f"adapter.r is {r} (want at most {max(allowed)}: vLLM serves no larger one)")
    return min(fitting)
