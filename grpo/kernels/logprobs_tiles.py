"""The loops of token log-probs: rows in chunks, the vocabulary in tiles, and what autograd sees of it.

Mathematics and contract: logprobs.py. The elementwise work on a tile is a twin's (`Steps`); the GEMMs are torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MIB = 2**20
SUM_ELEMENTS = 4 * MIB  # n·H: fills the GPU with one wave of output tiles in the product with W
ROW_RANGE = (2048, 4096)  # n, while the limit allows: on an H100 1024 is 4 % slower, more is no faster
FEW_ROWS = 256  # below, the GEMMs are bound by reading W
WIDE, NARROW = 8192, 1024  # w: below WIDE launches and the sum's traffic begin to cost, below NARROW they dominate


class TokenLogprobs(NamedTuple):
    """All float32 [N] (float64 for float64 inputs); `entropy` is None unless asked for. Nats."""

    logprobs: Tensor
    entropy: Tensor | None
    lse: Tensor


@dataclass(frozen=True)
class Coefficients:
    """c = ∂L/∂logp and e = ∂L/∂entropy (None: 0), each [N], contiguous, in the tile's dtype."""

    logprobs: Tensor
    entropy: Tensor | None


@dataclass(frozen=True)
class HeadCall:
    """One call's settings: all but hidden, weight and bias, which autograd has to see."""

    targets: Tensor  # [N] int64
    temperature: float | Tensor  # Tensor: [N] in tile_dtype
    softcap: float | None
    logit_scale: float
    with_entropy: bool
    vocabulary: int  # V
    tile: tuple[int, int]  # rows n, columns w
    dtype: torch.dtype  # of hidden and weight as the GEMM is meant to see them: the autocast dtype inside autocast
    operand_dtype: torch.dtype  # as it really sees them: 16-bit operands with a float32 result exist on CUDA alone
    tile_dtype: torch.dtype
    steps: Steps

    def operand(self, tensor: Tensor) -> Tensor:
        """What the GEMMs read: `dtype`'s values, stored as `operand_dtype`."""
        return tensor.to(self.dtype).to(self.operand_dtype)

    def temperature_of(self, rows: slice) -> float | Tensor:
        """A number, or [n, 1]."""
        return self.temperature[rows, None] if isinstance(self.temperature, Tensor) else self.temperature


# Rows of `Chunk.running`, over the vocabulary tiles seen so far:
PEAK = 0  # r: the largest a, or (Triton) a little less
OTHERS = 1  # q = Σ_{v≠y} e^(a_v − r)
WEIGHTED = 2  # Σ_{v≠y} e^(a_v − r)·(a_v − r), if the entropy is wanted
TARGET = 3  # a_y; −inf until its tile comes


@dataclass(frozen=True)
class Chunk:
    """The rows in work and what is known of them so far."""

    rows: slice  # of [N]
    hidden: Tensor  # [n, H] in operand_dtype
    running: Tensor  # [4, n] in tile_dtype
    summed: Tensor | None  # [n, H] in tile_dtype: Σ_v j_v·E_v·W_v or Σ_v D_v·W_v; undefined before the first tile


class Steps(Protocol):
    """What a twin has to bring. A tile holds raw logits h·W [n, w] of columns first … first + w and may be overwritten;
    `product` [n, w] in operand_dtype, of equal strides, is what will be multiplied with W."""

    def fold(
        self, tile: Tensor, product: Tensor | None, first: int, bias: Tensor | None, call: HeadCall, chunk: Chunk
    ) -> None:
        """Bring `chunk.running` up to date. With `product`, rescale `chunk.summed` where r rises and write j·E there, j
        without the factor k/T."""

    def finish(self, call: HeadCall, chunk: Chunk, out: TokenLogprobs, chosen: Tensor | None, u: Tensor | None) -> None:
        """Write out[rows]; with `chosen` = W_y [n, H] also u[rows]."""

    def gradient(
        self,
        tile: Tensor,
        product: Tensor,
        first: int,
        bias: Tensor | None,
        call: HeadCall,
        chunk: Chunk,
        out: TokenLogprobs,
        given: Coefficients,
    ) -> None:
        """Write D = ∂(Σ c·logp + e·entropy)/∂(h·W) to `product`, from the finished statistics in `out`."""


def tile_shape(hidden_size: int, vocabulary: int, chunk_mb: float, bytes_per_logit: int = 6) -> tuple[int, int]:
    """Rows n and columns w of the tile of logits, so that n·(w + H)·bytes_per_logit stay within `chunk_mb` MiB.

    (Logits in float32 and E in 16 bits are 6 bytes; so are the sum and W_y, [n, H].) n is 2048, or more up to n·H of
    4M, and w as wide as fits, the vocabulary cut into equal parts. Where that leaves w < 8192, n is halved down to 256;
    then w shrinks to 1024, then n to 1, which is used even where it does not fit.

    Raises:
        ValueError: chunk_mb is not a positive number.
    """
    if not chunk_mb > 0:
        raise ValueError(f"chunk_mb: {chunk_mb} (want a positive number of MiB)")
    limit = int(chunk_mb * MIB // bytes_per_logit)
    whole = -(-vocabulary // 64) * 64
    rows = min(max(_down(SUM_ELEMENTS // max(hidden_size, 1), 128), ROW_RANGE[0]), ROW_RANGE[1])
    while limit // rows - hidden_size < min(whole, WIDE) and _down(rows // 2, 128) >= FEW_ROWS:
        rows = _down(rows // 2, 128)
    widest = _down(limit // rows - hidden_size, 64)
    if widest < min(whole, NARROW):
        widest = min(whole, NARROW)
        fitting = limit // (widest + hidden_size)
        rows = _down(fitting, 128) or max(fitting, 1)
    parts = -(-whole // widest)
    return rows, -(-whole // (64 * parts)) * 64


def scratch_bytes(hidden_size: int, vocabulary: int, chunk_mb: float = 512) -> int:
    """Bytes a frozen-head call with 16-bit operands allocates beside its [N] and [N, H] results: tile, E, sum, W_y."""
    rows, columns = tile_shape(hidden_size, vocabulary, chunk_mb)
    return rows * (6 * columns + 6 * hidden_size + 16)


def _down(value: int, step: int) -> int:
    return value // step * step


def token_logprobs_on_path(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall, *, entropy_gradient: bool
) -> TokenLogprobs:
    """One call on the path that follows from what requires grad; autocast's casts happen inside."""
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        if not (torch.is_grad_enabled() and (head_trains or hidden.requires_grad)):
            return _score(hidden, weight, bias, call)
        if call.dtype == torch.float16:
            raise ValueError("hidden: float16 gradients underflow without loss scaling (want bfloat16 or float32)")
        if head_trains or entropy_gradient:
            return TokenLogprobs(*_Recompute.apply(hidden, weight, bias, call, entropy_gradient))
        return TokenLogprobs(*_KeepU.apply(hidden, weight, bias, call))


class _KeepU(torch.autograd.Function):
    """Frozen head: forward leaves u = ∂logp/∂h, which backward turns into the gradient in place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall) -> Any:
        u = torch.empty(hidden.shape, dtype=call.dtype, device=hidden.device)
        out = _score(hidden, weight, bias, call, u)
        ctx.save_for_backward(u)  # so that a caller's hooks for saved tensors see it
        ctx.consumed, ctx.hidden_dtype = False, hidden.dtype
        ctx.mark_non_differentiable(*(x for x in (out.entropy, out.lse) if x is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, *_: Any) -> Any:
        if ctx.consumed:
            raise RuntimeError("token_logprobs: second backward; with a frozen head the first one consumed its state")
        (u,) = ctx.saved_tensors
        ctx.consumed = True
        return u.mul_(grad_logprobs[:, None]).to(ctx.hidden_dtype), None, None, None


class _Recompute(torch.autograd.Function):
    """Trainable head or entropy gradient: backward rebuilds each tile and knows ∂L/∂logp and ∂L/∂entropy there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall, entropy_gradient: bool
    ) -> Any:
        out = _score(hidden, weight, bias, call)
        ctx.save_for_backward(hidden, weight, bias, *out)
        ctx.call, ctx.entropy_gradient = call, entropy_gradient
        constants = (out.lse,) if entropy_gradient else (out.entropy, out.lse)
        ctx.mark_non_differentiable(*(x for x in constants if x is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor | None, _: Any) -> Any:
        hidden, weight, bias, *out = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = _HeadGradients.zeros(ctx.needs_input_grad, hidden, weight, bias, ctx.call)
            # Contiguous: the gradient of a sum arrives as one number seen through stride 0.
            e = grad_entropy.contiguous() if ctx.entropy_gradient and grad_entropy is not None else None
            given = Coefficients(grad_logprobs.contiguous(), e)
            gradients.fill(hidden, weight, bias, ctx.call, TokenLogprobs(*out), given)
        return gradients.hidden, gradients.of(weight), gradients.of_bias(bias), None, None


@dataclass(frozen=True)
class _HeadGradients:
    """dh [N, H] in hidden's dtype; dW [V, H] and db [V] in the tile's dtype, summed over tiles. None: not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def zeros(
        needed: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall
    ) -> _HeadGradients:
        def zero(like: Tensor, dtype: torch.dtype) -> Tensor:
            return torch.zeros(like.shape, dtype=dtype, device=like.device)

        return _HeadGradients(
            zero(hidden, hidden.dtype) if needed[0] else None,
            zero(weight, call.tile_dtype) if needed[1] else None,
            zero(bias, call.tile_dtype) if bias is not None and needed[2] else None,
        )

    def of(self, weight: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(weight.dtype)

    def of_bias(self, bias: Tensor | None) -> Tensor | None:
        return None if self.bias is None or bias is None else self.bias.to(bias.dtype)

    def fill(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: HeadCall,
        out: TokenLogprobs,
        given: Coefficients,
    ) -> None:
        scratch = Scratch.allocate(hidden, call, with_product=True, with_sum=self.hidden is not None)
        parts = _parts(weight, call)
        for chunk in scratch.chunks(hidden, call):
            for first, part in parts:
                part = call.operand(part)
                tile, product = scratch.views(len(chunk.hidden), len(part))
                assert product is not None
                _logits(chunk.hidden, part, tile)
                call.steps.gradient(tile, product, first, bias, call, chunk, out, given)
                columns = slice(first, first + len(part))
                if chunk.summed is not None:
                    _accumulate(chunk.summed, product, part, first=first == 0)
                if self.weight is not None:
                    _accumulate(self.weight[columns], product.t(), chunk.hidden, first=chunk.rows.start == 0)
                if self.bias is not None:
                    self.bias[columns] += product.sum(0, dtype=call.tile_dtype)
            if self.hidden is not None and chunk.summed is not None:
                self.hidden[chunk.rows] = chunk.summed


@dataclass(frozen=True)
class Scratch:
    """Memory that every chunk of a call uses again."""

    tile: Tensor  # [n, w] in tile_dtype
    product: Tensor | None  # [n, w] in operand_dtype
    summed: Tensor | None
    running: Tensor
    running_start: Tensor  # [4, 1]
    cached: dict[tuple[int, int], tuple[Tensor, Tensor | None]]

    @staticmethod
    def allocate(hidden: Tensor, call: HeadCall, *, with_product: bool, with_sum: bool) -> Scratch:
        """Uninitialised."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=call.tile_dtype, device=hidden.device)

        rows = min(call.tile[0], hidden.shape[0])
        tile = empty(rows, call.tile[1])
        # The peak is finite: in a tile of banned tokens −inf − (−inf) would be NaN.
        start = torch.tensor([[torch.finfo(call.tile_dtype).min], [0.0], [0.0], [-torch.inf]], dtype=call.tile_dtype)
        return Scratch(
            tile=tile,
            product=torch.empty_like(tile, dtype=call.operand_dtype) if with_product else None,
            summed=empty(rows, hidden.shape[1]) if with_sum else None,
            running=empty(4, rows),
            running_start=start.to(hidden.device, non_blocking=True),
            cached={},
        )

    def chunks(self, hidden: Tensor, call: HeadCall) -> Iterator[Chunk]:
        """Chunk after chunk of the rows, statistics reset."""
        total, size = hidden.shape[0], call.tile[0]
        for start in range(0, total, size):
            rows = slice(start, min(start + size, total))
            count = rows.stop - rows.start
            running = self.running[:, :count].copy_(self.running_start)
            yield Chunk(rows, call.operand(hidden[rows]), running, None if self.summed is None else self.summed[:count])

    def views(self, rows: int, width: int) -> tuple[Tensor, Tensor | None]:
        """Tile and product of this size. Cached: a launch costs little more than such a slice."""
        key = (rows, width)
        if key not in self.cached:
            product = None if self.product is None else self.product[:rows, :width]
            self.cached[key] = (self.tile[:rows, :width], product)
        return self.cached[key]


def _score(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall, u: Tensor | None = None
) -> TokenLogprobs:
    """The forward pass of every path; fills u [N, H] too if given."""
    hidden, weight = hidden.detach(), weight.detach()
    bias = None if bias is None else bias.detach()
    out = _empty_outputs(hidden, call)
    scratch = Scratch.allocate(hidden, call, with_product=u is not None, with_sum=u is not None)
    parts = _parts(weight, call)
    for chunk in scratch.chunks(hidden, call):
        for first, part in parts:
            part = call.operand(part)
            tile, product = scratch.views(len(chunk.hidden), len(part))
            _logits(chunk.hidden, part, tile)
            call.steps.fold(tile, product, first, bias, call, chunk)
            if chunk.summed is not None and product is not None:
                _accumulate(chunk.summed, product, part, first=first == 0)
        chosen = None
        if u is not None:
            chosen = weight.index_select(0, call.targets[chunk.rows].clamp(0, len(weight) - 1))
            chosen = call.operand(chosen)
        call.steps.finish(call, chunk, out, chosen, u)
    return out


def _parts(weight: Tensor, call: HeadCall) -> list[tuple[int, Tensor]]:
    """(first column, W[first : first + w]) of every vocabulary tile."""
    return [(first, weight[first : first + call.tile[1]]) for first in range(0, len(weight), call.tile[1])]


def _logits(hidden: Tensor, part: Tensor, tile: Tensor) -> None:
    """h·Wᵀ in the tile's dtype, never rounded to 16 bits."""
    if hidden.dtype == tile.dtype:
        torch.mm(hidden, part.t(), out=tile)
    else:
        torch.mm(hidden, part.t(), out_dtype=tile.dtype, out=tile)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a·b in total's dtype, or total = a·b for the first."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _empty_outputs(hidden: Tensor, call: HeadCall) -> TokenLogprobs:
    def empty() -> Tensor:
        return torch.empty(hidden.shape[0], dtype=call.tile_dtype, device=hidden.device)

    return TokenLogprobs(empty(), empty() if call.with_entropy else None, empty())
