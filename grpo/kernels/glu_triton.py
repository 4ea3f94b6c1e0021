"""The Triton twin of gated linear units (mathematics: glu.py): each element read once and written once.

Contiguous tensors are one flat run of elements; else a program takes a piece of one row.

Left out: libdevice, which the interpreter lacks; erf is an operation of Triton's own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.glu import Activation, GluOutputs
from grpo.kernels.rows import are_long, as_rows, device_of, needs_long, view_rows

BLOCK = 1024  # one 16-byte access a thread and tensor for 16-bit elements
NUM_WARPS = 4


@triton.jit
def _act_and_slope(e, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    if ACTIVATION == "silu":
        sigma = tl.sigmoid(e)
        act = e * sigma
        slope = sigma * (1 + e * (1 - sigma))
    elif ACTIVATION == "gelu":
        phi = 0.5 * (1 + tl.math.erf(e * 0.7071067811865476))
        act = e * phi
        slope = phi + e * tl.exp(-0.5 * e * e) * 0.3989422804014327
    else:
        square = e * e
        s = tl.sigmoid(2 * 0.7978845608028654 * e * (1 + 0.044715 * square))
        act = e * s
        slope = s + act * (1 - s) * (2 * 0.7978845608028654) * (1 + 3 * 0.044715 * square)
    return act, slope


@triton.jit
def _place(columns, FLAT: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """This program's row and its columns there."""
    program = tl.program_id(0)
    row = program * 0
    if not FLAT:
        pieces = tl.cdiv(columns, BLOCK)
        row = program // pieces
        program = program % pieces
    if LONG:
        row = row.to(tl.int64)
        program = program.to(tl.int64)
    return row, program * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    e_ptr, g_ptr, out_ptr, columns, e_stride, g_stride, out_stride,
    ACTIVATION: tl.constexpr, FLAT: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row, column = _place(columns, FLAT, LONG, BLOCK)
    inside = column < columns
    e = tl.load(e_ptr + row * e_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * g_stride + column, mask=inside, other=0.0).to(tl.float32)
    act, _ = _act_and_slope(e, ACTIVATION)
    tl.store(out_ptr + row * out_stride + column, (act * g).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    dh_ptr, e_ptr, g_ptr, h_ptr, dg_ptr, de_ptr,
    columns, dh_stride, e_stride, g_stride, h_stride, dg_stride, de_stride,
    ACTIVATION: tl.constexpr, WITH_H: tl.constexpr, FLAT: tl.constexpr, LONG: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    # Every element is read and written by one thread alone, all three reads before the first write: the outputs may
    # be the inputs.
    row, column = _place(columns, FLAT, LONG, BLOCK)
    inside = column < columns
    dh = tl.load(dh_ptr + row * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
    e = tl.load(e_ptr + row * e_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * g_stride + column, mask=inside, other=0.0).to(tl.float32)
    act, slope = _act_and_slope(e, ACTIVATION)
    tl.store(dg_ptr + row * dg_stride + column, (dh * act).to(dg_ptr.dtype.element_ty), mask=inside)
    tl.store(de_ptr + row * de_stride + column, (dh * g * slope).to(de_ptr.dtype.element_ty), mask=inside)
    if WITH_H:
        tl.store(h_ptr + row * h_stride + column, (act * g).to(h_ptr.dtype.element_ty), mask=inside)


def forward(e: Tensor, g: Tensor, activation: Activation, out: Tensor) -> None:
    """See `GluTwin`."""
    flat = e.is_contiguous() and g.is_contiguous() and out.is_contiguous()
    if flat:
        columns, programs, strides = _flat(e)
        long = needs_long(columns)
    else:
        e, g, out = as_rows(e), as_rows(g), view_rows(out, "out")
        columns, programs, strides = _in_rows(e, g, out)
        long = are_long(e, g, out)
    with device_of(e):
        _forward_kernel[(programs,)](
            e, g, out, columns, *strides[:3], activation, flat, long, BLOCK, num_warps=NUM_WARPS
        )  # fmt: skip


def backward(dh: Tensor, e: Tensor, g: Tensor, activation: Activation, out: GluOutputs) -> None:
    """See `GluTwin`."""
    h, dg, de = out
    with_h = h is not None
    if h is None:
        h = dg
    flat = all(x.is_contiguous() for x in (dh, e, g, h, dg, de))
    if flat:
        columns, programs, strides = _flat(e)
        long = needs_long(columns)
    else:
        h, dg, de = view_rows(h, "dh"), view_rows(dg, "g"), view_rows(de, "e")
        dh, e, g = as_rows(dh), as_rows(e), as_rows(g)
        columns, programs, strides = _in_rows(dh, e, g, h, dg, de)
        long = are_long(dh, e, g, h, dg, de)
    with device_of(e):
        _backward_kernel[(programs,)](
            dh, e, g, h, dg, de, columns, *strides, activation, with_h, flat, long, BLOCK, num_warps=NUM_WARPS
        )  # fmt: skip


def _flat(e: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Columns, programs and (unused) strides of one flat run."""
    columns = e.numel()
    return columns, -(-columns // BLOCK), (0, 0, 0, 0, 0, 0)


def _in_rows(*rows: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """The same of [R, H]."""
    height, columns = rows[0].shape
    return columns, height * -(-columns // BLOCK), tuple(x.stride(0) for x in rows)
