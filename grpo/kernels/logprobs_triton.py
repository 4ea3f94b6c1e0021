"""The Triton twin of the three steps of token log-probs: one program per row (mathematics: logprobs.py).

Everything streams: a row of a tile is read once, E is taken against the maximum r that the tiles before left behind,
and the sums stay in registers until the row's end, so that nothing waits inside the loop. Only where that r proves too
small (the first tile, or a sum beyond LIMIT) is the row's maximum looked for and the row done again. 6 bytes move per
logit, 4 without a product to follow.

Left out: float64 (the torch twin has it), the GEMMs (cuBLAS is the faster kernel), writing E over the logits it came
from (it would save a third of the scratch memory, need a barrier per block, and leave nothing to do again).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.helpers_triton import expm1, log1p, tanh
from grpo.kernels.logprobs_tiles import Chunk, Coefficients, HeadCall, TokenLogprobs

BLOCK = 2048  # columns handled at once
NUM_WARPS = 4
WIDE_BLOCK = 1024  # the same for rows of [n, H]
LIMIT = tl.constexpr(32768.0)  # of Σ E in one tile: beyond it r has to rise
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _process(  # type: ignore[no-untyped-def]
    z, logit_scale, softcap, temperature, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr  # noqa: N803
):  # fmt: skip
    """h·W + b as (a, 1 − tanh²)."""
    slope = 1.0
    if HAS_SOFTCAP:
        bounded = tanh(z * (logit_scale / softcap))
        slope = 1 - bounded * bounded
        z = bounded * (softcap / temperature)
    elif HAS_SCALE:
        z *= logit_scale / temperature
    return z, slope


@triton.jit
def _load_logits(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    tile_row, bias_ptr, columns, width, logit_scale, softcap, temperature,
    FULL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One block of a row as (a, 1 − tanh²); a is −inf outside the tile."""
    inside = columns < width
    z = tl.load(tile_row + columns) if FULL else tl.load(tile_row + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    a, slope = _process(z, logit_scale, softcap, temperature, HAS_SCALE, HAS_SOFTCAP)
    return a if FULL else tl.where(inside, a, float("-inf")), slope


@triton.jit
def _local_target(targets_ptr, row, first, width):  # type: ignore[no-untyped-def]
    """The target's column in this tile, or −1."""
    target = tl.load(targets_ptr + row) - first
    return tl.where((target >= 0) & (target < width), target, -1).to(tl.int32)


@triton.jit
def _row_max(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    tile_row, bias_ptr, width, logit_scale, softcap, temperature,
    FULL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    # Finite: in a tile of banned tokens −inf − (−inf) would be NaN.
    best = tl.full([BLOCK], LOWEST, tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        a, _ = _load_logits(
            tile_row,
            bias_ptr,
            columns,
            width,
            logit_scale,
            softcap,
            temperature,
            FULL,
            HAS_BIAS,
            HAS_SCALE,
            HAS_SOFTCAP,
        )
        best = tl.maximum(best, a)
    return tl.max(best, 0)


@triton.jit
def _row_sums(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    tile_row, product_row, bias_ptr, peak, target, width, logit_scale, softcap, temperature,
    FULL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,  # noqa: N803
    WITH_ENTROPY: tl.constexpr, WITH_PRODUCT: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Σ E and Σ E·(a − r) of a row; stores j·E."""
    sums = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        a, slope = _load_logits(
            tile_row,
            bias_ptr,
            columns,
            width,
            logit_scale,
            softcap,
            temperature,
            FULL,
            HAS_BIAS,
            HAS_SCALE,
            HAS_SOFTCAP,
        )
        e = tl.where(columns == target, 0.0, tl.exp(a - peak))
        sums += e
        if WITH_ENTROPY:
            weighted += tl.where(e > 0, e * (a - peak), 0.0)
        if WITH_PRODUCT:
            product = (e * slope).to(product_row.dtype.element_ty)
            if FULL:
                tl.store(product_row + columns, product)
            else:
                tl.store(product_row + columns, product, mask=columns < width)
    return tl.sum(sums, 0), tl.sum(weighted, 0)


@triton.jit
def _rescale(row_ptr, size, factor, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    for start in range(0, size, WIDE):
        wide = start + tl.arange(0, WIDE)
        old = tl.load(row_ptr + wide, mask=wide < size, other=0.0)
        tl.store(row_ptr + wide, old * factor, mask=wide < size)


@triton.jit(do_not_specialize=["row_start"])
def _fold_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913 flags are compiled away
    tile_ptr, product_ptr, bias_ptr, targets_ptr, temperature_ptr, running_ptr, summed_ptr,
    row_start, first, width, tile_stride, running_stride, hidden_size, temperature, logit_scale, softcap,
    FIRST: tl.constexpr, FULL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,  # noqa: N803
    HAS_SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, WITH_ENTROPY: tl.constexpr,  # noqa: N803
    WITH_PRODUCT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    running = running_ptr + row
    before = tl.load(running)
    others = tl.load(running + running_stride)
    weighted = tl.load(running + 2 * running_stride)
    target = _local_target(targets_ptr, row_start + row, first, width)
    if ROW_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row_start + row)
    bias_ptr += first
    tile_row = tile_ptr + row * tile_stride
    product_row = product_ptr + row * tile_stride
    peak = before
    if FIRST:
        peak = _row_max(
            tile_row, bias_ptr, width, logit_scale, softcap, temperature,
            FULL, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, BLOCK,
        )  # fmt: skip
    target_logit = LOWEST * 1.0
    if target >= 0:
        z = tl.load(tile_row + target)
        if HAS_BIAS:
            z += tl.load(bias_ptr + target).to(tl.float32)
        target_logit, _ = _process(z, logit_scale, softcap, temperature, HAS_SCALE, HAS_SOFTCAP)
        tl.store(running + 3 * running_stride, target_logit)
    sums, weighted_sums = _row_sums(
        tile_row, product_row, bias_ptr, peak, target, width, logit_scale, softcap, temperature,
        FULL, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, WITH_ENTROPY, WITH_PRODUCT, BLOCK,
    )  # fmt: skip
    if not FIRST:  # noqa: SIM102 a run-time branch inside a compiled-away one
        if sums + tl.exp(target_logit - peak) > LIMIT:
            peak = _row_max(
                tile_row, bias_ptr, width, logit_scale, softcap, temperature,
                FULL, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, BLOCK,
            )  # fmt: skip
            sums, weighted_sums = _row_sums(
                tile_row, product_row, bias_ptr, peak, target, width, logit_scale, softcap, temperature,
                FULL, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, WITH_ENTROPY, WITH_PRODUCT, BLOCK,
            )  # fmt: skip
            shrink = tl.exp(before - peak)
            weighted = shrink * (weighted + (before - peak) * others)
            others *= shrink
            if WITH_PRODUCT:
                _rescale(summed_ptr + row * hidden_size, hidden_size, shrink, WIDE)
    tl.store(running, peak)
    tl.store(running + running_stride, others + sums)
    tl.store(running + 2 * running_stride, weighted + weighted_sums)


@triton.jit(do_not_specialize=["row_start"])
def _finish_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913 flags are compiled away
    running_ptr, targets_ptr, temperature_ptr, summed_ptr, chosen_ptr, logprobs_ptr, lse_ptr, entropy_ptr, u_ptr,
    row_start, vocabulary, running_stride, hidden_size, temperature, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, WITH_ENTROPY: tl.constexpr,  # noqa: N803
    WITH_U: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = row_start + row
    target = tl.load(targets_ptr + place)
    in_vocabulary = (target >= 0) & (target < vocabulary)
    peak = tl.load(running_ptr + row)
    others = tl.load(running_ptr + running_stride + row)
    target_logit = tl.load(running_ptr + 3 * running_stride + row)
    gap = target_logit - peak
    own = tl.exp(gap)
    total = others + own
    log_total = tl.log(total)
    logprob = tl.where(own >= others, -log1p(others / own), gap - log_total)
    tl.store(logprobs_ptr + place, tl.where(in_vocabulary, logprob, float("nan")))
    tl.store(lse_ptr + place, peak + log_total)
    if WITH_ENTROPY:
        weighted = tl.load(running_ptr + 2 * running_stride + row) + tl.where(own > 0, own * gap, 0.0)
        tl.store(entropy_ptr + place, log_total - weighted / total)
    if WITH_U:
        if ROW_TEMPERATURE:
            temperature = tl.load(temperature_ptr + place)
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
            tl.store(u_ptr + place * hidden_size + wide, u.to(u_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["row_start"])
def _gradient_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913 flags are compiled away
    tile_ptr, product_ptr, bias_ptr, targets_ptr, temperature_ptr, logprobs_ptr, lse_ptr, entropy_ptr, c_ptr, e_ptr,
    row_start, first, width, tile_stride, temperature, logit_scale, softcap,
    FULL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,  # noqa: N803
    ROW_TEMPERATURE: tl.constexpr, HAS_E: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = row_start + row
    target = _local_target(targets_ptr, place, first, width)
    if ROW_TEMPERATURE:
        temperature = tl.load(temperature_ptr + place)
    logprob = tl.load(logprobs_ptr + place)
    lse = tl.load(lse_ptr + place)
    scale = logit_scale / temperature
    c = tl.load(c_ptr + place) * scale
    c = tl.where(logprob != logprob, logprob, c)  # NaN: a target outside the vocabulary
    at_target = -c * expm1(logprob)  # c·(1 − p_y) without cancellation
    if HAS_E:
        e = tl.load(e_ptr + place) * scale
        entropy = tl.load(entropy_ptr + place)
        at_target -= e * tl.exp(logprob) * (logprob + entropy)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        a, slope = _load_logits(
            tile_ptr + row * tile_stride, bias_ptr + first, columns, width, logit_scale, softcap, temperature,
            FULL, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP,
        )  # fmt: skip
        p = tl.exp(a - lse)
        d = -p * c
        if HAS_E:
            d -= tl.where(p > 0, p * e * (a - lse + entropy), 0.0)
        d = tl.where(columns == target, at_target, d) * slope
        place_of_d = product_ptr + row * tile_stride + columns
        tl.store(place_of_d, d.to(product_ptr.dtype.element_ty), mask=columns < width)


# The launchers pass whole tensors and offsets rather than slices: with a tile every 0.1 ms, slicing would cost as much
# as launching. Tensors that a flag compiles away are never read; `running` or `lse` stands in for them.


def fold(tile: Tensor, product: Tensor | None, first: int, bias: Tensor | None, call: HeadCall, chunk: Chunk) -> None:
    """See `Steps.fold`."""
    height, width = tile.shape
    running = chunk.running
    summed = running if chunk.summed is None else chunk.summed
    block = _block(width)
    with _device_of(tile):
        _fold_kernel[(height,)](
            tile, tile if product is None else product, running if bias is None else bias, call.targets,
            _temperatures(call, running), running, summed,
            chunk.rows.start, first, width, tile.stride(0), running.stride(0), summed.shape[-1], *_scalars(call),
            first == 0, width % block == 0, bias is not None, *_flags(call), call.with_entropy, product is not None,
            block, WIDE_BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip


def finish(call: HeadCall, chunk: Chunk, out: TokenLogprobs, chosen: Tensor | None, u: Tensor | None) -> None:
    """See `Steps.finish`."""
    running = chunk.running
    summed = running if chunk.summed is None else chunk.summed
    _, softcap, row_temperature = _flags(call)
    with _device_of(running):
        _finish_kernel[(running.shape[1],)](
            running, call.targets, _temperatures(call, running), summed, running if chosen is None else chosen,
            out.logprobs, out.lse, running if out.entropy is None else out.entropy, running if u is None else u,
            chunk.rows.start, call.vocabulary, running.stride(0), summed.shape[-1], *_scalars(call),
            softcap, row_temperature, out.entropy is not None, u is not None, WIDE_BLOCK,
        )  # fmt: skip


def gradient(
    tile: Tensor,
    product: Tensor,
    first: int,
    bias: Tensor | None,
    call: HeadCall,
    chunk: Chunk,
    out: TokenLogprobs,
    given: Coefficients,
) -> None:
    """See `Steps.gradient`."""
    height, width = tile.shape
    lse = out.lse
    block = _block(width)
    with _device_of(tile):
        _gradient_kernel[(height,)](
            tile, product, lse if bias is None else bias, call.targets, _temperatures(call, lse),
            out.logprobs, lse, lse if out.entropy is None else out.entropy,
            given.logprobs, lse if given.entropy is None else given.entropy,
            chunk.rows.start, first, width, tile.stride(0), *_scalars(call),
            width % block == 0, bias is not None, *_flags(call), given.entropy is not None, block,
            num_warps=NUM_WARPS,
        )  # fmt: skip


def _temperatures(call: HeadCall, unused: Tensor) -> Tensor:
    return call.temperature if isinstance(call.temperature, Tensor) else unused


def _scalars(call: HeadCall) -> tuple[float, float, float]:
    number = 1.0 if isinstance(call.temperature, Tensor) else call.temperature
    return number, call.logit_scale, call.softcap or 1.0


def _flags(call: HeadCall) -> tuple[bool, bool, bool]:
    """HAS_SCALE, HAS_SOFTCAP, ROW_TEMPERATURE."""
    row_temperature = isinstance(call.temperature, Tensor)
    return row_temperature or call.logit_scale != call.temperature, call.softcap is not None, row_temperature


def _block(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(width))


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A launch goes to the current device; changing it costs nothing when it is the right one already."""
    if not tensor.is_cuda or torch.cuda.current_device() == tensor.device.index:
        return nullcontext()
    return torch.cuda.device(tensor.device)
