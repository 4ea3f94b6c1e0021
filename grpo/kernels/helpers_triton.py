"""What several Triton twins share: functions of one value that need no libdevice, which the interpreter lacks."""

from __future__ import annotations

import triton
import triton.language as tl


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, which needs no CUDA device."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """tanh(x), without libdevice."""
    # Series below 0.15, where (1 − t)/(1 + t) would lose digits.
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    t = tl.exp(-2 * tl.abs(x))
    size = (1 - t) / (1 + t)
    return tl.where(tl.abs(x) < 0.15, series, tl.where(x < 0, -size, size))


@triton.jit
def log1p(x):  # type: ignore[no-untyped-def]
    """log(1 + x) for x ≥ 0."""
    # 2·atanh(x/(2 + x)) for small x ≥ 0: log(1 + x) would round 1 + x first.
    z = x / (2 + x)
    square = z * z
    series = 2 * z * (1 + square * (1 / 3 + square * (1 / 5 + square / 7)))
    return tl.where(x < 0.1, series, tl.log(1 + x))


@triton.jit
def expm1(x):  # type: ignore[no-untyped-def]
    """exp(x) − 1 for x ≤ 0."""
    # Series above −0.1, where exp(x) − 1 would cancel.
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720)))))
    return tl.where(x > -0.1, series, tl.exp(x) - 1)
