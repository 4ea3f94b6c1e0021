"""Log-probabilities of chosen tokens from final hidden states, without ever holding [N, V] logits.

    a_iv = softcap((h_i·W_v + b_v)·k) / T_i        logp_i = a_iy − log Σ_v exp a_iv        u_i = ∂logp_i / ∂h_i

Chunks of rows share one float32 tile of logits, bounded by `chunk_mb`. What requires grad picks the path; the forward
numbers are the same bits on all three:
- nothing: statistics alone (one GEMM);
- hidden only (frozen head): dL/dh_i = (∂L/∂logp_i)·u_i for any loss, so u is formed in the forward pass while the tile
  is hot and backward is one multiply (two GEMMs; recomputing the logits would make it three);
- weight or bias, or the entropy's gradient: the tile is rebuilt in backward, where ∂L/∂logp is known (four GEMMs).

Left out: LoRA or quantised storage on the head, a vocabulary split over ranks, double backward, float16 gradients
(∂L/∂logp·u underflows without loss scaling). Call it outside activation-checkpointed regions, else its forward runs
twice; a compiled caller gets a graph break here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Backend = Literal["auto", "torch", "triton"]
MIB = 2**20
ROW_ALIGNMENT = 64  # the tile's row stride, in elements: an odd V would slow the GEMM down
CHUNK_ALIGNMENT = 128  # rows


class TokenLogprobs(NamedTuple):
    """All float32 [N] (float64 for float64 inputs); `entropy` is None unless asked for. Nats."""

    logprobs: Tensor
    entropy: Tensor | None
    lse: Tensor


@dataclass(frozen=True)
class Coefficients:
    """∂L/∂logp and ∂L/∂entropy of the rows of one tile, each [n], contiguous, in the tile's dtype; None: 1 and 0."""

    logprobs: Tensor | None = None
    entropy: Tensor | None = None

    def of(self, rows: slice) -> Coefficients:
        """Those of one tile."""
        return Coefficients(*(None if x is None else x[rows] for x in (self.logprobs, self.entropy)))


@dataclass(frozen=True)
class HeadCall:
    """One call's settings: all but hidden, weight and bias, which autograd has to see."""

    targets: Tensor  # [N] int64
    temperature: float | Tensor  # Tensor: [N] in tile_dtype
    softcap: float | None
    logit_scale: float
    with_entropy: bool
    rows_per_tile: int
    dtype: torch.dtype  # of hidden and weight as the GEMM is meant to see them: the autocast dtype inside autocast
    operand_dtype: torch.dtype  # as it really sees them: 16-bit operands with a float32 result exist on CUDA alone
    tile_dtype: torch.dtype
    row_step: RowStep

    def operand(self, tensor: Tensor) -> Tensor:
        """What the GEMMs read: `dtype`'s values, stored as `operand_dtype`."""
        return tensor.to(self.dtype).to(self.operand_dtype)

    def temperature_of(self, rows: slice) -> float | Tensor:
        """A number, or [n, 1]."""
        return self.temperature[rows, None] if isinstance(self.temperature, Tensor) else self.temperature


# (tile, bias, call, rows, out, wanted) -> D | None: turns raw logits h·W [n, V] into statistics, written to out[rows],
# and, if `wanted` is given, into D = ∂(c·logp + e·entropy)/∂(h·W) [n, V] in call.operand_dtype. May overwrite the tile.
RowStep = Callable[[Tensor, Tensor | None, HeadCall, slice, TokenLogprobs, Coefficients | None], Tensor | None]


def resolve_backend(
    backend: Backend, device: torch.device | str, dtype: torch.dtype = torch.bfloat16
) -> tuple[Literal["torch", "triton"], str]:
    """Which twin will run, and why, for a log line. "auto" decides by device and dtype; an explicit choice holds.

    Raises:
        ValueError: unknown backend, or "triton" where it cannot run.
    """
    kind = torch.device(device).type
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend: unknown {backend!r} (want auto, torch or triton)")
    if backend == "torch":
        return "torch", "asked for"
    installed = importlib.util.find_spec("triton") is not None
    if backend == "triton":
        if not installed:
            raise ValueError("backend: triton is not installed (want it installed, or backend torch)")
        if dtype == torch.float64:
            raise ValueError("backend: triton has no float64 (want backend torch)")
        if kind != "cuda" and not _interprets_triton():
            raise ValueError(f"backend: triton cannot run on {kind} (want a CUDA device, or backend torch)")
        return "triton", "asked for"
    if kind != "cuda":
        return "torch", f"auto: {kind} tensors"
    if not installed:
        return "torch", "auto: triton is not installed"
    if dtype == torch.float64:
        return "torch", "auto: float64"
    return "triton", "auto: CUDA"


def _interprets_triton() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@torch.compiler.disable
def token_logprobs(  # noqa: PLR0913 the interface is the contract: the head's formula, then what to return and how
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool | Literal["grad"] = False,
    chunk_mb: float = 512,
    backend: Backend = "auto",
) -> TokenLogprobs:
    """Log-prob of `targets[i]` at `hidden[i]`, with logits softcap((h·Wᵀ + bias)·logit_scale) / temperature.

    Args:
        hidden: [N, H] final hidden states of the scored positions alone (row t predicts token t + 1), any float dtype.
        lm_head_weight: [V, H], hidden's dtype (any inside autocast, which then decides as for a linear layer).
        targets: [N] integer. A value outside [0, V) gives a NaN log-prob and gradient row, without a host sync.
        bias: [V].
        temperature: a number, or [N] constants: the sampler's own value.
        softcap, logit_scale: as the model has them; a model that divides its logits by x has logit_scale 1/x.
        return_entropy: True: entropy of the whole distribution, a constant; "grad": differentiable (recompute path).
        chunk_mb: MiB of the float32 tile [n, V]. n is rounded down to 128 rows, or below that to as few as fit, at
            least one. The torch twin holds up to three more temporaries of that size, the Triton twin none.
        backend: see `resolve_backend`.

    Returns:
        TokenLogprobs. `logprobs` is differentiable in hidden, weight and bias; `lse` never is, `entropy` only if
        "grad". With a frozen head the backward pass consumes what forward kept: a second one raises RuntimeError.

    Raises:
        ValueError: one line: shapes, dtypes, devices or settings that do not fit.
    """
    _check_tensors(hidden, lm_head_weight, targets, bias)
    _check_settings(hidden, temperature, softcap, logit_scale, return_entropy)
    dtype = _compute_dtype(hidden, lm_head_weight, bias)
    tile_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    name, _ = resolve_backend(backend, hidden.device, dtype)
    call = HeadCall(
        targets=targets.long().contiguous(),
        temperature=temperature.to(tile_dtype).contiguous() if isinstance(temperature, Tensor) else float(temperature),
        softcap=None if softcap is None else float(softcap),
        logit_scale=float(logit_scale),
        with_entropy=bool(return_entropy),
        rows_per_tile=rows_per_tile(lm_head_weight.shape[0], chunk_mb, tile_dtype.itemsize),
        dtype=dtype,
        operand_dtype=dtype if hidden.is_cuda else tile_dtype,
        tile_dtype=tile_dtype,
        row_step=_row_step(name),
    )
    return _on_path(hidden, lm_head_weight, bias, call, entropy_gradient=return_entropy == "grad")


def rows_per_tile(vocabulary: int, chunk_mb: float, itemsize: int = 4) -> int:
    """Rows n of a tile [n, V] of at most `chunk_mb` MiB: a multiple of 128, or below that what fits, at least 1."""
    if not chunk_mb > 0:
        raise ValueError(f"chunk_mb: {chunk_mb} (want a positive number of MiB)")
    rows = int(chunk_mb * MIB // (itemsize * _row_stride(vocabulary)))
    return rows // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT if rows >= CHUNK_ALIGNMENT else max(rows, 1)


def _on_path(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall, *, entropy_gradient: bool
) -> TokenLogprobs:
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
        # Not save_for_backward: u belongs to this function alone and is overwritten.
        ctx.u, ctx.hidden_dtype = u, hidden.dtype
        ctx.mark_non_differentiable(*(x for x in (out.entropy, out.lse) if x is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, *_: Any) -> Any:
        u, ctx.u = ctx.u, None
        if u is None:
            raise RuntimeError("token_logprobs: second backward; with a frozen head the first one consumed its state")
        return u.mul_(grad_logprobs[:, None]).to(ctx.hidden_dtype), None, None, None


class _Recompute(torch.autograd.Function):
    """Trainable head or entropy gradient: backward rebuilds each tile and knows ∂L/∂logp and ∂L/∂entropy there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall, entropy_gradient: bool
    ) -> Any:
        out = _score(hidden, weight, bias, call)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.call, ctx.entropy_gradient = call, entropy_gradient
        constants = (out.lse,) if entropy_gradient else (out.entropy, out.lse)
        ctx.mark_non_differentiable(*(x for x in constants if x is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor | None, _: Any) -> Any:
        hidden, weight, bias = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = _HeadGradients.zeros(ctx.needs_input_grad, hidden, weight, bias, ctx.call)
            # Contiguous: the gradient of a sum arrives as one number seen through stride 0.
            e = grad_entropy.contiguous() if ctx.entropy_gradient and grad_entropy is not None else None
            gradients.fill(hidden, weight, bias, ctx.call, Coefficients(grad_logprobs.contiguous(), e))
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

    def fill(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall, given: Coefficients) -> None:
        weight = call.operand(weight)
        again = _empty_outputs(hidden, call)
        for rows, chunk, tile in _tiles(hidden, weight, call):
            d = call.row_step(tile, bias, call, rows, again, given.of(rows))
            assert d is not None
            if self.hidden is not None:
                _mm_into(d, weight, self.hidden[rows])
            if self.weight is not None:
                _add_mm(self.weight, d.t(), chunk)
            if self.bias is not None:
                self.bias.add_(d.sum(0, dtype=call.tile_dtype))


def _score(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall, u: Tensor | None = None
) -> TokenLogprobs:
    """The forward pass of every path; fills u [N, H] too if given."""
    hidden, weight = hidden.detach(), call.operand(weight.detach())
    bias = None if bias is None else bias.detach()
    out = _empty_outputs(hidden, call)
    for rows, _, tile in _tiles(hidden, weight, call):
        d = call.row_step(tile, bias, call, rows, out, None if u is None else Coefficients())
        if u is not None and d is not None:
            _mm_into(d, weight, u[rows])
    return out


def _tiles(hidden: Tensor, weight: Tensor, call: HeadCall) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, hidden[rows], raw logits [n, V]) chunk by chunk; all tiles are the same memory."""
    total, vocabulary = hidden.shape[0], weight.shape[0]
    height = min(call.rows_per_tile, total)
    buffer = torch.empty((height, _row_stride(vocabulary)), dtype=call.tile_dtype, device=hidden.device)
    for start in range(0, total, call.rows_per_tile):
        rows = slice(start, min(start + call.rows_per_tile, total))
        chunk = call.operand(hidden[rows])
        tile = buffer[: chunk.shape[0], :vocabulary]
        _mm_into(chunk, weight.t(), tile)
        yield rows, chunk, tile


def _mm_into(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a·b, accumulated in float32 at least and rounded once."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and a.dtype.itemsize == 2 and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a·b in total's dtype."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _empty_outputs(hidden: Tensor, call: HeadCall) -> TokenLogprobs:
    def empty() -> Tensor:
        return torch.empty(hidden.shape[0], dtype=call.tile_dtype, device=hidden.device)

    return TokenLogprobs(empty(), empty() if call.with_entropy else None, empty())


def _row_stride(vocabulary: int) -> int:
    return -(-vocabulary // ROW_ALIGNMENT) * ROW_ALIGNMENT


# --- the torch twin ------------------------------------------------------------------------------------------------


def torch_row_step(
    tile: Tensor, bias: Tensor | None, call: HeadCall, rows: slice, out: TokenLogprobs, wanted: Coefficients | None
) -> Tensor | None:
    """The row step (see `RowStep`) in plain torch. The target is kept out of the sums, so 1 − p_y never cancels."""
    targets, temperature = call.targets[rows, None], call.temperature_of(rows)
    inside = (targets >= 0) & (targets < tile.shape[1])
    column = targets.clamp(0, tile.shape[1] - 1)
    bounded_slope = _process_logits(tile, bias, call, temperature, with_slope=wanted is not None)
    peak = tile.amax(1, keepdim=True)
    tile.sub_(peak)
    gap = tile.gather(1, column)  # a_y − max a
    weights = tile.exp()
    own = gap.exp()
    weights.scatter_(1, column, 0.0)
    others = weights.sum(1, keepdim=True)  # Σ_{v≠y} e^(a_v − max a)
    total = others + own
    log_total = total.log()
    logprobs = torch.where(gap == 0, -others.log1p(), gap - log_total)
    out.logprobs[rows] = logprobs.where(inside, torch.nan)[:, 0]
    out.lse[rows] = (peak + log_total)[:, 0]
    entropy = None
    if out.entropy is not None:
        tile.clamp_(min=torch.finfo(tile.dtype).min)  # 0·(−inf) of a banned token counts as 0
        weighted = (weights * tile).sum(1, keepdim=True) + own * gap.clamp(min=torch.finfo(tile.dtype).min)
        entropy = log_total - weighted / total
        out.entropy[rows] = entropy[:, 0]
    if wanted is None:
        return None
    scale = call.logit_scale / temperature
    c = (torch.ones_like(own) if wanted.logprobs is None else wanted.logprobs[:, None]).where(inside, torch.nan) * scale
    d = weights.div_(-total)  # −p_v, and 0 at the target
    at_target = c * others / total
    if wanted.entropy is None or entropy is None:
        d.mul_(c)
    else:
        e = wanted.entropy[:, None] * scale
        d.mul_(tile.sub_(log_total - entropy).mul_(e).add_(c))
        at_target = at_target - e * own / total * (logprobs + entropy)
    d.scatter_(1, column, at_target)
    if bounded_slope is not None:
        d.mul_(bounded_slope)
    return d.to(call.operand_dtype)


def _process_logits(
    tile: Tensor, bias: Tensor | None, call: HeadCall, temperature: float | Tensor, *, with_slope: bool
) -> Tensor | None:
    """Raw logits to a, in place; returns 1 − tanh² [n, V] where there is a softcap and a slope is wanted."""
    slope = None
    if bias is not None:
        tile.add_(bias)
    if call.logit_scale != 1.0:
        tile.mul_(call.logit_scale)
    if call.softcap is not None:
        tile.div_(call.softcap).tanh_()
        slope = 1 - tile.square() if with_slope else None
        tile.mul_(call.softcap)
    tile.div_(temperature)
    return slope


def _row_step(name: str) -> RowStep:
    if name == "torch":
        return torch_row_step
    from grpo.kernels.logprobs_triton import triton_row_step

    return triton_row_step


# --- what is refused -----------------------------------------------------------------------------------------------


def _check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    tensors = {"hidden": hidden, "lm_head_weight": weight, "targets": targets} | (
        {} if bias is None else {"bias": bias}
    )
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise ValueError(f"{name}: {type(tensor).__name__} (want a plain tensor: not sharded, not quantised)")
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: on {tensor.device}, hidden on {hidden.device} (want one device)")
        if name != "targets" and not tensor.is_floating_point():
            raise ValueError(f"{name}: {tensor.dtype} (want floating point, not quantised)")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets: {targets.dtype} (want integers)")
    _check_shapes(hidden, weight, targets, bias)


def _check_shapes(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"hidden: shape {tuple(hidden.shape)} (want [N, H])")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"lm_head_weight: shape {tuple(weight.shape)} (want [V, {hidden.shape[1]}])")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: shape {tuple(targets.shape)} (want [{hidden.shape[0]}])")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: shape {tuple(bias.shape)} (want [{weight.shape[0]}])")


def _check_settings(
    hidden: Tensor, temperature: float | Tensor, softcap: float | None, logit_scale: float, return_entropy: Any
) -> None:
    if isinstance(temperature, Tensor):
        if temperature.shape != hidden.shape[:1] or temperature.device != hidden.device or temperature.requires_grad:
            found = f"shape {tuple(temperature.shape)} on {temperature.device}"
            raise ValueError(
                f"temperature: {found} (want a number or constants [{hidden.shape[0]}] on {hidden.device})"
            )
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: {temperature} (want a positive number)")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: {softcap} (want a positive number or None)")
    if not 0 < abs(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale: {logit_scale} (want a finite number, not 0)")
    if return_entropy not in (False, True, "grad"):
        raise ValueError(f"return_entropy: {return_entropy!r} (want False, True or 'grad')")


def _compute_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(kind)
    if weight.dtype != hidden.dtype:
        raise ValueError(f"lm_head_weight: {weight.dtype}, hidden {hidden.dtype} (want one dtype, or autocast)")
    if bias is not None and bias.dtype != hidden.dtype:
        raise ValueError(f"bias: {bias.dtype}, hidden {hidden.dtype} (want one dtype, or autocast)")
    return hidden.dtype
