"""The torch twin of the three steps of token log-probs (mathematics: logprobs.py): any device, float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.kernels.logprobs_tiles import OTHERS, PEAK, TARGET, WEIGHTED, Chunk, Coefficients, HeadCall, TokenLogprobs


def fold(tile: Tensor, product: Tensor | None, first: int, bias: Tensor | None, call: HeadCall, chunk: Chunk) -> None:
    """See `Steps.fold`."""
    slope = _process(tile, first, bias, call, chunk.rows, with_slope=product is not None)
    column, here = _target_column(tile, first, call, chunk.rows)
    before, others, weighted, target_logit = chunk.running
    target_logit.copy_(torch.where(here, tile.gather(1, column), target_logit[:, None])[:, 0])
    peak = torch.maximum(before, tile.amax(1))
    shrink = torch.exp(before - peak)
    e = tile.sub_(peak[:, None]).exp()
    e.scatter_(1, column, e.gather(1, column).masked_fill(here, 0.0))
    if call.with_entropy:
        # Clamped: 0·(−inf) of a banned token counts as 0.
        here_weighted = (e * tile.clamp_(min=torch.finfo(tile.dtype).min)).sum(1)
        weighted.add_((before - peak) * others).mul_(shrink).add_(here_weighted)
    others.mul_(shrink).add_(e.sum(1))
    before.copy_(peak)
    if product is not None and chunk.summed is not None:
        if first > 0:
            chunk.summed.mul_(shrink[:, None])
        product.copy_(e if slope is None else e.mul_(slope))


def finish(call: HeadCall, chunk: Chunk, out: TokenLogprobs, chosen: Tensor | None, u: Tensor | None) -> None:
    """See `Steps.finish`."""
    peak, others = chunk.running[PEAK], chunk.running[OTHERS]
    gap = chunk.running[TARGET] - peak
    own = gap.exp()
    total = others + own
    log_total = total.log()
    logprobs = torch.where(own >= others, -torch.log1p(others / own), gap - log_total)
    targets = call.targets[chunk.rows]
    inside = (targets >= 0) & (targets < call.vocabulary)
    out.logprobs[chunk.rows] = logprobs.where(inside, torch.nan)
    out.lse[chunk.rows] = peak + log_total
    if out.entropy is not None:
        weighted = chunk.running[WEIGHTED] + torch.where(own > 0, own * gap, 0.0)
        out.entropy[chunk.rows] = log_total - weighted / total
    if u is not None and chosen is not None and chunk.summed is not None:
        of_chosen = (_slope_at_target(call, chunk) * others / total).where(inside, torch.nan)
        scale = call.logit_scale / call.temperature_of(chunk.rows)
        u[chunk.rows] = ((of_chosen[:, None] * chosen - chunk.summed / total[:, None]) * scale).to(u.dtype)


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
    rows = chunk.rows
    slope = _process(tile, first, bias, call, rows, with_slope=True)
    column, here = _target_column(tile, first, call, rows)
    logprobs = out.logprobs[rows, None]
    c = given.logprobs[rows, None].where(~logprobs.isnan(), torch.nan)  # a target outside the vocabulary
    log_p = tile.sub_(out.lse[rows, None])
    d = log_p.exp()
    at_target = -c * torch.expm1(logprobs)  # c·(1 − p_y) without cancellation
    if given.entropy is None or out.entropy is None:
        d.mul_(-c)
    else:
        e, entropy = given.entropy[rows, None], out.entropy[rows, None]
        at_target -= e * logprobs.exp() * (logprobs + entropy)
        d.mul_(log_p.clamp_(min=torch.finfo(tile.dtype).min).add_(entropy).mul_(-e).sub_(c))
    d.scatter_(1, column, torch.where(here, at_target, d.gather(1, column)))
    d.mul_(call.logit_scale / call.temperature_of(rows))
    product.copy_(d if slope is None else d.mul_(slope))


def _target_column(tile: Tensor, first: int, call: HeadCall, rows: slice) -> tuple[Tensor, Tensor]:
    """The target's column in this tile [n, 1], clamped into it, and whether it really lies there."""
    local = call.targets[rows, None] - first
    return local.clamp(0, tile.shape[1] - 1), (local >= 0) & (local < tile.shape[1])


def _process(
    tile: Tensor, first: int, bias: Tensor | None, call: HeadCall, rows: slice, *, with_slope: bool
) -> Tensor | None:
    """Raw logits to a, in place; returns 1 − tanh² [n, w] where there is a softcap and a slope is wanted."""
    slope = None
    if bias is not None:
        tile.add_(bias[first : first + tile.shape[1]])
    if call.logit_scale != 1.0:
        tile.mul_(call.logit_scale)
    if call.softcap is not None:
        tile.div_(call.softcap).tanh_()
        slope = 1 - tile.square() if with_slope else None
        tile.mul_(call.softcap)
    tile.div_(call.temperature_of(rows))
    return slope


def _slope_at_target(call: HeadCall, chunk: Chunk) -> Tensor | float:
    """1 − tanh² at the target [n], from its processed logit."""
    if call.softcap is None:
        return 1.0
    temperature = call.temperature[chunk.rows] if isinstance(call.temperature, Tensor) else call.temperature
    return 1 - (chunk.running[TARGET] * temperature / call.softcap).square()
