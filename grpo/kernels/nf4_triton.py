"""The Triton twin of NF4 dequantisation: eight values a thread, scales and values in one pass (formula: nf4.py).

    w_i = code[nibble_i]·absmax_{i div 64}        absmax_j = absmax_code[q_j]·absmax_scale_{j div 256} + offset

Reads half a byte and writes one value; both tables, and the scales that neighbours share, stay in the first-level
cache.

Left out: float64 (the torch twin has it). The two products and the sum are kept from fusing, which would round once
less than the library that packed the weight.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.nf4 import NF4Weight

PACKS = 512  # of one program
NUM_WARPS = 4
INT32_LIMIT = 2**31 - 1


@triton.jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913 flags are compiled away
    packed_ptr, absmax_ptr, code_ptr, absmax_code_ptr, absmax_scale_ptr, offset_ptr, out_ptr, num_values, num_packs,
    DOUBLE: tl.constexpr, LONG: tl.constexpr, BLOCKSIZE: tl.constexpr, ABSMAX_BLOCKSIZE: tl.constexpr,  # noqa: N803
    PACKS: tl.constexpr, VALUES: tl.constexpr,  # noqa: N803
):  # fmt: skip
    program = tl.program_id(0)
    if LONG:
        program = program.to(tl.int64)
    pack = program * PACKS + tl.arange(0, PACKS)
    inside = pack < num_packs
    block = pack // (BLOCKSIZE // VALUES)
    if DOUBLE:
        q = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(absmax_scale_ptr + block // ABSMAX_BLOCKSIZE, mask=inside, other=0.0)
        absmax = tl.load(absmax_code_ptr + q) * scale + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    bits = tl.load(packed_ptr + pack, mask=inside, other=0).to(tl.int32)
    # Byte after byte, the high nibble first.
    place = tl.arange(0, VALUES)
    nibble = (bits[:, None] >> ((place // 2) * 8 + 4 - (place % 2) * 4)[None, :]) & 15
    values = tl.load(code_ptr + nibble) * absmax[:, None]
    index = pack[:, None] * VALUES + place[None, :]
    tl.store(out_ptr + index, values.to(out_ptr.dtype.element_ty), mask=index < num_values)


def dequantize(weight: NF4Weight, out: Tensor, *, long_index: bool | None = None) -> Tensor:
    """Write `weight` into `out` [out, in], contiguous. `long_index`: 64-bit offsets (None: where 32 do not reach)."""
    num_values = out.numel()
    if num_values == 0:
        return out
    packed, values = weight.packed, 2
    if num_values % 8 == 0 and weight.blocksize % 8 == 0 and packed.data_ptr() % 4 == 0:
        packed, values = packed.view(torch.int32), 8  # four bytes a load, sixteen a store
    if long_index is None:
        long_index = num_values + PACKS * values > INT32_LIMIT
    double = weight.is_double
    offset = weight.offset
    if double and not isinstance(offset, Tensor):
        offset = torch.full((), offset, dtype=torch.float32, device=out.device)
    with _on(out.device):
        _dequantize_kernel[(triton.cdiv(packed.numel(), PACKS),)](
            packed,
            weight.absmax,
            weight.code,
            weight.absmax_code if double else weight.code,
            weight.absmax_scale if double else weight.code,
            offset if double else weight.code,
            out,
            num_values,
            packed.numel(),
            DOUBLE=double,
            LONG=long_index,
            BLOCKSIZE=weight.blocksize,
            ABSMAX_BLOCKSIZE=weight.absmax_blocksize,
            PACKS=PACKS,
            VALUES=values,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return out


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
