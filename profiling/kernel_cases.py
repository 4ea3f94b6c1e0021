"""What bench_kernels.py measures: the cases, the methods, and the float64 reference of each case."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from grpo.kernels.glu import glu, glu_backward_, glu_forward
from grpo.kernels.rmsnorm import rmsnorm
from grpo.kernels.rope import rope, rotate
from tests.tolerances import relative_error

CHECKED_ROWS = 64
EPS = 1e-5
EAGER = "eager transformers formula"
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One kernel at one size. Rows are the first dimension of `inputs` (each requires grad) and of the outputs."""

    name: str
    kernel: str  # "rope", "rmsnorm", "silu" or "gelu_tanh"
    inputs: Tensors
    constants: Tensors  # cos and sin; the frozen weight
    upstream: Tensors
    bytes_forward: int
    bytes_backward: int
    check_all_rows: bool = False  # the last input is a weight, whose gradient sums over rows

    def copies(self) -> tuple[Tensors, Tensors]:
        """Fresh inputs and upstream gradients, for methods that write over them."""
        return tuple(x.detach().clone().requires_grad_() for x in self.inputs), tuple(x.clone() for x in self.upstream)


@dataclass(frozen=True)
class Method:
    """One row of a table: `forward(case, inputs)` under autograd, or `in_place(case, inputs, upstream, backward)`."""

    name: str
    forward: Callable[[Case, Tensors], Tensors] | None = None
    in_place: Callable[[Case, Tensors, Tensors, bool], tuple[Tensors, Tensors]] | None = None
    extra_bytes: int = 0  # of the backward pass, beyond the case's

    def both(self, case: Case, inputs: Tensors, upstream: Tensors) -> tuple[Tensors, Tensors]:
        """(outputs, gradients of the inputs)."""
        if self.in_place is not None:
            return self.in_place(case, inputs, upstream, True)
        assert self.forward is not None
        outputs = self.forward(case, inputs)
        return outputs, torch.autograd.grad(outputs, inputs, upstream)

    def only_forward(self, case: Case, inputs: Tensors, upstream: Tensors) -> Tensors:
        with torch.no_grad():
            if self.in_place is not None:
                return self.in_place(case, inputs, upstream, False)[0]
            assert self.forward is not None
            return self.forward(case, inputs)


# --- cases -----------------------------------------------------------------------------------------------------------


class Maker:
    """Random tensors of one device: bfloat16, or float32 on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def rope(self, tokens: int, q_heads: int, k_heads: int, width: int) -> Case:
        q, k, dq, dk = (self.normal(tokens, n, width) for n in (q_heads, k_heads) * 2)
        frequency = 5e5 ** -(torch.arange(0, width, 2, device=self.device) / width)
        theta = (torch.arange(tokens, device=self.device)[:, None] * frequency).repeat(1, 2)
        moved = q.element_size() * (2 * (q.numel() + k.numel()) + tokens * width)
        name = f"RoPE, {tokens:,} tokens, {q_heads} + {k_heads} heads of {width}"
        angles = (theta.cos().to(self.dtype), theta.sin().to(self.dtype))
        return Case(name, "rope", _leaves(q, k), angles, (dq, dk), moved, moved)

    def rmsnorm(self, rows: int, width: int, *, trainable: bool = False) -> Case:
        x, dy, weight = self.normal(rows, width), self.normal(rows, width), 1 + 0.1 * self.normal(width)
        size = x.numel() * x.element_size()
        name = f"RMSNorm, {rows:,} × {width:,}, {'trainable' if trainable else 'frozen'} weight"
        inputs = _leaves(x, weight) if trainable else _leaves(x)
        moved = (2 * size + 4 * rows, 3 * size + 4 * rows)
        return Case(name, "rmsnorm", inputs, () if trainable else (weight,), (dy,), *moved, check_all_rows=trainable)

    def glu(self, rows: int, width: int, activation: str) -> Case:
        e, g, dh = self.normal(rows, width), self.normal(rows, width), self.normal(rows, width)
        size = e.numel() * e.element_size()
        name = f"{ {'silu': 'SwiGLU', 'gelu_tanh': 'GeGLU, tanh'}[activation] }, {rows:,} × {width:,}"
        return Case(name, activation, _leaves(e, g), (), (dh,), 3 * size, 5 * size)


def _leaves(*tensors: Tensor) -> Tensors:
    return tuple(x.requires_grad_() for x in tensors)


def cases(device: torch.device, *, toy: bool) -> dict[str, Callable[[], Case]]:
    """By key for --case; made one at a time, since they are large."""
    make = Maker(device)
    if toy:
        return {
            "rope-toy": lambda: make.rope(6, 4, 2, 16),
            "rmsnorm-toy": lambda: make.rmsnorm(24, 48),
            "rmsnorm-trainable-toy": lambda: make.rmsnorm(24, 48, trainable=True),
            "swiglu-toy": lambda: make.glu(24, 48, "silu"),
            "geglu-toy": lambda: make.glu(24, 48, "gelu_tanh"),
        }
    return {
        "rope-short": lambda: make.rope(2 * 512, 32, 8, 128),
        "rope-long": lambda: make.rope(20_480, 32, 8, 128),
        "rmsnorm-short": lambda: make.rmsnorm(1024, 4096),
        "rmsnorm-long": lambda: make.rmsnorm(20_480, 4096),
        "rmsnorm-long-trainable": lambda: make.rmsnorm(20_480, 4096, trainable=True),
        "qknorm-long": lambda: make.rmsnorm(20_480 * 16, 128),
        "qknorm-long-trainable": lambda: make.rmsnorm(20_480 * 16, 128, trainable=True),
        "swiglu-short": lambda: make.glu(1024, 14_336, "silu"),
        "swiglu-long": lambda: make.glu(20_480, 14_336, "silu"),
        "geglu-short": lambda: make.glu(1024, 14_336, "gelu_tanh"),
        "geglu-long": lambda: make.glu(20_480, 14_336, "gelu_tanh"),
    }


# --- methods ---------------------------------------------------------------------------------------------------------


def ours(backend: str) -> Method:
    def run(case: Case, inputs: Tensors) -> Tensors:
        if case.kernel == "rope":
            return rope(*inputs, *case.constants, backend=backend)
        if case.kernel == "rmsnorm":
            return (rmsnorm(*inputs, *case.constants, EPS, backend=backend),)
        return (glu(*inputs, case.kernel, backend=backend),)

    return Method(f"ours, {backend}", run)


def ours_in_place(case: Case, backend: str) -> Method:
    """As the fused layers call them: q and k written over; h, dg and de written over dh, g and e."""

    def rotation(case: Case, inputs: Tensors, upstream: Tensors, backward: bool) -> tuple[Tensors, Tensors]:
        outputs = rotate(*inputs, *case.constants, in_place=True, backend=backend)
        return outputs, rotate(*upstream, *case.constants, inverse=True, backend=backend) if backward else ()

    def unit(case: Case, inputs: Tensors, upstream: Tensors, backward: bool) -> tuple[Tensors, Tensors]:
        (e, g), (dh,) = inputs, upstream
        h = glu_forward(e, g, case.kernel, backend=backend)
        if backward:
            glu_backward_(dh, e, g, case.kernel, backend=backend)
        return (h,), (e, g)

    if case.kernel == "rope":
        return Method(f"ours, {backend}, in place", in_place=rotation)
    h_bytes = case.upstream[0].numel() * case.upstream[0].element_size()
    return Method(f"ours, {backend}, in place", in_place=unit, extra_bytes=h_bytes)


def _rope_formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
    q, k = apply_rotary_pos_emb(q[None].transpose(1, 2), k[None].transpose(1, 2), cos[None], sin[None])
    return q.transpose(1, 2)[0], k.transpose(1, 2)[0]


def _rmsnorm_formula(x: Tensor, weight: Tensor) -> Tensors:
    exact = x.float()
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + EPS)
    return (weight * exact.to(x.dtype),)


def _swiglu_formula(e: Tensor, g: Tensor) -> Tensors:
    return (torch.nn.functional.silu(e) * g,)


def _geglu_formula(e: Tensor, g: Tensor) -> Tensors:
    return (torch.nn.functional.gelu(e, approximate="tanh") * g,)


FORMULAS: dict[str, Callable[..., Tensors]] = {
    "rope": _rope_formula,
    "rmsnorm": _rmsnorm_formula,
    "silu": _swiglu_formula,
    "gelu_tanh": _geglu_formula,
}


@functools.cache
def _compiled(kernel: str) -> Callable[..., Tensors]:
    return torch.compile(FORMULAS[kernel], dynamic=False)


def eager(case: Case, inputs: Tensors) -> Tensors:
    return FORMULAS[case.kernel](*inputs, *case.constants)


def compiled(case: Case, inputs: Tensors) -> Tensors:
    return _compiled(case.kernel)(*inputs, *case.constants)


def liger(case: Case, inputs: Tensors) -> Tensors:
    if case.kernel == "rope":
        from liger_kernel.ops.rope import LigerRopeFunction

        q, k = (x[None].transpose(1, 2) for x in inputs)
        q, k = LigerRopeFunction.apply(q, k, *(x[None] for x in case.constants))
        return q.transpose(1, 2)[0], k.transpose(1, 2)[0]
    if case.kernel == "rmsnorm":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # offset 0, rounding as Llama's, upstream gradient kept.
        return (LigerRMSNormFunction.apply(*inputs, *case.constants, EPS, 0.0, "llama", False),)
    if case.kernel == "silu":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return (LigerSiLUMulFunction.apply(*inputs),)
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return (LigerGELUMulFunction.apply(*inputs),)


def methods(case: Case) -> list[Method]:
    """The rows of a case, ours first."""
    in_place = [] if case.kernel == "rmsnorm" else [ours_in_place(case, "triton")]
    return [
        ours("triton"),
        *in_place,
        ours("torch"),
        Method(EAGER, eager),
        Method("torch.compile of it", compiled),
        Method("Liger", liger),
    ]


# --- reference -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """Outputs and gradients of some rows in float64."""

    rows: Tensor
    outputs: Tensors
    gradients: Tensors

    @staticmethod
    def of(case: Case) -> Reference:
        total = len(case.inputs[0])
        step = 1 if case.check_all_rows else max(1, total // CHECKED_ROWS)
        rows = torch.arange(0, total, step, device=case.inputs[0].device)
        inputs = tuple(_of_rows(x, rows, total).detach().double().requires_grad_() for x in case.inputs)
        constants = (_of_rows(x, rows, total).double() for x in case.constants)
        outputs = _exact(case.kernel, *inputs, *constants)
        gradients = torch.autograd.grad(outputs, inputs, [x[rows].double() for x in case.upstream])
        return Reference(rows, tuple(x.detach() for x in outputs), gradients)

    def errors(self, outputs: Tensors, gradients: Tensors) -> dict[str, float]:
        """The worst relative error of an output and of a gradient."""
        total = len(outputs[0])

        def worst(values: Tensors, wanted: Tensors) -> float:
            pairs = zip(values, wanted, strict=True)
            return max(relative_error(_of_rows(x.detach(), self.rows, total), y) for x, y in pairs)

        return {"output_error": worst(outputs, self.outputs), "gradient_error": worst(gradients, self.gradients)}


def _of_rows(tensor: Tensor, rows: Tensor, total: int) -> Tensor:
    """A weight [H] has no rows (no case has H equal to its number of rows)."""
    return tensor[rows] if len(tensor) == total else tensor


def _exact(kernel: str, *tensors: Tensor) -> Tensors:
    """The plain formulas in the inputs' dtype, without any rounding."""
    if kernel == "rope":
        q, k, cos, sin = tensors
        return tuple(x * cos[:, None] + torch.cat((-_half(x, 1), _half(x, 0)), -1) * sin[:, None] for x in (q, k))
    if kernel == "rmsnorm":
        x, weight = tensors
        return (x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight,)
    e, g = tensors
    if kernel == "silu":
        return (e * torch.sigmoid(e) * g,)
    return (e / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (e + 0.044715 * e**3))) * g,)


def _half(x: Tensor, which: int) -> Tensor:
    return x.chunk(2, -1)[which]
