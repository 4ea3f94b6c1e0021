"""Root mean square norm, with exact gradients in one pass each.

    ρ = rsqrt(mean(x²) + ε), x̂ = x·ρ
    y = w·cast(x̂)                     Llama's order: x̂ is rounded to x's dtype, then the product is rounded
    y = cast(x̂·(offset + w))          Gemma's order (`late_cast`), with offset 1
    q = dY·f, f = w or offset + w     dX = ρ·(q − x̂·mean(q·x̂))          dw = Σ_rows dY·x̂  (Llama's: of the rounded x̂)

Source: Zhang & Sennrich 2019, arXiv:1910.07467. Maths in float32 (float64 for float64); what is kept is x and ρ.

Left out: saving y instead of x (needs x̂ = y/f, so f nowhere near 0); the residual's sum in the same pass; biases;
double backward. A compiled caller gets a graph break here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels.backend import Backend
from grpo.kernels.rows import as_rows, new_like, twin_name, wide


@dataclass(frozen=True, slots=True)
class NormCall:
    """One call's settings."""

    eps: float
    offset: float
    late_cast: bool


class RmsNormTwin(NamedTuple):
    """What a twin has to bring, on rows [R, H] with R, H ≥ 1 (weight [H] contiguous or None).

    forward(x, weight, call, y, rho): y [R, H] and ρ [R] are written.
    backward(dy, x, weight, rho, call, dx, with_dw) -> dw [H] in the dtype of the maths, or None: dx [R, H] is written.
    """

    forward: Callable[[Tensor, Tensor | None, NormCall, Tensor, Tensor], None]
    backward: Callable[[Tensor, Tensor, Tensor | None, Tensor, NormCall, Tensor, bool], Tensor | None]


@torch.compiler.disable
def rmsnorm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    late_cast: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Norm of x over its last dimension, differentiable in x and, when it requires grad, weight.

    Args:
        x: […, H], any float dtype. Rows may be strided; other layouts are copied.
        weight: [H], or None for none. Of any float dtype; as in transformers, a float32 weight on a bfloat16 x gives a
            float32 result in Llama's order, never in Gemma's.
        eps: ε, added to the mean square.
        offset: added to the weight (Gemma: 1); in Gemma's order alone.
        late_cast: False: Llama's order of rounding, True: Gemma's.
        backend: see `resolve_backend`. Triton takes H up to 65,536, one block a row.

    Returns:
        y […, H], contiguous. dw is summed in float32 and the same bits in every run.

    Raises:
        ValueError: one line: shapes, dtypes, devices or settings do not fit.
    """
    _check(x, weight, offset, late_cast)
    twin = _TORCH if twin_name(backend, x.device.type, x.dtype) == "torch" else _triton()
    return _RmsNorm.apply(x, weight, NormCall(eps, offset, late_cast), twin)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, call: NormCall, twin: RmsNormTwin) -> Tensor:
        rows = as_rows(x)
        y = new_like(x, _result_dtype(x, weight, call))
        rho = torch.empty(rows.shape[0], dtype=_maths_dtype(x), device=x.device)
        if x.numel():
            twin.forward(rows, weight, call, as_rows(y), rho)
        ctx.save_for_backward(x, weight, rho)
        ctx.call, ctx.twin = call, twin
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rho = ctx.saved_tensors
        dx = new_like(x)
        with_dw = ctx.needs_input_grad[1]
        dw = None
        if x.numel():
            dw = ctx.twin.backward(as_rows(dy), as_rows(x), weight, rho, ctx.call, as_rows(dx), with_dw)
        elif with_dw:
            dw = torch.zeros_like(weight)
        if dw is not None:
            dw = dw.to(weight.dtype)
        return dx if ctx.needs_input_grad[0] else None, dw, None, None


def _result_dtype(x: Tensor, weight: Tensor | None, call: NormCall) -> torch.dtype:
    if weight is None or call.late_cast or weight.dtype == x.dtype:
        return x.dtype
    return torch.promote_types(x.dtype, weight.dtype)


def _maths_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- the torch twin --------------------------------------------------------------------------------------------------


def _torch_forward(x: Tensor, weight: Tensor | None, call: NormCall, y: Tensor, rho: Tensor) -> None:
    exact = wide(x)
    torch.rsqrt(exact.square().mean(-1) + call.eps, out=rho)
    normed = exact * rho[:, None]
    if weight is None:
        y.copy_(normed)
    elif call.late_cast:
        y.copy_(normed * (call.offset + weight.to(normed.dtype)))
    else:
        y.copy_(normed.to(x.dtype).to(normed.dtype) * weight.to(normed.dtype))


def _torch_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rho: Tensor, call: NormCall, dx: Tensor, with_dw: bool
) -> Tensor | None:
    dy = wide(dy).to(rho.dtype)
    normed = wide(x) * rho[:, None]
    q = dy if weight is None else dy * (call.offset + weight.to(rho.dtype))
    dx.copy_(rho[:, None] * (q - normed * (q * normed).mean(-1, keepdim=True)))
    if not with_dw:
        return None
    if not call.late_cast:
        normed = normed.to(x.dtype).to(rho.dtype)
    return (dy * normed).sum(0)


_TORCH = RmsNormTwin(_torch_forward, _torch_backward)


@functools.cache
def _triton() -> RmsNormTwin:
    from grpo.kernels import rmsnorm_triton

    return RmsNormTwin(rmsnorm_triton.forward, rmsnorm_triton.backward)


def _check(x: Tensor, weight: Tensor | None, offset: float, late_cast: bool) -> None:
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(f"x: {x.dtype} of shape {tuple(x.shape)} (want floating point [..., H])")
    if offset and not late_cast:
        raise ValueError(f"offset: {offset} (want 0 unless late_cast)")
    if weight is None:
        return
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1] or not weight.is_contiguous():
        raise ValueError(f"weight: shape {tuple(weight.shape)} (want contiguous [{x.shape[-1]}])")
    if weight.device != x.device or not weight.is_floating_point():
        raise ValueError(f"weight: {weight.dtype} on {weight.device} (want floating point on {x.device})")
    if weight.dtype == torch.float64 and x.dtype != torch.float64:
        raise ValueError(f"weight: torch.float64 for x {x.dtype} (want at most float32)")
