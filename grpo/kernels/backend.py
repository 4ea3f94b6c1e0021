"""Which twin of a kernel pair runs: decided once, by device and dtype, and said with its reason.

Left out: trying and catching. An explicit choice works or raises.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

Backend = Literal["auto", "torch", "triton"]


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
        from grpo.kernels.helpers_triton import interprets

        if kind != "cuda" and not interprets():
            raise ValueError(f"backend: triton cannot run on {kind} (want a CUDA device, or backend torch)")
        return "triton", "asked for"
    if kind != "cuda":
        return "torch", f"auto: {kind} tensors"
    if not installed:
        return "torch", "auto: triton is not installed"
    if dtype == torch.float64:
        return "torch", "auto: float64"
    return "triton", "auto: CUDA"
