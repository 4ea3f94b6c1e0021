"""The root mean square norm against float64 autograd on the plain formula, and against transformers' classes."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from grpo.kernels import rows
from grpo.kernels.rmsnorm import rmsnorm
from tests.tolerances import RMSNORM, by_dtype, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

EPS = 1e-5
TOLERANCE = by_dtype(RMSNORM)
WIDTHS = [8, 64, 96, 100, 257, 1000]
ORDERS = [pytest.param(False, id="llama"), pytest.param(True, id="gemma")]


def reference(x, weight, dy, late_cast, eps=EPS):
    """(y, dx, dw) in float64, without rounding x̂."""
    x = x.detach().double().requires_grad_()
    factor = torch.ones(x.shape[-1], device=x.device) if weight is None else weight.detach()
    factor = factor.double().requires_grad_()
    scale = factor + 1 if late_cast and weight is not None else factor
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * scale
    return y.detach(), *torch.autograd.grad(y, (x, factor), dy.double())


def ours(twin, x, weight, dy, late_cast, eps=EPS):
    """(y, dx, dw)."""
    x = x.detach().requires_grad_()
    weight = None if weight is None else weight.detach().requires_grad_()
    settings = {"offset": 1.0, "late_cast": True} if late_cast and weight is not None else {"late_cast": late_cast}
    y = rmsnorm(x, weight, eps, backend=twin.backend, **settings)
    return y, *torch.autograd.grad(y, (x,) if weight is None else (x, weight), dy.to(y.dtype))


def assert_close(values, references, kind=None):
    for value, wanted in zip(values, references, strict=False):
        assert value.shape == wanted.shape
        relative, absolute = TOLERANCE[kind or value.dtype]
        absolute *= max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        torch.testing.assert_close(value.detach().double(), wanted, rtol=relative, atol=absolute)


def case(twin, *shape, dtype=torch.float32):
    x, dy = twin.random(2, *shape).mul(2.5)
    return x.to(dtype), (1 + 0.3 * twin.random(shape[-1])).to(dtype), (-1.7 * dy).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("late_cast", ORDERS)
def test_values_and_gradients(twin, late_cast, dtype):
    for width in WIDTHS:
        for lead in [(1,), (5,), (2, 19)]:
            x, weight, dy = case(twin, *lead, width, dtype=dtype)
            got, wanted = ours(twin, x, weight, dy, late_cast), reference(x, weight, dy, late_cast)
            assert {value.dtype for value in got} == {dtype}
            assert_close(got[:2], wanted[:2])
            # dw sums rows, whose errors do not add up to a step of every sum; x̂ itself was rounded.
            assert relative_error(got[2], wanted[2]) < (2e-6 if dtype == torch.float32 else TOLERANCE[dtype][0])


@pytest.mark.parametrize("late_cast", ORDERS)
def test_float64(late_cast):
    x, weight, dy = (t.double() for t in (torch.randn(7, 33), torch.randn(33), torch.randn(7, 33)))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    settings = {"offset": float(late_cast), "late_cast": late_cast}
    y = rmsnorm(x, weight, EPS, **settings)
    assert_close((y, *torch.autograd.grad(y, (x, weight), dy)), reference(x, weight, dy, late_cast))
    assert torch.autograd.gradcheck(lambda x, w: rmsnorm(x, w, EPS, **settings), (x, weight))


def transformers_norm(late_cast, weight):
    module = (Gemma3RMSNorm if late_cast else LlamaRMSNorm)(len(weight), eps=EPS).to(weight.device)
    module.weight = torch.nn.Parameter(weight.detach().clone())
    return module


@pytest.mark.parametrize("late_cast", ORDERS)
def test_equals_transformers(twin, late_cast):
    x, weight, dy = case(twin, 11, 100)
    module = transformers_norm(late_cast, weight)
    x.requires_grad_()
    theirs = module(x)
    theirs = (theirs, *torch.autograd.grad(theirs, (x, module.weight), dy))
    for value, wanted in zip(ours(twin, x, weight, dy, late_cast), theirs, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("late_cast", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_order_of_rounding(twin, late_cast, dtype):
    """All but the few values that lie between two numbers have transformers' very bits; the other order's a third."""
    if dtype == torch.bfloat16 and (twin.backend, twin.device) == ("triton", "cpu"):
        pytest.skip("the interpreter truncates to bfloat16")
    x, weight, _ = case(twin, 64, 256, dtype=dtype)
    x, weight = x * 0.37, weight * 0.91
    y = ours(twin, x, weight, x, late_cast)[0]
    differs = (y != transformers_norm(late_cast, weight)(x)).float().mean()
    other = (y != transformers_norm(not late_cast, weight - (1 if not late_cast else -1))(x)).float().mean()
    assert differs < 0.005 and other > 0.1


def test_rounded_norm_in_the_weight_gradient(twin):
    """Llama multiplies the rounded x̂, Gemma x̂ itself: one row and a float32 weight, so that dw shows it."""
    x, weight, _ = case(twin, 1, 256, dtype=torch.float16)
    one = torch.ones_like(x)
    rounded = transformers_norm(False, torch.ones_like(weight))(x)[0].float()
    llama, gemma = (ours(twin, x, weight.float(), one, late_cast)[2] for late_cast in (False, True))
    assert (llama != rounded).float().mean() < 0.01 and (gemma != rounded).float().mean() > 0.9


@pytest.mark.parametrize("late_cast", ORDERS)
def test_float32_weight_on_16_bit_rows(twin, late_cast):
    x, weight, dy = case(twin, 5, 96, dtype=torch.float16)
    weight = weight.float() * 1.0001
    y, dx, dw = ours(twin, x, weight, dy, late_cast)
    theirs = transformers_norm(late_cast, weight)(x)
    assert y.dtype == theirs.dtype == (torch.float16 if late_cast else torch.float32)
    assert dw.dtype == torch.float32 and dx.dtype == torch.float16
    torch.testing.assert_close(y, theirs, rtol=2**-10, atol=1e-6)
    wanted = reference(x, weight, dy, late_cast)
    assert_close((y, dx), wanted, torch.float16)
    assert relative_error(dw, wanted[2]) < 2**-10


def test_without_weight(twin):
    x, _, dy = case(twin, 5, 100)
    for late_cast in (False, True):
        assert_close(ours(twin, x, None, dy, late_cast), reference(x, None, dy, late_cast)[:2])


@pytest.mark.parametrize("late_cast", ORDERS)
def test_many_rows_are_summed_once_each(twin, late_cast):
    """More tiles than programs, a last tile and a last program that are not full; a repeat gives the same bits."""
    for height, width in [(331, 64), (200, 257)]:
        x, weight, dy = case(twin, height, width)
        x = x + 1  # a sum that does not cancel
        got = ours(twin, x, weight, dy, late_cast)
        wanted = reference(x, weight, dy, late_cast)
        assert_close(got[:2], wanted[:2])
        assert relative_error(got[2], wanted[2]) < 3e-6
        assert all(torch.equal(a, b) for a, b in zip(got, ours(twin, x, weight, dy, late_cast), strict=True))


def test_frozen_and_trainable(twin):
    x, weight, dy = case(twin, 6, 64)
    wanted = reference(x, weight, dy, False)
    frozen = weight.clone()
    x.requires_grad_()
    rmsnorm(x, frozen, EPS, backend=twin.backend).backward(dy)
    assert frozen.grad is None
    assert_close([x.grad], [wanted[1]])
    trained = weight.clone().requires_grad_()
    rmsnorm(x.detach(), trained, EPS, backend=twin.backend).backward(dy)
    assert_close([trained.grad], [wanted[2]])


def test_zero_rows_and_extremes(twin):
    x, weight, dy = case(twin, 6, 100)
    x[1] = 0
    x[2] *= 1e4
    x[3] *= 1e-6
    x[4, 3:] = 0
    x[5] = 1e4
    for late_cast in (False, True):
        got = ours(twin, x, weight, dy, late_cast)
        assert all(torch.isfinite(value).all() for value in got) and (got[0][1] == 0).all()
        wanted = reference(x, weight, dy, late_cast)
        for row in range(6):
            scale = float(((dy * weight)[row] / (x[row].square().mean() + EPS).sqrt()).abs().max())
            torch.testing.assert_close(got[0][row].double(), wanted[0][row], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(got[1][row].double(), wanted[1][row], rtol=1e-5, atol=4e-6 * scale)


def test_strided_rows(twin):
    wide = twin.random(9, 150)
    for x in (wide[:, 25:125], wide[::2, :100], twin.random(100, 9).T, twin.random(5, 3, 100).transpose(0, 1)):
        weight = twin.random(100)
        dy = twin.random(x.shape[-1]).expand(x.shape)
        assert_close(ours(twin, x, weight, dy, False), reference(x, weight, dy, False))
    x, dy = wide[:, :100], wide[:, 50:]
    assert_close(ours(twin, x, weight, dy, False), reference(x, weight, dy, False))


def test_offsets_of_64_bits(twin, monkeypatch):
    monkeypatch.setattr(rows, "LONG_FROM", 0)
    for shape in [(150, 64), (3, 1000)]:
        x, weight, dy = case(twin, *shape)
        got, wanted = ours(twin, x, weight, dy, False), reference(x, weight, dy, False)
        assert_close(got[:2], wanted[:2])
        assert relative_error(got[2], wanted[2]) < 3e-6


def test_an_offset_of_more_than_2_to_31_elements(twin):
    """The third row's, at a stride that fits 32 bits. On the CPU untouched pages cost no memory."""
    x, weight, dy = case(twin, 3, 64, dtype=torch.bfloat16)
    memory = torch.empty(2**31 + 200, dtype=x.dtype, device=twin.device)
    far = memory.as_strided(x.shape, (2**30 + 24, 1)).copy_(x)
    both = (ours(twin, tensor, weight, dy, False) for tensor in (far, x))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [128, 8192])
def test_more_than_2_to_31_elements(width):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    height = 2**31 // width + 77
    x = torch.empty(height, width, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    weight = torch.ones(width, dtype=torch.bfloat16, device="cuda").requires_grad_()
    y = rmsnorm(x, weight, EPS, backend="triton")
    dx, dw = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    for part in (slice(0, 50), slice(height - 50, height)):
        wanted = reference(x[part], weight, torch.ones_like(x[part]), False)
        assert_close((y[part], dx[part]), wanted[:2])
    wanted = sum(chunk.float().sum(0) for chunk in y.detach().split(height // 64))
    assert relative_error(dw, wanted) < 1e-2


def test_empty(twin):
    x = torch.empty(0, 16, device=twin.device, requires_grad=True)
    weight = torch.ones(16, device=twin.device, requires_grad=True)
    rmsnorm(x, weight, EPS, backend=twin.backend).sum().backward()
    assert x.grad.shape == (0, 16) and (weight.grad == 0).all()


def test_refusals(twin):
    x, weight, _ = case(twin, 4, 6)
    backend = twin.backend
    with pytest.raises(ValueError, match=r"weight: shape \(5,\)"):
        rmsnorm(x, weight[:5], EPS, backend=backend)
    with pytest.raises(ValueError, match="offset: 1.0"):
        rmsnorm(x, weight, EPS, offset=1.0, backend=backend)
    with pytest.raises(ValueError, match="x: torch.int64"):
        rmsnorm(x.long(), weight, EPS, backend=backend)
    with pytest.raises(ValueError, match="weight: torch.float64"):
        rmsnorm(x, weight.double(), EPS, backend=backend)
    if backend == "triton":
        with pytest.raises(ValueError, match="x: rows of 65537"):
            rmsnorm(torch.zeros(1, 65_537, device=twin.device), None, EPS, backend=backend)
