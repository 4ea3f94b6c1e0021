"""What the elementwise kernels share: tensors as rows, the switch to 64-bit offsets, the twin of a call.

A call at small sizes costs what its Python costs, so everything here is a few attribute reads.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from grpo.kernels.backend import Backend, resolve_backend

LONG_FROM = 2**31 - 2**17  # element offsets from here on are 64-bit; the margin is for the last block's masked lanes


@functools.cache
def twin_name(backend: Backend, device_type: str, dtype: torch.dtype) -> Literal["torch", "triton"]:
    """`resolve_backend`'s choice, remembered."""
    return resolve_backend(backend, device_type, dtype)[0]


def wide(tensor: Tensor) -> Tensor:
    """In the dtype of the maths: float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def new_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised and contiguous, whatever the tensor's strides."""
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def as_rows(tensor: Tensor) -> Tensor:
    """[…, H] as [R, H] of unit column stride: a view where the strides allow one, else a copy."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def view_rows(tensor: Tensor, name: str) -> Tensor:
    """The same for a tensor that will be written: never a copy.

    Raises:
        ValueError: its strides allow no such view, or rows share memory.
    """
    rows = as_rows(tensor)
    height, width = rows.shape
    if rows.data_ptr() != tensor.data_ptr() or (height > 1 and rows.stride(0) < width):
        raise ValueError(f"{name}: strides {tensor.stride()} (want contiguous rows, one stride apart, none shared)")
    return rows


def needs_long(extent: int) -> bool:
    """Whether offsets below this many elements need 64 bits: a compile-time constant of the kernels."""
    return extent >= LONG_FROM


def are_long(*rows: Tensor) -> bool:
    """The same, for any of these [R, H]."""
    return any(x.shape[0] * x.stride(0) + x.shape[1] >= LONG_FROM for x in rows)


_HERE: AbstractContextManager[Any] = nullcontext()


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A launch goes to the current device: make it the tensor's, at no cost where it is already."""
    if not tensor.is_cuda or torch.cuda.current_device() == tensor.device.index:
        return _HERE
    return torch.cuda.device(tensor.device)
