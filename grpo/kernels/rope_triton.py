"""The Triton twin of rotary position embedding (mathematics: rope.py): one launch over tokens × tiles of heads.

The joint head axis is cut into tiles of queries, then tiles of keys, so that no tile mixes two tensors and every access
stays a run of D/2 elements. q and k are read where they lie, at any stride of tokens and heads.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.rope import Angles
from grpo.kernels.rows import device_of, needs_long

TILE = 1024  # pairs of one program at most
NUM_WARPS = 4


@triton.jit
def _rotate_tile(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    in_ptr, out_ptr, token, first, in_stride, in_head, out_stride, out_head, cos, sin,
    HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    head = first + tl.arange(0, TILE_HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS) & (pair < HALF)
    source = in_ptr + token * in_stride + head * in_head + pair
    x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    target = out_ptr + token * out_stride + head * out_head + pair
    tl.store(target, y1.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(target + HALF, y2.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rope_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr, num_positions,
    q_stride, q_head, k_stride, k_head, cos_stride, sin_stride,
    HAS_POSITIONS: tl.constexpr, INVERSE: tl.constexpr, IN_PLACE: tl.constexpr, LONG: tl.constexpr,  # noqa: N803
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    q_tiles: tl.constexpr = (Q_HEADS + Q_TILE - 1) // Q_TILE
    k_tiles: tl.constexpr = (K_HEADS + K_TILE - 1) // K_TILE
    program = tl.program_id(0)
    token = program // (q_tiles + k_tiles)
    tile = program % (q_tiles + k_tiles)
    if LONG:
        token = token.to(tl.int64)
    pair = tl.arange(0, BLOCK)[None, :]
    position = token
    known = pair < HALF
    if HAS_POSITIONS:
        position = tl.load(positions_ptr + token)
        if LONG:
            position = position.to(tl.int64)
        valid = (position >= 0) & (position < num_positions)
        position = tl.where(valid, position, 0)
    cos = tl.load(cos_ptr + position * cos_stride + pair, mask=known, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * sin_stride + pair, mask=known, other=0.0).to(tl.float32)
    if HAS_POSITIONS:
        cos = tl.where(valid, cos, float("nan"))
    if INVERSE:
        sin = -sin
    if tile < q_tiles:
        _rotate_tile(
            q_ptr, q_out_ptr, token, tile * Q_TILE, q_stride, q_head,
            q_stride if IN_PLACE else Q_HEADS * 2 * HALF, q_head if IN_PLACE else 2 * HALF, cos, sin,
            Q_HEADS, Q_TILE, HALF, BLOCK,
        )  # fmt: skip
    else:
        _rotate_tile(
            k_ptr, k_out_ptr, token, (tile - q_tiles) * K_TILE, k_stride, k_head,
            k_stride if IN_PLACE else K_HEADS * 2 * HALF, k_head if IN_PLACE else 2 * HALF, cos, sin,
            K_HEADS, K_TILE, HALF, BLOCK,
        )  # fmt: skip


def rotate(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, angles: Angles, inverse: bool) -> None:
    """See `RopeTwin`; outputs are the inputs or contiguous."""
    cos, sin, positions = angles.cos, angles.sin, angles.positions
    if cos.stride(1) != 1 or sin.stride(1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    if positions is not None:
        positions = positions.contiguous()
    tokens, q_heads, width = q.shape
    k_heads = k.shape[1]
    half = width // 2
    q_tile, k_tile, block, tiles = _tiles(q_heads, k_heads, half)
    written = tokens * max(q_heads, k_heads) * width
    long = needs_long(max(_extent(q), _extent(k), written, cos.shape[0] * cos.stride(0)))
    with device_of(q):
        _rope_kernel[(tokens * tiles,)](
            q, k, q_out, k_out, cos, sin, cos if positions is None else positions, cos.shape[0],
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0), sin.stride(0),
            positions is not None, inverse, q_out is q, long, q_heads, k_heads, q_tile, k_tile, half, block,
            num_warps=NUM_WARPS,
        )  # fmt: skip


def _extent(x: Tensor) -> int:
    return x.shape[0] * x.stride(0) + x.shape[1] * x.stride(1)


@functools.cache
def _tiles(q_heads: int, k_heads: int, half: int) -> tuple[int, int, int, int]:
    """Heads of a tile of queries and of keys, pairs of a head rounded up, and tiles of a token."""
    block = triton.next_power_of_2(half)
    at_most = max(1, TILE // block)
    q_tile, k_tile = (min(at_most, triton.next_power_of_2(heads)) for heads in (q_heads, k_heads))
    return q_tile, k_tile, block, -(-q_heads // q_tile) - (-k_heads // k_tile)
