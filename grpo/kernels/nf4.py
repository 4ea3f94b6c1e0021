"""Dequantisation of NF4 weights with doubly quantised scales, one matrix at a time into memory that all matrices share.

    w_i = code[nibble_i]·absmax_{i div 64}        absmax_j = absmax_code[q_j]·absmax_scale_{j div 256} + offset

Source: Dettmers et al., QLoRA (arXiv 2305.14314), sections 2 and 3: 16 levels at quantiles of a normal distribution,
4 + 8/64 + 32/(64·256) = 4.127 bits per weight. Of the two nibbles in a byte the high one comes first. Products and sum
are float32, each rounded by itself, and the result is rounded once: the bits of the library that packed the weight.

Files: this one holds the contract and the torch twin, nf4_triton.py the kernel.

Left out: quantising, FP4 and LLM.int8, products on packed weights (a full bin is bound by the GEMM, not by this).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo.kernels.backend import Backend
from grpo.kernels.rows import twin_name


@dataclass(frozen=True)
class NF4Weight:
    """A frozen matrix [out, in] of n = out·in values in 4 bits, row after row.

    `packed` [⌈n/2⌉] uint8. `absmax` [⌈n/blocksize⌉]: float32, or uint8 codes, which then take `absmax_code` [256],
    `absmax_scale` [⌈len(absmax)/absmax_blocksize⌉] and `offset` (a number, or a 0-d tensor, so that no host waits for
    it), all float32. `code` [16] float32. `dtype`: what it dequantises to; another one by `dataclasses.replace`.

    Raises:
        ValueError: one line, if these do not fit together.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    code: Tensor
    absmax_code: Tensor | None = None
    absmax_scale: Tensor | None = None
    offset: Tensor | float = 0.0
    blocksize: int = 64
    absmax_blocksize: int = 256

    def __post_init__(self) -> None:
        values = math.prod(self.shape)
        blocks = _divide_up(values, self.blocksize)
        _check("packed", self.packed, _divide_up(values, 2), torch.uint8)
        _check("code", self.code, 16)
        _check("absmax", self.absmax, blocks, torch.uint8 if self.is_double else torch.float32)
        if self.is_double:
            _check("absmax_code", self.absmax_code, 256)
            _check("absmax_scale", self.absmax_scale, _divide_up(blocks, self.absmax_blocksize))
        if self.blocksize < 2 or self.blocksize & (self.blocksize - 1):
            raise ValueError(f"blocksize: {self.blocksize} (want a power of 2)")

    @property
    def is_double(self) -> bool:
        """Whether absmax is quantised too."""
        return self.absmax.dtype == torch.uint8

    @property
    def device(self) -> torch.device:
        """Where the packed values are, and with them the rest."""
        return self.packed.device

    @classmethod
    def of(cls, source: Any) -> NF4Weight:
        """View the weight of a 4-bit linear layer, or that parameter itself; the storage stays the layer's.

        `source` is known by its attributes alone: `quant_state` with absmax, code, blocksize, shape, dtype and, if
        doubly quantised, offset and state2 {absmax, code, blocksize}.

        Raises:
            ValueError: no quant_state (a layer has none before it first moves to its device), not NF4, not a matrix,
                or packed anew for this CPU's own kernels, which is another layout.
        """
        parameter = source if isinstance(source, Tensor) else getattr(source, "weight", source)
        state = getattr(parameter, "quant_state", None)
        if state is None:
            raise ValueError(f"{type(source).__name__}: no quant_state (want a quantised 4-bit layer or its weight)")
        if getattr(state, "quant_type", "nf4") != "nf4":
            raise ValueError(f"quant_state: {state.quant_type} (want nf4)")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "quant_state: repacked for this CPU (want support_avx512bf16_for_cpu = False on the layer)"
            )
        if len(state.shape) != 2:
            raise ValueError(f"quant_state: shape {tuple(state.shape)} (want a matrix)")
        second = getattr(state, "state2", None)
        if second is None:
            double = {}
        else:
            double = {
                "absmax_code": second.code,
                "absmax_scale": second.absmax,
                "offset": state.offset,
                "absmax_blocksize": second.blocksize,
            }
        return cls(
            packed=parameter.detach().view(torch.uint8).reshape(-1),  # its storage may be declared as another dtype
            absmax=state.absmax,
            shape=tuple(state.shape),
            dtype=state.dtype,
            code=state.code,
            blocksize=state.blocksize,
            **double,
        )


def dequantize(weight: NF4Weight, *, out: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """The dense matrix [out, in] in `weight.dtype`, written into `out` (contiguous) if given. No gradient.

    The torch twin takes temporaries of 8 bytes a value, the Triton twin none.

    Raises:
        ValueError: `out` does not fit, or `backend` cannot run (`resolve_backend`).
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    elif (out.shape, out.dtype, out.device) != (weight.shape, weight.dtype, weight.device) or not out.is_contiguous():
        found = f"{out.dtype} {tuple(out.shape)} on {out.device}"
        wanted = f"contiguous {weight.dtype} {weight.shape} on {weight.device}"
        raise ValueError(f"out: {found} (want {wanted})")
    if twin_name(backend, weight.device.type, weight.dtype) == "torch":
        return _dequantize_torch(weight, out)
    from grpo.kernels import nf4_triton

    return nf4_triton.dequantize(weight, out)


def _dequantize_torch(weight: NF4Weight, out: Tensor) -> Tensor:
    pairs = torch.stack([weight.code.repeat_interleave(16), weight.code.repeat(16)], 1)  # [256, 2]: high, low nibble
    values = pairs.index_select(0, weight.packed.int()).view(-1)[: out.numel()]
    scale = absmax_of(weight)
    whole = values.numel() // weight.blocksize * weight.blocksize
    blocks = values[:whole].view(-1, weight.blocksize)
    blocks *= scale[: len(blocks), None]
    values[whole:] *= scale[len(blocks) :]  # the last block may be short: zero or one factor
    out.view(-1).copy_(values)
    return out


def absmax_of(weight: NF4Weight) -> Tensor:
    """The scale of each block, [⌈n/blocksize⌉] float32."""
    if weight.absmax_code is None or weight.absmax_scale is None:
        return weight.absmax
    coarse = weight.absmax_scale.repeat_interleave(weight.absmax_blocksize)[: weight.absmax.numel()]
    return weight.absmax_code.index_select(0, weight.absmax.int()) * coarse + weight.offset


class Scratch:
    """One buffer per (device, stream, dtype), as large as the largest matrix so far, handed out as a view.

    The next `view` on the same stream overwrites it, in stream order: use the view at once, in kernels queued before
    the next one, and let autograd never save it. Two threads may not feed one stream at the same time.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}

    def view(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory [out, in], shared with every other view of this device, stream and dtype."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key, size = (device, stream, dtype), math.prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers.pop(key, None)  # before its larger successor is made, so that both never coexist
            with torch.inference_mode(False):  # a tensor made under inference_mode could not be written outside it
                self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return self._buffers[key][:size].view(shape)

    @property
    def num_bytes(self) -> int:
        """Bytes held on all devices together."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def release(self) -> None:
        """Give the memory back to the allocator, as before a rollout."""
        self._buffers.clear()


SCRATCH = Scratch()


def _divide_up(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _check(name: str, tensor: Tensor | None, size: int, dtype: torch.dtype = torch.float32) -> None:
    if tensor is None or tensor.dtype != dtype or tensor.shape != (size,):
        found = None if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name}: {found} (want {dtype} ({size},))")
