"""The Triton twin of the row step: one program per row of a float32 tile of raw logits (mathematics: logprobs.py).

Loop 1 reads the row once: running maximum, sums without the target, the target's logit. Loop 2 reads it again and
writes D over it. A 16-bit D lies in the same bytes at half the stride: block k writes bytes [2Bk, 2Bk + 2B) while the
row's block k occupies [4Bk, 4Bk + 4B), so a store never passes the loads of its own iteration, and one barrier between
a block's loads and its stores is enough. Bytes moved per logit: 4 without D, 10 with a 16-bit D.

Left out: float64 (the torch twin has it), the GEMMs (cuBLAS is the faster kernel).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.logprobs import Coefficients, HeadCall, TokenLogprobs

BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    # No libdevice: the interpreter lacks it. Series below 0.15, where (1 − t)/(1 + t) would lose digits.
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    t = tl.exp(-2 * tl.abs(x))
    size = (1 - t) / (1 + t)
    return tl.where(tl.abs(x) < 0.15, series, tl.where(x < 0, -size, size))


@triton.jit
def _log1p(x):  # type: ignore[no-untyped-def]
    # 2·atanh(x/(2 + x)) for small x ≥ 0: log(1 + x) would round 1 + x first.
    z = x / (2 + x)
    square = z * z
    series = 2 * z * (1 + square * (1 / 3 + square * (1 / 5 + square / 7)))
    return tl.where(x < 0.1, series, tl.log(1 + x))


@triton.jit
def _load_logits(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    tile_row, bias_ptr, columns, inside, logit_scale, softcap, inverse_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One block of a row as (a, 1 − tanh²); a is −inf outside the vocabulary."""
    z = tl.load(tile_row + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    z *= logit_scale
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        bounded = _tanh(z / softcap)
        slope = 1 - bounded * bounded
        z = bounded * softcap
    return tl.where(inside, z * inverse_temperature, float("-inf")), slope


@triton.jit
def _row_kernel(  # type: ignore[no-untyped-def]  # noqa: C901, PLR0913, PLR0915 flags are compiled away
    tile_ptr, d_ptr, bias_ptr, targets_ptr, temperature_ptr, c_ptr, e_ptr,  # read (d: written)
    logprobs_ptr, lse_ptr, entropy_ptr,  # written
    vocabulary, tile_stride, d_stride, temperature, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, WITH_ENTROPY: tl.constexpr,  # noqa: N803
    WITH_D: tl.constexpr, HAS_C: tl.constexpr, HAS_E: tl.constexpr, NARROW_D: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile_row = tile_ptr + row * tile_stride
    target = tl.load(targets_ptr + row)
    if ROW_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
    inverse_temperature = 1.0 / temperature

    peak = -3.4028234663852886e38  # finite: −inf − (−inf) would be NaN in a block of banned tokens
    others = 0.0  # Σ_{v≠y} e^(a_v − peak)
    weighted = 0.0  # Σ_{v≠y} e^(a_v − peak)·(a_v − peak)
    target_logit = 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        a, _ = _load_logits(
            tile_row, bias_ptr, columns, inside, logit_scale, softcap, inverse_temperature, HAS_BIAS, HAS_SOFTCAP
        )
        is_target = columns == target
        target_logit += tl.sum(tl.where(is_target & inside, a, 0.0), 0)
        higher = tl.maximum(peak, tl.max(a, 0))
        shrink = tl.exp(peak - higher)
        e = tl.where(is_target, 0.0, tl.exp(a - higher))
        if WITH_ENTROPY:
            weighted = shrink * (weighted + (peak - higher) * others)
            weighted += tl.sum(tl.where(e > 0, e * (a - higher), 0.0), 0)
        others = others * shrink + tl.sum(e, 0)
        peak = higher

    in_vocabulary = (target >= 0) & (target < vocabulary)
    gap = target_logit - peak
    own = tl.exp(gap)
    total = others + own
    log_total = tl.log(total)
    logprob = tl.where(gap == 0, -_log1p(others), gap - log_total)
    tl.store(logprobs_ptr + row, tl.where(in_vocabulary, logprob, float("nan")))
    tl.store(lse_ptr + row, peak + log_total)
    entropy = 0.0
    if WITH_ENTROPY:
        entropy = log_total - (weighted + tl.where(own > 0, own * gap, 0.0)) / total
        tl.store(entropy_ptr + row, entropy)

    if WITH_D:
        d_row = d_ptr + row * d_stride
        scale = logit_scale * inverse_temperature
        c = scale
        if HAS_C:
            c = scale * tl.load(c_ptr + row)
        c = tl.where(in_vocabulary, c, float("nan"))
        inverse_total = 1.0 / total
        at_target = c * others * inverse_total
        if HAS_E:
            factor = scale * tl.load(e_ptr + row)
            at_target -= factor * own * inverse_total * (logprob + entropy)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            a, slope = _load_logits(
                tile_row, bias_ptr, columns, inside, logit_scale, softcap, inverse_temperature, HAS_BIAS, HAS_SOFTCAP
            )
            p = tl.exp(a - peak) * inverse_total
            d = -p * c
            if HAS_E:
                d -= tl.where(p > 0, p * factor * (a - peak - log_total + entropy), 0.0)
            d = tl.where(columns == target, at_target, d) * slope
            if NARROW_D:
                tl.debug_barrier()
            tl.store(d_row + columns, d.to(d_ptr.dtype.element_ty), mask=inside)


def triton_row_step(
    tile: Tensor, bias: Tensor | None, call: HeadCall, rows: slice, out: TokenLogprobs, wanted: Coefficients | None
) -> Tensor | None:
    """The row step (see `RowStep`); D lies over the tile. float32 tiles [n, V] with unit column stride."""
    height, vocabulary = tile.shape
    d = _over(tile, call.operand_dtype)
    c = None if wanted is None else wanted.logprobs
    e = None if wanted is None else wanted.entropy
    temperature = call.temperature
    per_row = isinstance(temperature, Tensor)
    unused = out.lse  # any pointer: what a flag compiles away is never read
    with _device_of(tile):
        _row_kernel[(height,)](
            tile, d, unused if bias is None else bias, call.targets[rows],
            temperature[rows] if isinstance(temperature, Tensor) else unused,
            unused if c is None else c, unused if e is None else e,
            out.logprobs[rows], out.lse[rows], unused if out.entropy is None else out.entropy[rows],
            vocabulary, tile.stride(0), d.stride(0),
            1.0 if per_row else temperature, call.logit_scale, call.softcap or 1.0,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=call.softcap is not None, ROW_TEMPERATURE=per_row,
            WITH_ENTROPY=out.entropy is not None, WITH_D=wanted is not None, HAS_C=c is not None, HAS_E=e is not None,
            NARROW_D=d.dtype.itemsize < tile.dtype.itemsize, BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)),
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return None if wanted is None else d


def _over(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, V] of `dtype` in the tile's own memory, each row starting where the tile's row starts."""
    ratio = tile.dtype.itemsize // dtype.itemsize
    storage = torch.empty(0, dtype=dtype, device=tile.device).set_(tile.untyped_storage())
    return storage.as_strided(tile.shape, (tile.stride(0) * ratio, 1), tile.storage_offset() * ratio)


def _device_of(tile: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tile.device) if tile.is_cuda else nullcontext()
