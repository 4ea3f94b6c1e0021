"""Fused kernels inside a loaded model: forwards of single instances are replaced, listed, and put back.

What is replaced is found by layout (which children, which shapes) and admitted by numbers: on a few random rows the
fused forward must give what the stock forward gives, else that module stays as it is and the list says why. So
Llama, Qwen2/2.5, Qwen3, Mistral, Gemma-2/3 and whatever is built like them are covered, and no name is looked up.
- RMSNorm: fused, in the rounding order that the module was seen to use.
- MLP: gate, up, act·, down in one Function that keeps X, e and g (frozen base); with a trainable base act· alone.
- Attention: QKV in one Function, head norms, RoPE in place, packed attention, output projection. Only for packed bins
  (`segments=…`); any other call, generation among them, goes to the stock forward.
Left out: library classes (never touched), MoE routing and experts, LayerNorm models, partial rotary embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.errors import clip
from grpo.kernels.glu import Activation, glu
from grpo.kernels.lora import AdapterCopies, LoRALinear, lora_linear, lora_qkv
from grpo.kernels.lora_mlp import lora_mlp
from grpo.kernels.nf4 import NF4Weight
from grpo.kernels.rmsnorm import rmsnorm
from grpo.kernels.rope import rope
from grpo.model.adapter import LoRAParts, adapters_disabled, has_hooks, lora_parts
from grpo.model.attention import PackedAttention, packed_attention
from grpo.model.offload import Checkpointer
from grpo.packing import segments

# Relative error by which a fused forward may differ on the probe: the rounding of one layer. Stock layers take norms
# and rotations in float32 at best.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
PROBE_ROWS = 6


class Change(NamedTuple):
    """One module: what was done to it, or with `done` false why it was left alone."""

    path: str
    what: str
    done: bool


@dataclass(frozen=True)
class Surgery:
    """What was changed in one model, and the way back."""

    changes: list[Change] = field(default_factory=list)
    whole: set[str] = field(default_factory=set)  # paths of MLPs and attentions that are fused from end to end
    _patched: list[nn.Module] = field(default_factory=list)

    def restore(self) -> None:
        """Take every change back; the model then is what it was, bit for bit."""
        for module in self._patched:
            del module.forward, module._fused
        self._patched.clear()

    def admit(
        self, path: str, module: nn.Module, what: str, forward: Callable[..., Any], error: float, *, whole: bool = False
    ) -> None:
        """Install `forward` if it came within the tolerance of the stock one; list it either way."""
        done = error <= TOLERANCE[_dtype(module)]
        if done and whole:
            self.whole.add(path)
        if done:
            module.forward = forward
            module._fused = self  # type: ignore[assignment]
            self._patched.append(module)
        self.changes.append(Change(path, what if done else f"{what}: differs by {error:.1e}", done))

    def leave(self, path: str, module: nn.Module, why: str) -> None:
        """List a module that stays as it is."""
        self.changes.append(Change(path, f"{type(module).__name__}: {why}", False))

    def summary(self) -> list[str]:
        """One line per kind of change, with the number of modules."""
        counts: dict[tuple[str, bool], int] = {}
        for change in self.changes:
            counts[change.what, change.done] = counts.get((change.what, change.done), 0) + 1
        return [f"{'fused' if done else 'left alone'}: {n} × {what}" for (what, done), n in counts.items()]


def patch(
    model: nn.Module,
    attention: PackedAttention | None = None,
    checkpointer: Checkpointer | None = None,
    *,
    tiled_mlp: bool = False,
) -> Surgery:
    """Replace forwards inside `model` (a causal LM or its backbone) where the fused ones give the same numbers.

    Args:
        attention: the model's switch to packed attention; None (it does not pack): attention stays stock.
        checkpointer: tells an MLP whose value nobody reads that it is being recomputed.
        tiled_mlp: MLPs in slices of about hidden_size tokens.

    Raises:
        ValueError: the model is patched already.
    """
    if any(hasattr(module, "_fused") for module in model.modules()):
        raise ValueError("surgery: this model is patched already (want restore() first)")
    surgery = Surgery()
    with torch.no_grad():
        unread = {id(mlp) for mlp in _unread_mlps(model)} if checkpointer is not None else set()
        for path, module in model.named_modules():
            if _is_norm(module):
                _patch_norm(surgery, path, module)
            elif _has(module, "gate_proj", "up_proj", "down_proj", "act_fn"):
                _patch_mlp(surgery, path, module, _MLP(checkpointer, id(module) in unread, tiled_mlp))
            elif _has(module, "q_proj", "k_proj", "v_proj", "o_proj"):
                _patch_attention(surgery, path, module, attention, checkpointer)
    return surgery


def unpatch(model: nn.Module) -> None:
    """Take back whatever an earlier `patch` did to this model, so that it may be prepared anew."""
    for module in model.modules():
        found = getattr(module, "_fused", None)
        if found is not None:
            found.restore()


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _noise(*shape: int, module: nn.Module) -> Tensor:
    device = next(module.parameters()).device
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return values.to(device, _dtype(module))


def _dtype(module: nn.Module) -> torch.dtype:
    """What the module computes in: the compute type of a 4-bit layer, else its weights' (LoRA's own set aside)."""
    for child in module.modules():
        found = getattr(child, "compute_dtype", None)
        if isinstance(found, torch.dtype):
            return found
    weights = {name: p.dtype for name, p in module.named_parameters() if p.is_floating_point()}
    return next((dtype for name, dtype in weights.items() if "lora_" not in name), torch.float32)


def _error(found: Tensor, wanted: Tensor) -> float:
    difference = (found.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm().clamp_min(1e-30))


# --- norms -----------------------------------------------------------------------------------------------------------

_ORDERS: tuple[tuple[float, bool], ...] = ((0.0, False), (0.0, True), (1.0, True))  # (offset, late_cast)


def _is_norm(module: nn.Module) -> bool:
    weights = dict(module.named_parameters(recurse=False))
    return type(module).__name__.endswith("RMSNorm") and set(weights) == {"weight"} and weights["weight"].ndim == 1


def _patch_norm(surgery: Surgery, path: str, module: Any) -> None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        surgery.leave(path, module, "no epsilon")
        return
    x = _noise(PROBE_ROWS, len(module.weight), module=module)
    weight = 1 + 0.5 * _noise(1, len(module.weight), module=module)[0]  # a fresh one is all ones and shows no order
    own, module.weight = module.weight, nn.Parameter(weight, requires_grad=False)
    try:
        wanted = module.forward(x)  # not through __call__: hooks are the user's, and stay where they are
    finally:
        module.weight = own
    errors = [_error(rmsnorm(x, weight, eps, offset=o, late_cast=late), wanted) for o, late in _ORDERS]
    best = min(range(len(_ORDERS)), key=errors.__getitem__)
    forward = partial(_norm_forward, module, eps, *_ORDERS[best])
    surgery.admit(path, module, type(module).__name__, forward, errors[best])


def _norm_forward(module: Any, eps: float, offset: float, late_cast: bool, hidden_states: Tensor) -> Tensor:
    return rmsnorm(hidden_states, module.weight, eps, offset=offset, late_cast=late_cast)


# --- projections -----------------------------------------------------------------------------------------------------


class _Projection:
    """A linear layer whose base is frozen, with or without LoRA, as the fused functions take it."""

    def __init__(self, module: Any, base: Any, parts: LoRAParts | None) -> None:
        self.module, self.base, self.parts = module, base, parts
        self.copies: AdapterCopies | None = None
        self.checkpointer: Checkpointer | None = None
        self.quantised = NF4Weight.of(base) if hasattr(base.weight, "quant_state") else None

    def now(self) -> LoRALinear:
        """Weights as they are at this moment; the adapter may be switched off."""
        parts = None if self.parts is None or adapters_disabled(self.module) else self.parts
        weight = self.base.weight if self.quantised is None else self.quantised
        if parts is None:
            return LoRALinear(weight, self.base.bias, None, None, 1.0)
        # Copies are those of the pass under way; a call outside one, such as generation, casts for itself.
        in_pass = self.checkpointer is not None and self.checkpointer.current is not None
        return LoRALinear(weight, self.base.bias, parts.a, parts.b, parts.scale, self.copies if in_pass else None)


def _projection(module: Any) -> _Projection | str:
    """`module` for the fused path, or why it must keep its own forward."""
    parts = lora_parts(module)
    if isinstance(parts, str):
        return parts
    base: Any = module if parts is None else parts.base
    if not isinstance(base, nn.Linear):
        return f"{type(base).__name__} is not a linear layer"
    if any(p.requires_grad for p in base.parameters(recurse=False)):
        return "trainable weights"
    if parts is not None and parts.dropout > 0:
        return "LoRA dropout"
    if has_hooks(base):
        return "hooks"
    return _Projection(module, base, parts)


def _projections(*modules: Any) -> list[_Projection] | str:
    """All of them, or the first reason against."""
    found = [_projection(module) for module in modules]
    return next((reason for reason in found if isinstance(reason, str)), None) or found  # type: ignore[return-value]


def _copy_adapters(projections: list[_Projection], checkpointer: Checkpointer | None) -> None:
    """Give projections of one input their adapters in the model's dtype, brought up to date once a pass.

    Casting them in every call would be most of the kernels that a layer launches.
    """
    adapted = [(p, p.parts) for p in projections if p.parts is not None]
    if checkpointer is None or not adapted:
        return
    dtype = _dtype(adapted[0][0].module)
    group = torch.cat([parts.a.detach().to(dtype) for _, parts in adapted])
    for (projection, parts), a in zip(adapted, group.split([parts.a.shape[0] for _, parts in adapted]), strict=True):
        projection.checkpointer = checkpointer
        projection.copies = AdapterCopies(a, parts.b.detach().to(dtype, copy=True), group)
        checkpointer.refreshed += [(a, parts.a), (projection.copies.b, parts.b)]


# --- MLP -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _MLP:
    """How an MLP runs. `unread`: its value goes into a sum alone, so that a recomputation may leave it out."""

    checkpointer: Checkpointer | None
    unread: bool
    tiled: bool


def _patch_mlp(surgery: Surgery, path: str, module: Any, how: _MLP) -> None:
    activation = _activation_of(module.act_fn)
    if activation is None:
        surgery.leave(path, module, f"activation {type(module.act_fn).__name__}")
        return
    fused = _projections(module.gate_proj, module.up_proj, module.down_proj)
    x = _noise(1, PROBE_ROWS, _width(module.gate_proj), module=module)
    try:
        wanted = module.forward(x)
        if isinstance(fused, str):
            forward, what = partial(_glu_forward, module, activation), f"{type(module).__name__} (activation; {fused})"
        else:
            _copy_adapters(fused[:2], how.checkpointer)
            _copy_adapters(fused[2:], how.checkpointer)
            forward, what = partial(_mlp_forward, fused, activation, how), type(module).__name__
        error = _error(forward(x), wanted)
    except (TypeError, ValueError, RuntimeError) as problem:
        surgery.leave(path, module, clip(problem))
        return
    surgery.admit(path, module, what, forward, error, whole=not isinstance(fused, str))


def _glu_forward(module: Any, activation: Activation, x: Tensor) -> Tensor:
    return module.down_proj(glu(module.gate_proj(x), module.up_proj(x), activation))


def _mlp_forward(fused: list[_Projection], activation: Activation, how: _MLP, x: Tensor) -> Tensor:
    gate, up, down = (projection.now() for projection in fused)
    tiles = max(1, math.ceil(x.numel() / x.shape[-1] ** 2)) if how.tiled else 1
    unread = how.unread and how.checkpointer is not None and how.checkpointer.recomputing
    return lora_mlp(x, gate, up, down, activation, skip_output=unread, tiles=tiles)


def _activation_of(module: Callable[[Tensor], Tensor]) -> Activation | None:
    x = torch.linspace(-6, 6, 97)
    for name, formula in _ACTIVATIONS.items():
        if torch.allclose(module(x), formula(x), atol=1e-6, rtol=0):
            return name
    return None


def _width(linear: Any) -> int:
    return int(linear.in_features)


def _unread_mlps(model: nn.Module) -> Iterator[nn.Module]:
    """MLPs of layers where y = r + MLP(x): seen by putting other values in the MLP's place."""
    layer: Any
    for layer in model.modules():
        if not _has(layer, "self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
            continue
        x, m = _noise(2, 1, 3, len(layer.input_layernorm.weight), module=layer)
        zeros = torch.zeros_like(x)
        try:
            without, with_m = (_layer_with(layer, x, zeros, value) for value in (zeros, m))
        except (TypeError, ValueError, RuntimeError, AttributeError):
            continue
        if torch.equal(with_m, without + m):
            yield layer.mlp


def _layer_with(layer: Any, x: Tensor, attention: Tensor, mlp: Tensor) -> Tensor:
    with _stand_in(layer.self_attn, (attention, None)), _stand_in(layer.mlp, mlp):
        output = type(layer).forward(layer, x, attention_mask=None, position_ids=None, position_embeddings=None)
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _stand_in(module: nn.Module, value: Any) -> Iterator[None]:
    module.forward = lambda *_, **__: value
    try:
        yield
    finally:
        del module.forward


# --- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attention:
    """One attention module's parts; scale, window and softcap are what it was seen to ask its back end for."""

    module: Any
    qkv: list[_Projection] | None  # None: each keeps its own forward
    output: _Projection | None
    scale: float
    window: int | None
    softcap: float | None
    checkpointer: Checkpointer | None


def _patch_attention(
    surgery: Surgery, path: str, module: Any, attention: PackedAttention | None, checkpointer: Checkpointer | None
) -> None:
    if attention is None:
        surgery.leave(path, module, "the model does not keep packed documents apart")
        return
    qkv, output = _projections(module.q_proj, module.k_proj, module.v_proj), _projection(module.o_proj)
    what = type(module).__name__ + (f" (RoPE; {qkv})" if isinstance(qkv, str) else "")
    if not isinstance(qkv, str):
        _copy_adapters(qkv, checkpointer)
    if not isinstance(output, str):
        _copy_adapters([output], checkpointer)
    x = _noise(1, PROBE_ROWS, _width(module.q_proj), module=module)
    asked: list[dict[str, Any]] = []
    try:
        angle = _noise(PROBE_ROWS, module.head_dim // 2, module=module)
        rotation = tuple(torch.cat([half(angle)] * 2, dim=-1)[None] for half in (torch.cos, torch.sin))
        layout = segments([PROBE_ROWS - 2, 2]).to(x.device)
        with attention.on():
            wanted = module.forward(
                hidden_states=x, position_embeddings=rotation, attention_mask=None, segments=layout, record=asked
            )[0]
        parts = _Attention(
            module,
            None if isinstance(qkv, str) else qkv,
            None if isinstance(output, str) else output,
            checkpointer=checkpointer if checkpointer is not None and checkpointer.keep_attention else None,
            **asked[0],
        )
        forward = partial(_attention_forward, parts)
        found = forward(hidden_states=x, position_embeddings=rotation, segments=layout)[0]
        error = _error(found, wanted)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as problem:
        surgery.leave(path, module, clip(problem))
        return
    surgery.admit(path, module, what, forward, error, whole=True)


def _attention_forward(
    parts: _Attention,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    **others: Any,
) -> tuple[Tensor, Any]:
    module = parts.module
    layout = others.get("segments")
    if layout is None or position_embeddings is None or position_embeddings[0].shape[-1] != module.head_dim:
        return type(module).forward(
            module,
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **others,
        )
    x = hidden_states.squeeze(0)
    query, key, value = _queries_keys_values(parts, x)
    cos, sin = (table[0] for table in position_embeddings)
    # In place: projections and norms have just made these, and keep nothing of them.
    query, key = rope(query, key, cos, sin, in_place=True)
    query, key, value = (tensor.view(len(x), -1, module.head_dim) for tensor in (query, key, value))
    out = packed_attention(
        query,
        key,
        value,
        layout,
        scale=parts.scale,
        window=parts.window,
        softcap=parts.softcap,
        keeper=None if parts.checkpointer is None else parts.checkpointer.current,
    )
    out = out.reshape(len(x), -1)
    out = module.o_proj(out) if parts.output is None else lora_linear(out, parts.output.now())
    return out[None], None


def _queries_keys_values(parts: _Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T, Hq·D], [T, Hk·D], [T, Hk·D]; queries and keys after the head norms where there are any."""
    module = parts.module
    if parts.qkv is None:
        query, key, value = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    else:
        query, key, value = lora_qkv(x, *(projection.now() for projection in parts.qkv))
    if getattr(module, "q_norm", None) is not None:
        heads = len(x), -1, module.head_dim
        query, key = module.q_norm(query.view(heads)), module.k_norm(key.view(heads))
    return query, key, value
