"""Frozen linear layers with low-rank adapters, and their hand-written backward.

    y = x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ
    with v = s·dY·B [T, r]:    dA = vᵀ·x    dB = s·dYᵀ·(x·Aᵀ)    dX = dY·W + v·A

Source: Hu et al., LoRA (arXiv 2106.09685), equation 3; W and bias are frozen, so no out × in gradient exists. What is
won over autograd is memory passes: x is saved once for all projections that read it and nothing r wide is, the r-wide
products of such projections are one product, and the GEMM of W adds onto the r-wide part in its epilogue, in forward
as in backward, instead of in a pass of its own. NF4 weights are dequantised where they are used, one at a time.

Products are cuBLAS's in x.dtype; dA and dB are formed in float32 (float64 from float64) before they take the adapter's
dtype. The MLP, which shares the pieces of this file, is lora_mlp.py.

Left out: adapter dropout, adapter bias, DoRA, trainable W or bias, autocast, double backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from grpo.kernels.backend import Backend
from grpo.kernels.nf4 import SCRATCH, NF4Weight, dequantize


@dataclass(frozen=True)
class AdapterCopies:
    """An adapter in the dtype of x, made beforehand by a caller who knows that it has not changed since.

    `a` [r, in] is a slice of `group` [Σ r, in], the a of all linears that are applied to one x, in their order.
    """

    a: Tensor
    b: Tensor
    group: Tensor


@dataclass(frozen=True)
class LoRALinear:
    """A frozen linear layer [in → out] and its adapter, if it has one that is on.

    `weight` [out, in] and `bias` [out] in the dtype of x; `a` [r, in] and `b` [out, r] in any float dtype, both None
    for no adapter; `scale` is alpha/r, alpha/√r, or what the adapter's method says. `copies` spares
    the casts of a and b.

    Raises:
        ValueError: one line: shapes that do not fit, one of a and b alone, a weight or bias that requires grad.
    """

    weight: Tensor | NF4Weight
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    copies: AdapterCopies | None = None

    def __post_init__(self) -> None:
        out, into = self.weight.shape
        if isinstance(self.weight, Tensor) and self.weight.requires_grad:
            raise ValueError("weight: requires grad (want a frozen weight)")
        if self.bias is not None and (self.bias.requires_grad or self.bias.shape != (out,)):
            raise ValueError(f"bias: shape {tuple(self.bias.shape)} (want a frozen [{out}])")
        if (self.a is None) != (self.b is None):
            raise ValueError(f"{'a' if self.a is None else 'b'}: None (want both of a and b, or neither)")
        if self.a is not None and self.b is not None:
            if self.a.dim() != 2 or self.a.shape[1] != into:
                raise ValueError(f"a: shape {tuple(self.a.shape)} (want [r, {into}])")
            if self.b.shape != (out, self.a.shape[0]):
                raise ValueError(f"b: shape {tuple(self.b.shape)} (want [{out}, {self.a.shape[0]}])")

    @property
    def rank(self) -> int:
        """Of the adapter; 0 without one."""
        return 0 if self.a is None else self.a.shape[0]

    def cast(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """(a, b) in `dtype`."""
        if self.a is None or self.b is None:
            return None, None
        if self.copies is not None and self.copies.b.dtype == dtype:
            return self.copies.a, self.copies.b
        return self.a.to(dtype), self.b.to(dtype)


@torch.compiler.disable
def lora_linear(x: Tensor, linear: LoRALinear) -> Tensor:
    """y = x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ: x [..., in] → [..., out], in x.dtype. Saves x and the adapter.

    Differentiable in x, a and b; dA and dB come in the adapter's dtype.

    Raises:
        ValueError: one line: shape, dtype or device that does not fit, or an autocast that would change the dtype.
    """
    return _project(x, (linear,))[0]


@torch.compiler.disable
def lora_qkv(x: Tensor, q: LoRALinear, k: LoRALinear, v: LoRALinear) -> tuple[Tensor, Tensor, Tensor]:
    """Three `lora_linear` of one x [..., in]. Saves x once; dX is summed in one buffer.

    An output without a use costs nothing in backward.

    Raises:
        ValueError: as `lora_linear`.
    """
    yq, yk, yv = _project(x, (q, k, v))
    return yq, yk, yv


def _project(x: Tensor, linears: Sequence[LoRALinear]) -> list[Tensor]:
    for linear in linears:
        check_call(x, linear)
    outputs = _Projections.apply(x.reshape(-1, x.shape[-1]), tuple(linears), *adapters(linears))
    # A matrix comes back as it is: a caller may then write over it, which a view of a shared node forbids.
    return list(outputs) if x.dim() == 2 else [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linears: tuple[LoRALinear, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *tensors)  # the adapters too, so that changing one before backward is noticed
        ctx.linears = linears
        return tuple(
            project(x, linear, low, "auto") for linear, low in zip(linears, low_products(x, linears), strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0]
        needs_x, _, *needs = ctx.needs_input_grad
        used = [i for i, dy in enumerate(dys) if dy is not None]
        linears = [ctx.linears[i] for i in used]
        gradients: list[Tensor | None] = [None] * len(needs)
        with torch.autocast(x.device.type, enabled=False):
            dy = [dys[i].contiguous() for i in used]  # type: ignore[union-attr]
            v = low_gradients(dy, linears)
            dx = input_gradient(dy, linears, v, "auto") if needs_x and used else None
            pairs = [(needs[2 * i], needs[2 * i + 1]) for i in used]
            found = adapter_gradients(x, dy, linears, v, pairs)
        for i, linear, (da, db) in zip(used, linears, found, strict=True):
            gradients[2 * i : 2 * i + 2] = in_dtype_of(linear, da, db)
        return dx, None, *gradients


# --- the pieces, without autograd: x [T, in], dY [T, out] ------------------------------------------------------------


def adapters(linears: Sequence[LoRALinear]) -> list[Tensor | None]:
    """a and b of each, in turn."""
    return [tensor for linear in linears for tensor in (linear.a, linear.b)]


def low_products(x: Tensor, linears: Sequence[LoRALinear]) -> list[Tensor]:
    """x·Aᵀ of each, [T, r] (r = 0 without an adapter): slices of one product."""
    ranks = [linear.rank for linear in linears]
    a = _stacked_a(linears, x.dtype)
    low = x.new_empty(x.shape[0], 0) if a is None else x @ a.t()
    return list(low.split(ranks, 1))


def project(x: Tensor, linear: LoRALinear, low: Tensor, backend: Backend, out: Tensor | None = None) -> Tensor:
    """y [T, out] from x and low = x·Aᵀ, written into `out` if given."""
    _, b = linear.cast(x.dtype)
    if b is None and out is None:
        return F.linear(x, dense(linear.weight, backend), linear.bias)
    y = x.new_empty(x.shape[0], linear.weight.shape[0]) if out is None else out
    if b is None:
        return _write(y, linear.bias, x, dense(linear.weight, backend), 1.0)
    _write(y, linear.bias, low, b, linear.scale)  # not added: W's GEMM reads it in its epilogue
    return y.addmm_(x, dense(linear.weight, backend).t())


def _write(y: Tensor, bias: Tensor | None, x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """y ← bias + scale·x·Wᵀ, whatever y held."""
    if bias is None:
        return y.addmm_(x, weight.t(), beta=0, alpha=scale)
    return torch.addmm(bias, x, weight.t(), alpha=scale, out=y)


def low_gradients(dys: Sequence[Tensor], linears: Sequence[LoRALinear]) -> Tensor:
    """v = s·dY·B of all, side by side: [T, Σ r]."""
    if not dys:
        return torch.empty(0, 0)
    ranks = [linear.rank for linear in linears]
    v = dys[0].new_empty(dys[0].shape[0], sum(ranks))
    for dy, linear, part in zip(dys, linears, v.split(ranks, 1), strict=True):
        _, b = linear.cast(dy.dtype)
        if b is not None:
            part.addmm_(dy, b, beta=0, alpha=linear.scale)
    return v


def input_gradient(
    dys: Sequence[Tensor], linears: Sequence[LoRALinear], v: Tensor, backend: Backend, out: Tensor | None = None
) -> Tensor:
    """dX = Σ dY·W + v·A [T, in], all terms into one buffer (`out` if given)."""
    dx = dys[0].new_empty(dys[0].shape[0], linears[0].weight.shape[1]) if out is None else out
    a = _stacked_a(linears, dx.dtype)
    if a is not None:
        torch.mm(v, a, out=dx)
    for i, (dy, linear) in enumerate(zip(dys, linears, strict=True)):
        dx.addmm_(dy, dense(linear.weight, backend), beta=0 if i == 0 and a is None else 1)
    return dx


def adapter_gradients(
    x: Tensor,
    dys: Sequence[Tensor],
    linears: Sequence[LoRALinear],
    v: Tensor,
    needs: Sequence[tuple[bool, bool]],
    low: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor | None, Tensor | None]]:
    """(dA [r, in], dB [out, r]) of each in float32 (float64 from float64), None where `needs` says so.

    `low` is what `low_products` gave, if still at hand.
    """
    ranks = [linear.rank for linear in linears]
    das: Sequence[Tensor | None] = [None] * len(linears)
    if any(need_a for need_a, _ in needs):
        das = _product(v.t(), x).split(ranks, 0)
    if low is None and any(need_b for _, need_b in needs):
        low = low_products(x, linears)
    found: list[tuple[Tensor | None, Tensor | None]] = []
    for i, (linear, (need_a, need_b)) in enumerate(zip(linears, needs, strict=True)):
        db = _product(dys[i].t(), low[i]).mul_(linear.scale) if need_b and low is not None else None
        found.append((das[i] if need_a else None, db))
    return found


def in_dtype_of(linear: LoRALinear, da: Tensor | None, db: Tensor | None) -> list[Tensor | None]:
    """[dA, dB] in the dtype of the adapter."""
    pairs = ((da, linear.a), (db, linear.b))
    return [None if found is None or like is None else found.to(like.dtype) for found, like in pairs]


def dense(weight: Tensor | NF4Weight, backend: Backend) -> Tensor:
    """[out, in]; an NF4 weight in the shared scratch, where the next one on this stream overwrites it."""
    if isinstance(weight, Tensor):
        return weight
    return dequantize(weight, out=SCRATCH.view(weight.shape, weight.dtype, weight.device), backend=backend)


def check_call(x: Tensor, linear: LoRALinear, name: str = "x") -> None:
    """Whether `linear` can be applied to a tensor like x; raises ValueError with one line if not."""
    weight, kind = linear.weight, x.device.type
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name}: shape {tuple(x.shape)} (want [..., {weight.shape[1]}])")
    for what, tensor in (("weight", weight), ("bias", linear.bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise ValueError(f"{what}: {tensor.dtype} on {tensor.device}, {name} {x.dtype} on {x.device} (want one)")
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype != torch.float64:
        raise ValueError(f"{name}: {x.dtype} under autocast to {torch.get_autocast_dtype(kind)} (want no autocast)")
    for what, tensor in (("a", linear.a), ("b", linear.b)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{what}: on {tensor.device}, {name} on {x.device} (want one device)")


def _stacked_a(linears: Sequence[LoRALinear], dtype: torch.dtype) -> Tensor | None:
    used = [linear for linear in linears if linear.a is not None]
    group = used[0].copies.group if used and used[0].copies is not None else None
    if (
        group is not None
        and group.dtype == dtype
        and group.shape[0] == sum(linear.rank for linear in used)
        and all(linear.copies is not None and linear.copies.group is group for linear in used)
    ):
        return group
    parts = [a for a, _ in (linear.cast(dtype) for linear in used) if a is not None]
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left·right in float32 (float64 from float64), never rounded to the operands' dtype."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
