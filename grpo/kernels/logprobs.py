"""Log-probabilities of chosen tokens from final hidden states, without ever holding [N, V] logits.

    a_iv = softcap((h_i·W_v + b_v)·k) / T_i        logp_i = a_iy − log Σ_v exp a_iv        u_i = ∂logp_i / ∂h_i

Rows go through in chunks, the vocabulary in tiles; a tile of float32 logits [n, w] is memory that all of them share.
What requires grad picks the path; the forward numbers are the same bits on all three:
- nothing: running statistics alone (one GEMM);
- hidden only (frozen head): dL/dh_i = (∂L/∂logp_i)·u_i for any loss, so u is formed in the forward pass while the tile
  is hot and backward is one multiply (two GEMMs; recomputing the logits would make it three). With the running maximum
  r, E_v = e^(a_v − r) for v ≠ y, q = Σ_v E_v and j = ∂a/∂(h·W):  u = (j_y·q·W_y − Σ_v j_v·E_v·W_v) / (q + e^(a_y − r)),
  free of cancellation for confident tokens; q and the sum are rescaled when r rises, as in online softmax;
- weight or bias, or the entropy's gradient: tiles are rebuilt in backward, where ∂L/∂logp is known (four GEMMs).

Files: this one holds the contract, logprobs_tiles.py the loops and autograd, logprobs_torch.py and logprobs_triton.py
the three elementwise steps under one set of signatures.

Left out: LoRA or quantised storage on the head, a vocabulary split over ranks, double backward, float16 gradients
(∂L/∂logp·u underflows without loss scaling). Call it outside activation-checkpointed regions, else its forward runs
twice; a compiled caller gets a graph break here.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from grpo.kernels.backend import Backend, resolve_backend
from grpo.kernels.logprobs_tiles import HeadCall, Steps, TokenLogprobs, tile_shape, token_logprobs_on_path


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
        chunk_mb: the most MiB that tiles and sums may take together; see `tile_shape`. Below about 64 it costs time.
            The torch twin holds up to three more temporaries of the tile's size.
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
    operand_dtype = dtype if hidden.is_cuda else tile_dtype
    bytes_per_logit = tile_dtype.itemsize + operand_dtype.itemsize
    call = HeadCall(
        targets=targets.long().contiguous(),
        temperature=temperature.to(tile_dtype).contiguous() if isinstance(temperature, Tensor) else float(temperature),
        softcap=None if softcap is None else float(softcap),
        logit_scale=float(logit_scale),
        with_entropy=bool(return_entropy),
        vocabulary=lm_head_weight.shape[0],
        tile=tile_shape(hidden.shape[1], lm_head_weight.shape[0], chunk_mb, bytes_per_logit),
        dtype=dtype,
        operand_dtype=operand_dtype,
        tile_dtype=tile_dtype,
        steps=_steps(name),
    )
    return token_logprobs_on_path(hidden, lm_head_weight, bias, call, entropy_gradient=return_entropy == "grad")


def _steps(name: str) -> Steps:
    if name == "torch":
        from grpo.kernels import logprobs_torch

        return logprobs_torch
    from grpo.kernels import logprobs_triton

    return logprobs_triton


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
