"""Rotary position embedding of queries and keys, one launch for both.

    halves (x1, x2) of a head, angle θ per token and pair:    y1 = x1·cos − x2·sin        y2 = x2·cos + x1·sin
    backward: the inverse rotation, which is the same with −sin

Source: Su et al. 2021, arXiv:2104.09864, in the split-halves layout of GPT-NeoX that transformers uses. Maths in
float32 (float64 for float64), rounded once; transformers rounds cos, sin and each product to the dtype of q, so that in
bfloat16 the two differ by its rounding error.

Left out: interleaved pairs (GPT-J), rotating only part of a head, gradients of cos and sin, double backward. A compiled
caller gets a graph break here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from grpo.kernels.backend import Backend
from grpo.kernels.rows import new_like, twin_name, wide


@dataclass(frozen=True, slots=True)
class Angles:
    """cos and sin [T, D], or with positions [T] tables [P, D]; only the first D/2 columns are read."""

    cos: Tensor
    sin: Tensor
    positions: Tensor | None


# rotate(q, k, q_out, k_out, angles, inverse): all four [T, heads, D] with D contiguous; outputs may be the inputs.
RopeTwin = Callable[[Tensor, Tensor, Tensor, Tensor, Angles, bool], None]


@torch.compiler.disable
def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    in_place: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotated (q, k), differentiable in both; keeps nothing but cos, sin and positions.

    Args:
        q: [T, Hq·D] or [T, Hq, D], any float dtype, any stride of tokens and heads.
        k: [T, Hk·D] or [T, Hk, D], of q's dtype and device.
        cos, sin: [T, D] as transformers makes them (both halves equal), any float dtype; D is the head's width.
        positions: [T] integers: row of token t in cos and sin, which are then tables [P, D]. Restarts at 0 in every
            packed document. A position outside [0, P) gives NaN, without a host sync.
        in_place: write over q and k and return them: legal only on private outputs that no other Function has saved,
            such as a projection's. The backward pass is always out of place.
        backend: see `resolve_backend`.

    Returns:
        (q', k') of the shapes of q and k; contiguous unless in place.

    Raises:
        ValueError: one line: shapes, dtypes, devices or strides do not fit.
    """
    _check(q, k, cos, sin, positions)
    angles = Angles(cos, sin, positions)
    return _Rope.apply(q, k, angles, in_place, _twin(backend, q))


@torch.compiler.disable
def rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    inverse: bool = False,
    in_place: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`rope` without autograd; `inverse` rotates back, which is its backward pass: (dq, dk) from (dq', dk').

    Raises:
        ValueError: as `rope`.
    """
    _check(q, k, cos, sin, positions)
    return _rotate(q.detach(), k.detach(), Angles(cos, sin, positions), inverse, in_place, _twin(backend, q))


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, angles: Angles, in_place: bool, twin: RopeTwin
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(angles.cos, angles.sin, angles.positions)
        ctx.twin = twin
        if in_place:
            ctx.mark_dirty(q, k)
        return _rotate(q, k, angles, False, in_place, twin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        # Out of place: autograd may hand the storage of dq and dk to others as well.
        dq, dk = _rotate(dq, dk, Angles(*ctx.saved_tensors), True, False, ctx.twin)
        need_q, need_k = ctx.needs_input_grad[:2]
        return dq if need_q else None, dk if need_k else None, None, None, None


def _rotate(
    q: Tensor, k: Tensor, angles: Angles, inverse: bool, in_place: bool, twin: RopeTwin
) -> tuple[Tensor, Tensor]:
    width = angles.cos.shape[-1]
    q_in, k_in = _heads(q, width, "q", in_place), _heads(k, width, "k", in_place)
    q_out, k_out = q, k
    if not in_place:
        q_out, k_out = new_like(q), new_like(k)
    if q.shape[0]:
        written = (q_in, k_in) if in_place else (_heads(q_out, width, "q", True), _heads(k_out, width, "k", True))
        twin(q_in, k_in, *written, angles, inverse)
        if in_place:
            increment_version((q, k))
    return q_out, k_out


def _heads(x: Tensor, width: int, name: str, must_view: bool) -> Tensor:
    """[T, heads, D] with contiguous D."""
    if x.stride(-1) != 1:
        if must_view:
            raise ValueError(f"{name}: strides {x.stride()} (want a contiguous last dimension to rotate in place)")
        x = x.contiguous()
    return x.unflatten(-1, (-1, width)) if x.dim() == 2 else x


def _torch_rotate(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, angles: Angles, inverse: bool) -> None:
    half = angles.cos.shape[-1] // 2
    cos, sin = (_of_tokens(x[:, :half], angles.positions)[:, None] for x in (angles.cos, angles.sin))
    if q.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    if inverse:
        sin = -sin
    for x, out in ((q, q_out), (k, k_out)):
        x1, x2 = wide(x[..., :half]), wide(x[..., half:])
        y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        out[..., :half] = y1
        out[..., half:] = y2


def _of_tokens(table: Tensor, positions: Tensor | None) -> Tensor:
    """[T, D/2] in the dtype of the maths."""
    if positions is None:
        return wide(table)
    last = table.shape[0] - 1
    outside = (positions < 0) | (positions > last)
    return wide(table[positions.clamp(0, last)]).masked_fill(outside[:, None], float("nan"))


@functools.cache
def _triton() -> RopeTwin:
    from grpo.kernels import rope_triton

    return rope_triton.rotate


def _twin(backend: Backend, q: Tensor) -> RopeTwin:
    return _torch_rotate if twin_name(backend, q.device.type, q.dtype) == "torch" else _triton()


# --- what is refused -------------------------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    shape = cos.shape
    if len(shape) != 2 or shape[1] % 2 or not shape[1]:
        raise ValueError(f"cos: shape {tuple(shape)} (want [T, D] with an even D)")
    if sin.shape != shape or sin.dtype != cos.dtype or sin.device != cos.device:
        raise ValueError(f"sin: {sin.dtype} {tuple(sin.shape)}, cos {cos.dtype} {tuple(shape)} (want both alike)")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos, sin: require grad (want constants)")
    _check_heads("q", q, q, cos)
    _check_heads("k", k, q, cos)
    tokens = q.shape[0]
    if positions is None:
        if shape[0] != tokens:
            raise ValueError(f"cos: {shape[0]} rows for {tokens} tokens (want as many, or positions)")
    elif positions.shape != (tokens,) or positions.dtype not in (torch.int32, torch.int64):
        found = f"{positions.dtype} {tuple(positions.shape)}"
        raise ValueError(f"positions: {found} (want int32 or int64 [{tokens}])")
    elif positions.device != q.device or not shape[0]:
        raise ValueError(f"positions: on {positions.device}, table of {shape[0]} rows (want {q.device}, at least one)")


def _check_heads(name: str, x: Tensor, q: Tensor, cos: Tensor) -> None:
    width = cos.shape[1]
    fits = (x.dim() == 3 and x.shape[2] == width) or (x.dim() == 2 and x.shape[1] % width == 0)
    if not fits or x.shape[0] != q.shape[0] or not x.shape[1]:
        raise ValueError(f"{name}: shape {tuple(x.shape)} (want [T, heads·{width}] or [T, heads, {width}])")
    if not x.is_floating_point() or x.dtype != q.dtype:
        raise ValueError(f"{name}: {x.dtype}, q {q.dtype} (want one floating-point dtype)")
    if x.device != q.device or cos.device != q.device:
        raise ValueError(f"{name}: on {x.device}, q on {q.device}, cos on {cos.device} (want one device)")
