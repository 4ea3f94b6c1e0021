"""The gated MLP with low-rank adapters on frozen weights, its hand-written backward, and its tiled form.

    e = gate(X)    g = up(X)    h = act(e)·g    y = down(h)          each of the three as in lora.py
    dh = dY·W_d + v_d·A_d   then in place   dh ← h,  g ← dg = dh·act(e),  e ← de = dh·g·act′(e)
    dX = de·W_g + dg·W_u + [v_g v_u]·[A_g; A_u]          dA, dB: down's from h, gate's from de, up's from dg

Saved are X, e and g; h is rebuilt by the in-place step, so that backward lives in three buffers of the MLP's width and
can run once only. With tiles > 1 X alone is saved: forward goes tile by tile and backward recomputes each tile before
it back-propagates it. That costs two GEMMs more, unless the forward pass is one of recomputation whose value nobody
reads (`skip_output`): then forward computes nothing at all. With NF4 weights each tile dequantises anew.

Left out: what lora.py leaves out; experts; a norm between the MLP and the residual sum where `skip_output` is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels.backend import Backend
from grpo.kernels.glu import Activation, glu_backward_, glu_forward
from grpo.kernels.lora import (
    LoRALinear,
    adapter_gradients,
    adapters,
    check_call,
    in_dtype_of,
    input_gradient,
    low_gradients,
    low_products,
    project,
)


@torch.compiler.disable
def lora_mlp(
    x: Tensor,
    gate: LoRALinear,
    up: LoRALinear,
    down: LoRALinear,
    activation: Activation,
    *,
    skip_output: bool = False,
    tiles: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    """down(act(gate(x))·up(x)): x [..., H] → [..., H], in x.dtype.

    Differentiable in x and the adapters; backward runs once: a second one raises RuntimeError.

    Args:
        x: any leading shape; its T = numel/H rows are what is tiled.
        gate, up, down: [H → I], [H → I], [I → H].
        activation: act, see `glu_forward`.
        skip_output: for a forward pass that is there for its backward alone and whose value is not read, as when a
            checkpointed layer is recomputed: the result is uninitialised, its gradients are exact.
        tiles: number of pieces of ⌈T/tiles⌉ rows (the last one shorter, or fewer pieces); memory of e, g, h is that
            of one piece.
        backend: of the elementwise step and of NF4, see `resolve_backend`.

    Raises:
        ValueError: one line: shapes, dtypes or devices that do not fit, or an autocast that would change the dtype.
    """
    check_call(x, gate)
    check_call(x, up)
    check_call(x.new_empty(0, gate.weight.shape[0]), down, "h")
    if up.weight.shape != gate.weight.shape:
        raise ValueError(f"up: weight {tuple(up.weight.shape)} (want {tuple(gate.weight.shape)}, as gate has)")
    if tiles < 1:
        raise ValueError(f"tiles: {tiles} (want 1 or more)")
    mlp = _MLP((gate, up), down, activation, backend, skip_output, tiles)
    function = _WholeMLP if tiles == 1 and torch.is_grad_enabled() else _TiledMLP  # without gradients, e is reused
    y = function.apply(x.reshape(-1, x.shape[-1]), mlp, *adapters((gate, up, down)))
    return y.view(*x.shape[:-1], y.shape[-1])


@dataclass(frozen=True)
class _MLP:
    inputs: tuple[LoRALinear, LoRALinear]  # gate, up
    down: LoRALinear
    activation: Activation
    backend: Backend
    skip_output: bool
    tiles: int

    @property
    def linears(self) -> tuple[LoRALinear, ...]:
        return (*self.inputs, self.down)

    def cast(self, dtype: torch.dtype) -> _MLP:
        """The same with its adapters in `dtype`, so that tiles do not convert them one after another."""
        gate, up, down = (_with(linear, *linear.cast(dtype)) for linear in self.linears)
        return replace(self, inputs=(gate, up), down=down)


def _with(linear: LoRALinear, a: Tensor | None, b: Tensor | None) -> LoRALinear:
    return replace(linear, a=a, b=b)


class _Gated(NamedTuple):
    low: list[Tensor] | None  # x·Aᵀ of gate and up [T, r], if at hand
    e: Tensor  # [T, I]
    g: Tensor  # [T, I]


class _WholeMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: _MLP, *tensors: Tensor | None) -> Tensor:
        gated = _gate(x, mlp)
        ctx.save_for_backward(x, gated.e, gated.g, *tensors)
        ctx.mlp, ctx.consumed = mlp, False
        y = x.new_empty(x.shape[0], mlp.down.weight.shape[0])
        if not mlp.skip_output:
            _down(gated, mlp, y, reuse=False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _consume(ctx)
        x, e, g = ctx.saved_tensors[:3]
        needs_x, _, *needs = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            found, v = _backward_rows(x, _Gated(None, e, g), dy.contiguous(), ctx.mlp, needs)
            dx = input_gradient([e, g], ctx.mlp.inputs, v, ctx.mlp.backend) if needs_x else None
        return dx, None, *_finished(ctx.mlp, found)


class _TiledMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: _MLP, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.mlp, ctx.consumed = mlp, False
        y = x.new_empty(x.shape[0], mlp.down.weight.shape[0])
        if not mlp.skip_output:
            cast = mlp.cast(x.dtype)
            for rows in _tiles(x.shape[0], mlp.tiles):
                _down(_gate(x[rows], cast), cast, y[rows], reuse=True)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _consume(ctx)
        x = ctx.saved_tensors[0]
        needs_x, _, *needs = ctx.needs_input_grad
        dx = x.new_empty(x.shape) if needs_x else None
        totals: list[Tensor | None] = [None] * len(needs)
        with torch.autocast(x.device.type, enabled=False):
            dy, cast = dy.contiguous(), ctx.mlp.cast(x.dtype)
            for rows in _tiles(x.shape[0], cast.tiles):
                found = _backward_tile(x[rows], dy[rows], cast, needs, None if dx is None else dx[rows])
                totals = [_sum(total, new) for total, new in zip(totals, found, strict=True)]
        return dx, None, *_finished(ctx.mlp, totals)


# The tile's e and g live in these functions' frames alone, so that they are gone before the next tile's are made.


def _gate(x: Tensor, mlp: _MLP) -> _Gated:
    low = low_products(x, mlp.inputs)
    e, g = (project(x, linear, part, mlp.backend) for linear, part in zip(mlp.inputs, low, strict=True))
    return _Gated(low, e, g)


def _down(gated: _Gated, mlp: _MLP, y: Tensor, reuse: bool) -> None:
    """Writes y; h goes into e's memory if that is free for `reuse`."""
    h = glu_forward(gated.e, gated.g, mlp.activation, out=gated.e if reuse else None, backend=mlp.backend)
    project(h, mlp.down, low_products(h, (mlp.down,))[0], mlp.backend, y)


def _backward_tile(x: Tensor, dy: Tensor, mlp: _MLP, needs: Sequence[bool], dx: Tensor | None) -> list[Tensor | None]:
    gated = _gate(x, mlp)
    found, v = _backward_rows(x, gated, dy, mlp, needs)
    if dx is not None:
        input_gradient([gated.e, gated.g], mlp.inputs, v, mlp.backend, dx)
    return found


def _backward_rows(
    x: Tensor, gated: _Gated, dy: Tensor, mlp: _MLP, needs: Sequence[bool]
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of the six adapter matrices, before they take the adapters' dtype, and v of gate and up.

    Leaves de in e and dg in g, for dX: the caller forms it when dh is gone.
    """
    low, e, g = gated
    pairs = list(zip(needs[::2], needs[1::2], strict=True))
    v = low_gradients([dy], [mlp.down])
    h = input_gradient([dy], [mlp.down], v, mlp.backend)  # dh, until the next line
    glu_backward_(h, e, g, mlp.activation, backend=mlp.backend)  # h ← h, g ← dg, e ← de
    of_down = adapter_gradients(h, [dy], [mlp.down], v, pairs[2:])
    del h
    v = low_gradients([e, g], mlp.inputs)
    of_inputs = adapter_gradients(x, [e, g], mlp.inputs, v, pairs[:2], low)
    return [gradient for pair in (*of_inputs, *of_down) for gradient in pair], v


def _finished(mlp: _MLP, found: Sequence[Tensor | None]) -> list[Tensor | None]:
    pairs = zip(mlp.linears, found[::2], found[1::2], strict=True)
    return [gradient for linear, da, db in pairs for gradient in in_dtype_of(linear, da, db)]


def _tiles(rows: int, tiles: int) -> Iterator[slice]:
    size = max(1, -(-rows // tiles))
    return (slice(start, start + size) for start in range(0, max(rows, 1), size))


def _sum(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    return new if total is None or new is None else total.add_(new)


def _consume(ctx: Any) -> None:
    # Tiled, it could run again; a saving is not to change what is allowed.
    if ctx.consumed:
        raise RuntimeError("lora_mlp: second backward (want one: the first has overwritten the saved e and g)")
    ctx.consumed = True
