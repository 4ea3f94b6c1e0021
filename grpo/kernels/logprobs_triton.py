"""The Triton twin of the three steps of token log-probs: one program per row (mathematics: logprobs.py).

A row of a tile is one block, held in registers between its only read and the store that overwrites it, so a step moves
6 bytes per logit (4 without a product to follow), all of it in L2. A 16-bit result lies in the same bytes as the
float32 row it came from, at half the stride: one barrier keeps a program's stores behind all of its loads.

Left out: float64 (the torch twin has it), the GEMMs (cuBLAS is the faster kernel).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.logprobs_tiles import Coefficients, HeadCall, Running, TokenLogprobs

WIDE_BLOCK = 1024  # columns of [n, H] sums handled at once
# r follows the running maximum only when that rises by more than this: E ≤ e^4, and sums are hardly ever rescaled.
SLACK = tl.constexpr(4.0)


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
def _expm1(x):  # type: ignore[no-untyped-def]
    # For x ≤ 0: series above −0.1, where exp(x) − 1 would cancel.
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720)))))
    return tl.where(x > -0.1, series, tl.exp(x) - 1)


@triton.jit
def _load_logits(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    tile_row, bias_ptr, columns, inside, logit_scale, softcap, inverse_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One row of a tile as (a, 1 − tanh²); a is −inf outside it."""
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
def _fold_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913 flags are compiled away
    tile_ptr, e_ptr, bias_ptr, targets_ptr, temperature_ptr, summed_ptr,
    peak_ptr, others_ptr, weighted_ptr, target_logit_ptr,
    first, width, tile_stride, e_stride, hidden_size, temperature, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, WITH_ENTROPY: tl.constexpr,  # noqa: N803
    WITH_E: tl.constexpr, RESCALE: tl.constexpr, NARROW_E: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile_row = tile_ptr + row * tile_stride
    target = tl.load(targets_ptr + row) - first
    if ROW_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    a, slope = _load_logits(
        tile_row, bias_ptr, columns, inside, logit_scale, softcap, 1.0 / temperature, HAS_BIAS, HAS_SOFTCAP
    )
    if (target >= 0) & (target < width):
        tl.store(target_logit_ptr + row, tl.sum(tl.where(columns == target, a, 0.0), 0))
    before = tl.load(peak_ptr + row)
    highest = tl.max(a, 0)
    peak = tl.where(highest > before + SLACK, highest, before)
    shrink = tl.exp(before - peak)
    e = tl.where(columns == target, 0.0, tl.exp(a - peak))
    others = tl.load(others_ptr + row)
    if WITH_ENTROPY:
        weighted = shrink * (tl.load(weighted_ptr + row) + (before - peak) * others)
        tl.store(weighted_ptr + row, weighted + tl.sum(tl.where(e > 0, e * (a - peak), 0.0), 0))
    tl.store(others_ptr + row, others * shrink + tl.sum(e, 0))
    tl.store(peak_ptr + row, peak)
    if WITH_E:
        if NARROW_E:
            tl.debug_barrier()
        tl.store(e_ptr + row * e_stride + columns, (e * slope).to(e_ptr.dtype.element_ty), mask=inside)
    if RESCALE:  # noqa: SIM102 a run-time branch inside a compiled-away one
        if peak > before:
            summed_row = summed_ptr + row * hidden_size
            for start in range(0, hidden_size, WIDE):
                wide = start + tl.arange(0, WIDE)
                old = tl.load(summed_row + wide, mask=wide < hidden_size, other=0.0)
                tl.store(summed_row + wide, old * shrink, mask=wide < hidden_size)


@triton.jit
def _finish_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913 flags are compiled away
    peak_ptr, others_ptr, weighted_ptr, target_logit_ptr, targets_ptr, temperature_ptr, summed_ptr, chosen_ptr,
    logprobs_ptr, lse_ptr, entropy_ptr, u_ptr,
    vocabulary, hidden_size, temperature, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, WITH_ENTROPY: tl.constexpr,  # noqa: N803
    WITH_U: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    in_vocabulary = (target >= 0) & (target < vocabulary)
    peak = tl.load(peak_ptr + row)
    others = tl.load(others_ptr + row)
    target_logit = tl.load(target_logit_ptr + row)
    gap = target_logit - peak
    own = tl.exp(gap)
    total = others + own
    log_total = tl.log(total)
    logprob = tl.where(own >= others, -_log1p(others / own), gap - log_total)
    tl.store(logprobs_ptr + row, tl.where(in_vocabulary, logprob, float("nan")))
    tl.store(lse_ptr + row, peak + log_total)
    if WITH_ENTROPY:
        weighted = tl.load(weighted_ptr + row) + tl.where(own > 0, own * gap, 0.0)
        tl.store(entropy_ptr + row, log_total - weighted / total)
    if WITH_U:
        if ROW_TEMPERATURE:
            temperature = tl.load(temperature_ptr + row)
        scale = logit_scale / temperature / total
        of_chosen = tl.where(in_vocabulary, others * scale, float("nan"))
        if HAS_SOFTCAP:
            bounded = target_logit * temperature / softcap
            of_chosen *= 1 - bounded * bounded
        for start in range(0, hidden_size, WIDE):
            wide = start + tl.arange(0, WIDE)
            inside = wide < hidden_size
            chosen = tl.load(chosen_ptr + row * hidden_size + wide, mask=inside, other=0.0).to(tl.float32)
            summed = tl.load(summed_ptr + row * hidden_size + wide, mask=inside, other=0.0)
            u = of_chosen * chosen - scale * summed
            tl.store(u_ptr + row * hidden_size + wide, u.to(u_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913 flags are compiled away
    tile_ptr, d_ptr, bias_ptr, targets_ptr, temperature_ptr, logprobs_ptr, lse_ptr, entropy_ptr, c_ptr, e_ptr,
    first, width, tile_stride, d_stride, temperature, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, HAS_E: tl.constexpr,  # noqa: N803
    NARROW_D: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row) - first
    if ROW_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    a, slope = _load_logits(
        tile_ptr + row * tile_stride, bias_ptr, columns, inside, logit_scale, softcap, 1.0 / temperature,
        HAS_BIAS, HAS_SOFTCAP,
    )  # fmt: skip
    scale = logit_scale / temperature
    logprob = tl.load(logprobs_ptr + row)
    log_p = a - tl.load(lse_ptr + row)
    p = tl.exp(log_p)
    c = tl.load(c_ptr + row) * scale
    c = tl.where(logprob != logprob, logprob, c)  # NaN: a target outside the vocabulary
    d = -p * c
    at_target = -c * _expm1(logprob)  # c·(1 − p_y) without cancellation
    if HAS_E:
        e = tl.load(e_ptr + row) * scale
        entropy = tl.load(entropy_ptr + row)
        d -= tl.where(p > 0, p * e * (log_p + entropy), 0.0)
        at_target -= e * tl.exp(logprob) * (logprob + entropy)
    d = tl.where(columns == target, at_target, d) * slope
    if NARROW_D:
        tl.debug_barrier()
    tl.store(d_ptr + row * d_stride + columns, d.to(d_ptr.dtype.element_ty), mask=inside)


def fold(
    tile: Tensor,
    first: int,
    bias: Tensor | None,
    call: HeadCall,
    rows: slice,
    running: Running,
    summed: Tensor | None,
) -> Tensor | None:
    """See `Steps.fold`; E lies over the tile."""
    e = over(tile, call.operand_dtype)
    unused = running.peak  # any pointer: what a flag compiles away is never read
    rescale = summed is not None and first > 0
    with _device_of(tile):
        _fold_kernel[(tile.shape[0],)](
            tile, e, unused if bias is None else bias[first:], call.targets[rows], _temperatures(call, rows, unused),
            unused if summed is None else summed,
            running.peak, running.others, running.weighted, running.target_logit,
            first, tile.shape[1], tile.stride(0), e.stride(0), 0 if summed is None else summed.shape[1],
            *_scalars(call),
            HAS_BIAS=bias is not None, **_flags(call), WITH_ENTROPY=call.with_entropy,
            WITH_E=summed is not None, RESCALE=rescale, NARROW_E=_narrow(e, tile), **_block(tile.shape[1]),
            WIDE=WIDE_BLOCK,
        )  # fmt: skip
    return None if summed is None else e


def finish(
    call: HeadCall,
    rows: slice,
    running: Running,
    out: TokenLogprobs,
    parts: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """See `Steps.finish`."""
    unused = running.peak
    summed, chosen, u = parts or (unused, unused, unused)
    with _device_of(running.peak):
        _finish_kernel[(running.peak.shape[0],)](
            running.peak, running.others, running.weighted, running.target_logit,
            call.targets[rows], _temperatures(call, rows, unused), summed, chosen,
            out.logprobs[rows], out.lse[rows], unused if out.entropy is None else out.entropy[rows], u,
            call.vocabulary, summed.shape[-1], *_scalars(call),
            **_flags(call), WITH_ENTROPY=out.entropy is not None, WITH_U=parts is not None, WIDE=WIDE_BLOCK,
        )  # fmt: skip


def gradient(
    tile: Tensor,
    first: int,
    bias: Tensor | None,
    call: HeadCall,
    rows: slice,
    out: TokenLogprobs,
    given: Coefficients,
) -> Tensor:
    """See `Steps.gradient`; D lies over the tile."""
    d = over(tile, call.operand_dtype)
    unused = out.lse
    with_entropy = given.entropy is not None and out.entropy is not None
    with _device_of(tile):
        _gradient_kernel[(tile.shape[0],)](
            tile, d, unused if bias is None else bias[first:], call.targets[rows], _temperatures(call, rows, unused),
            out.logprobs[rows], out.lse[rows], unused if out.entropy is None else out.entropy[rows],
            given.logprobs[rows], unused if given.entropy is None else given.entropy[rows],
            first, tile.shape[1], tile.stride(0), d.stride(0), *_scalars(call),
            HAS_BIAS=bias is not None, **_flags(call), HAS_E=with_entropy, NARROW_D=_narrow(d, tile),
            **_block(tile.shape[1]),
        )  # fmt: skip
    return d


def over(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, w] of `dtype` in the tile's own memory, each row starting where the tile's row starts."""
    ratio = tile.dtype.itemsize // dtype.itemsize
    storage = torch.empty(0, dtype=dtype, device=tile.device).set_(tile.untyped_storage())
    return storage.as_strided(tile.shape, (tile.stride(0) * ratio, 1), tile.storage_offset() * ratio)


def _narrow(result: Tensor, tile: Tensor) -> bool:
    return result.dtype.itemsize < tile.dtype.itemsize


def _temperatures(call: HeadCall, rows: slice, unused: Tensor) -> Tensor:
    return call.temperature[rows] if isinstance(call.temperature, Tensor) else unused


def _scalars(call: HeadCall) -> tuple[float, float, float]:
    number = 1.0 if isinstance(call.temperature, Tensor) else call.temperature
    return number, call.logit_scale, call.softcap or 1.0


def _flags(call: HeadCall) -> dict[str, bool]:
    return {"HAS_SOFTCAP": call.softcap is not None, "ROW_TEMPERATURE": isinstance(call.temperature, Tensor)}


def _block(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": 8 if block > 2048 else 4}


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
