"""The Triton twin of the root mean square norm (mathematics: rmsnorm.py): x is read once, a whole row in registers.

A program takes a tile of [ROWS, BLOCK] elements, BLOCK ≥ H, so that small H moves as many bytes at once as large H.
With dw the grid is a few programs an SM, each walking over its own run of rows with Σ dY·x̂ in registers; the partial
sums [programs, H] are added in a fixed order, without atomics.

Left out: rows longer than MAX_BLOCK (they would need two passes).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.rmsnorm import NormCall
from grpo.kernels.rows import are_long, device_of

MAX_BLOCK = 65_536
TILE = 2048  # elements of a tile where H is smaller than this
PROGRAMS_PER_SM = 4  # of the kernel that sums dw
CPU_PROGRAMS = 3  # the same in the interpreter


@triton.jit
def _tile(first, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Row numbers [ROWS, 1], column numbers [1, BLOCK], and which of the tile exist."""
    if LONG:
        first = first.to(tl.int64)
    row = first + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    x_ptr, weight_ptr, y_ptr, rho_ptr, rows, columns, x_stride, eps, offset,
    HAS_WEIGHT: tl.constexpr, LATE_CAST: tl.constexpr, LONG: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row, column, inside = _tile(tl.program_id(0) * ROWS, rows, columns, ROWS, BLOCK, LONG)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    rho = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / columns + eps)
    tl.store(rho_ptr + row, rho, mask=row < rows)
    y = x * rho
    if HAS_WEIGHT:
        factor = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        if LATE_CAST:
            factor += offset
        else:
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        y *= factor
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    dy_ptr, x_ptr, weight_ptr, rho_ptr, dx_ptr, partial_ptr, rows, columns, dy_stride, x_stride, tiles, offset,
    HAS_WEIGHT: tl.constexpr, LATE_CAST: tl.constexpr, WITH_DW: tl.constexpr, LONG: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]
    if HAS_WEIGHT:
        factor = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        if LATE_CAST:
            factor += offset
    if WITH_DW:
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for turn in range(tiles):
        row, column, inside = _tile((program * tiles + turn) * ROWS, rows, columns, ROWS, BLOCK, LONG)
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        rho = tl.load(rho_ptr + row, mask=row < rows, other=0.0)
        normed = x * rho
        q = dy
        if HAS_WEIGHT:
            q = dy * factor
        mean = tl.sum(q * normed, axis=1, keep_dims=True) / columns
        dx = rho * (q - normed * mean)
        tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if WITH_DW:
            if not LATE_CAST:
                normed = normed.to(x_ptr.dtype.element_ty).to(tl.float32)
            sums += dy * normed
    if WITH_DW:
        partial = tl.sum(sums, axis=0, keep_dims=True)
        tl.store(partial_ptr + program * columns + column, partial, mask=column < columns)


def forward(x: Tensor, weight: Tensor | None, call: NormCall, y: Tensor, rho: Tensor) -> None:
    """See `RmsNormTwin`."""
    rows, columns = x.shape
    block, height, warps = _blocks(columns)
    with device_of(x):
        _forward_kernel[(-(-rows // height),)](
            x, rho if weight is None else weight, y, rho, rows, columns, x.stride(0), call.eps, call.offset,
            weight is not None, call.late_cast, are_long(x, y), height, block, num_warps=warps,
        )  # fmt: skip


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rho: Tensor, call: NormCall, dx: Tensor, with_dw: bool
) -> Tensor | None:
    """See `RmsNormTwin`."""
    rows, columns = x.shape
    block, height, warps = _blocks(columns)
    programs, tiles, partial = -(-rows // height), 1, rho
    if with_dw:
        tiles = -(-programs // _programs(x.device))
        programs = -(-programs // tiles)
        partial = torch.empty(programs, columns, dtype=rho.dtype, device=x.device)
        warps = min(32, 2 * warps)  # else the sums take 120 registers a thread, and few threads fit an SM
    with device_of(x):
        _backward_kernel[(programs,)](
            dy, x, rho if weight is None else weight, rho, dx, partial,
            rows, columns, dy.stride(0), x.stride(0), tiles, call.offset,
            weight is not None, call.late_cast, with_dw, are_long(dy, x, dx), height, block, num_warps=warps,
        )  # fmt: skip
    return partial.sum(0) if with_dw else None


@functools.cache
def _blocks(columns: int) -> tuple[int, int, int]:
    """BLOCK, ROWS and warps for rows of this length.

    Raises:
        ValueError: a row does not fit into one block.
    """
    if columns > MAX_BLOCK:
        raise ValueError(f"x: rows of {columns} (Triton takes at most {MAX_BLOCK}; want backend torch)")
    block = triton.next_power_of_2(columns)
    height = max(1, TILE // block)
    return block, height, min(32, max(4, block * height // 512))


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_PROGRAMS
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
