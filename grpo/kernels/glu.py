"""Gated linear units: h = act(e)·g and its gradients, one pass over memory each.

    silu       act = e·σ, σ = sigmoid(e)                                   act′ = σ·(1 + e·(1 − σ))
    gelu       act = e·Φ, Φ = ½(1 + erf(e/√2))                             act′ = Φ + e·exp(−e²/2)/√(2π)
    gelu_tanh  act = ½e(1 + t), t = tanh(u), u = c(e + a·e³)               act′ = ½(1 + t) + ½e(1 − t²)·c(1 + 3a·e²)
               c = √(2/π), a = 0.044715; as s = sigmoid(2u) = ½(1 + t), which keeps its digits where t nears −1:
               act = e·s                                                   act′ = s + e·s(1 − s)·2c(1 + 3a·e²)
    dg = dh·act(e)        de = dh·g·act′(e)

Sources: SwiGLU and GeGLU, Shazeer 2020, arXiv:2002.05202; GELU and its tanh form, Hendrycks & Gimpel 2016,
arXiv:1606.08415. Maths in float32 (float64 for float64), results in the storage dtype.

Left out: double backward; biases; e and g interleaved in one matrix (two slices of one matrix are fine).
A compiled caller gets a graph break here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from grpo.kernels.backend import Backend
from grpo.kernels.rows import new_like, twin_name, wide

Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS = get_args(Activation)


class GluOutputs(NamedTuple):
    """Where the backward pass writes; `h` None: not wanted. May be the inputs themselves."""

    h: Tensor | None
    dg: Tensor
    de: Tensor


class GluTwin(NamedTuple):
    """What a twin has to bring; all tensors of one shape, dtype and device, checked, not empty.

    forward(e, g, activation, out): out ← act(e)·g.
    backward(dh, e, g, activation, out): out.h ← act(e)·g, out.dg ← dh·act(e), out.de ← dh·g·act′(e).
    """

    forward: Callable[[Tensor, Tensor, Activation, Tensor], None]
    backward: Callable[[Tensor, Tensor, Tensor, Activation, GluOutputs], None]


@torch.compiler.disable
def glu(e: Tensor, g: Tensor, activation: Activation, *, backend: Backend = "auto") -> Tensor:
    """h = act(e)·g, differentiable in e and g (saves both).

    Args:
        e: gate projection, any shape, any float dtype.
        g: up projection, of e's shape, dtype and device. Rows of either may be strided.
        activation: see the table above. `gelu_tanh` is transformers' "gelu_pytorch_tanh" and "gelu_new".
        backend: see `resolve_backend`.

    Returns:
        h, of e's shape and dtype, contiguous.

    Raises:
        ValueError: one line: shapes, dtypes, devices or the activation do not fit.
    """
    _check(activation, e, g=g)
    return _Glu.apply(e, g, activation, _twin(backend, e))


@torch.compiler.disable
def glu_forward(
    e: Tensor, g: Tensor, activation: Activation, *, out: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """The same without autograd. `out` (default: a new tensor) may be e or g.

    Raises:
        ValueError: as `glu`; or an `out` whose rows are not one stride apart.
    """
    _check(activation, e, g=g, out=e if out is None else out)
    return _forward(e.detach(), g.detach(), activation, out, _twin(backend, e))


@torch.compiler.disable
def glu_backward_(dh: Tensor, e: Tensor, g: Tensor, activation: Activation, *, backend: Backend = "auto") -> None:
    """In place on three buffers of one shape: dh ← h = act(e)·g, g ← dg = dh·act(e), e ← de = dh·g·act′(e).

    The caller owns all three and nobody else may read them afterwards. Their versions go up, so that autograd raises
    where it had saved one of them.

    Raises:
        ValueError: as `glu`; or a buffer whose rows are not one stride apart.
    """
    _check(activation, e, g=g, dh=dh)
    if e.numel():
        dh, e, g = dh.detach(), e.detach(), g.detach()
        _twin(backend, e).backward(dh, e, g, activation, GluOutputs(dh, g, e))
        increment_version((dh, e, g))  # so that autograd refuses to use them as what it saved


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e: Tensor, g: Tensor, activation: Activation, twin: GluTwin) -> Tensor:
        ctx.save_for_backward(e, g)
        ctx.activation, ctx.twin = activation, twin
        return _forward(e, g, activation, None, twin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        e, g = ctx.saved_tensors
        out = GluOutputs(None, new_like(g), new_like(e))
        if e.numel():
            ctx.twin.backward(dh, e, g, ctx.activation, out)
        need_e, need_g = ctx.needs_input_grad[:2]
        return out.de if need_e else None, out.dg if need_g else None, None, None


def _forward(e: Tensor, g: Tensor, activation: Activation, out: Tensor | None, twin: GluTwin) -> Tensor:
    given = out
    if out is None:
        out = new_like(e)
    if e.numel():
        twin.forward(e, g, activation, out)
    if given is not None:
        increment_version(given)
    return out


def _torch_forward(e: Tensor, g: Tensor, activation: Activation, out: Tensor) -> None:
    out.copy_(_act_and_slope(wide(e), activation)[0] * wide(g))


def _torch_backward(dh: Tensor, e: Tensor, g: Tensor, activation: Activation, out: GluOutputs) -> None:
    act, slope = _act_and_slope(wide(e), activation)
    h, dg, de = act * wide(g), wide(dh) * act, wide(dh) * wide(g) * slope  # all read before the first is written
    out.dg.copy_(dg)
    out.de.copy_(de)
    if out.h is not None:
        out.h.copy_(h)


def _act_and_slope(e: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    if activation == "silu":
        sigma = torch.sigmoid(e)
        return e * sigma, sigma * (1 + e * (1 - sigma))
    if activation == "gelu":
        phi = torch.special.ndtr(e)
        return e * phi, phi + e * torch.exp(-0.5 * e * e) / math.sqrt(2 * math.pi)
    c, a = math.sqrt(2 / math.pi), 0.044715
    s = torch.sigmoid(2 * c * (e + a * e**3))
    return e * s, s + e * s * (1 - s) * 2 * c * (1 + 3 * a * e * e)


_TORCH = GluTwin(_torch_forward, _torch_backward)


@functools.cache
def _triton() -> GluTwin:
    from grpo.kernels import glu_triton

    return GluTwin(glu_triton.forward, glu_triton.backward)


def _twin(backend: Backend, e: Tensor) -> GluTwin:
    return _TORCH if twin_name(backend, e.device.type, e.dtype) == "torch" else _triton()


def _check(activation: Activation, e: Tensor, **others: Tensor) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: unknown {activation!r} (want {', '.join(ACTIVATIONS)})")
    if not e.is_floating_point() or e.dim() < 1:
        raise ValueError(f"e: {e.dtype} of shape {tuple(e.shape)} (want floating point, at least one dimension)")
    for name, tensor in others.items():
        if tensor.shape != e.shape or tensor.dtype != e.dtype or tensor.device != e.device:
            found, wanted = (f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (tensor, e))
            raise ValueError(f"{name}: {found}, e {wanted} (want all alike)")
