"""Gated linear units against float64 autograd on the plain formulas."""

import math

import pytest
import torch
from transformers.activations import ACT2FN

from grpo.kernels import rows
from grpo.kernels.glu import ACTIVATIONS, glu, glu_backward_, glu_forward
from tests.tolerances import GLU, by_dtype

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

TOLERANCE = by_dtype(GLU)
NAME_IN_TRANSFORMERS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def act(e, activation):
    if activation == "silu":
        return e / (1 + torch.exp(-e))
    if activation == "gelu":
        return e * torch.special.erfc(-e / math.sqrt(2)) / 2
    return e / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (e + 0.044715 * e**3)))


def reference(e, g, dh, activation):
    """(h, de, dg) in float64."""
    e, g = (x.detach().double().requires_grad_() for x in (e, g))
    h = act(e, activation) * g
    return h.detach(), *torch.autograd.grad(h, (e, g), dh.double())


def assert_close(values, references):
    for value, wanted in zip(values, references, strict=True):
        assert value.shape == wanted.shape
        relative, absolute = TOLERANCE[value.dtype]
        scale = max(1.0, float(wanted.abs().max())) if value.dtype.itemsize >= 4 else 1.0
        torch.testing.assert_close(value.detach().double(), wanted, rtol=relative, atol=absolute * scale)


def case(twin, *shape, dtype=torch.float32):
    """(e, g, dh) of standard deviation 3, 1 and 3.7."""
    return tuple(twin.random(3, *shape).mul(s)[i].to(dtype) for i, s in enumerate((3.0, 1.0, -3.7)))


def autograd(twin, e, g, dh, activation):
    e, g = (x.detach().requires_grad_() for x in (e, g))
    h = glu(e, g, activation, backend=twin.backend)
    return h, *torch.autograd.grad(h, (e, g), dh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(twin, activation, dtype):
    for shape in [(1,), (5, 8), (2, 3, 100), (3, 257), (4, 1000)]:
        e, g, dh = case(twin, *shape, dtype=dtype)
        wanted = reference(e, g, dh, activation)
        got = autograd(twin, e, g, dh, activation)
        assert {x.dtype for x in got} == {dtype}
        assert_close(got, wanted)
        buffers = [x.clone() for x in (dh, e, g)]
        glu_backward_(*buffers, activation, backend=twin.backend)  # dh ← h, e ← de, g ← dg
        assert_close(buffers, wanted)
        out = torch.full_like(e, torch.nan)
        assert glu_forward(e, g, activation, out=out, backend=twin.backend) is out
        assert torch.equal(out, got[0]) and torch.equal(out, buffers[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64(activation):
    e, g, dh = (x.double() for x in torch.randn(3, 7, 33))
    e, g = e.requires_grad_(), g.requires_grad_()
    h = glu(e, g, activation)
    assert_close((h, *torch.autograd.grad(h, (e, g), dh)), reference(e, g, dh, activation))
    assert torch.autograd.gradcheck(lambda e, g: glu(e, g, activation), (e, g))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_transformers(twin, activation):
    e, g, dh = case(twin, 6, 100)
    e.requires_grad_()
    theirs = ACT2FN[NAME_IN_TRANSFORMERS[activation]](e) * g
    ours = glu(e, g, activation, backend=twin.backend)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    gradients = [torch.autograd.grad(h, e, dh)[0] for h in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_slope_to_a_millionth(twin, activation):
    e = torch.linspace(-12, 12, 4001, device=twin.device)
    one = torch.ones_like(e)
    h, slope, _ = autograd(twin, e, one, one, activation)
    wanted_h, wanted_slope, _ = reference(e, one, one, activation)
    assert ((h - wanted_h).abs() <= 1e-6 * e.abs().clamp(min=1)).all()
    assert ((slope - wanted_slope).abs() <= 1e-6 * e.abs().clamp(min=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(twin, activation, dtype):
    sizes = torch.tensor([0.0, 1e-30, 1e-8, 9.0, 20.0, 88.0, 104.0, 1e3, 1e4], device=twin.device)
    e = torch.cat((sizes, -sizes)).to(dtype)
    g, dh = torch.full_like(e, 2.0), torch.full_like(e, -3.0)
    got = autograd(twin, e, g, dh, activation)
    assert all(torch.isfinite(x).all() for x in got)
    large = e.abs() >= 20  # there the function is e or 0; relative errors, also where e is 1e4
    for value, wanted in zip(got, reference(e.float(), g, dh, activation), strict=True):
        wanted = wanted.nan_to_num(0.0)  # the plain formula's own 0·inf
        torch.testing.assert_close(value.double()[large], wanted[large], rtol=2**-7, atol=1e-6)
    assert_close(got, [x.nan_to_num(0.0) for x in reference(e, g, dh, activation)])


def test_strided_rows(twin):
    """Two slices of one matrix, a transposed factor, and an upstream gradient that is one number."""
    both = twin.random(9, 2 * 33 + 5)
    for e, g in [(both[:, :33], both[:, 33:66]), (both[:, :33], twin.random(33, 9).T), (both[::2, 2:], both[1::2, 2:])]:
        g = g[: len(e)]
        e = e[: len(g)]
        dh = twin.random(1).expand(e.shape)
        assert_close(autograd(twin, e, g, dh, "silu"), reference(e, g, dh, "silu"))


def test_in_place_on_strided_rows_writes_nothing_else(twin):
    both = twin.random(3, 6, 40)
    kept = both.clone()
    dh, e, g = (x[:, 3:36] for x in both)
    wanted = reference(e, g, dh, "gelu")
    glu_backward_(dh, e, g, "gelu", backend=twin.backend)
    assert_close((dh, e, g), wanted)
    assert torch.equal(both[..., :3], kept[..., :3]) and torch.equal(both[..., 36:], kept[..., 36:])


def test_one_of_two_needs_a_gradient(twin):
    e, g, dh = case(twin, 4, 20)
    _, wanted_de, wanted_dg = reference(e, g, dh, "silu")
    for index, wanted in enumerate((wanted_de, wanted_dg)):
        inputs = [e.clone(), g.clone()]
        inputs[index].requires_grad_()
        glu(*inputs, "silu", backend=twin.backend).backward(dh)
        assert_close([inputs[index].grad], [wanted])
        assert inputs[1 - index].grad is None


def test_offsets_of_64_bits(twin, monkeypatch):
    monkeypatch.setattr(rows, "LONG_FROM", 0)
    for shape in [(3, 700), (6, 40)]:
        e, g, dh = case(twin, *shape)
        assert_close(autograd(twin, e, g, dh, "silu"), reference(e, g, dh, "silu"))
        e = twin.random(shape[0], shape[1] + 3)[:, 3:]
        assert_close(autograd(twin, e, g, dh, "silu"), reference(e, g, dh, "silu"))


def test_an_offset_of_more_than_2_to_31_elements(twin):
    """The third row's, at a stride that fits 32 bits. On the CPU untouched pages cost no memory."""
    e, g, dh = case(twin, 3, 40, dtype=torch.bfloat16)
    memory = torch.empty(2**31 + 200, dtype=e.dtype, device=twin.device)
    far = memory.as_strided(e.shape, (2**30 + 24, 1)).copy_(e)
    wanted = reference(e, g, dh, "silu")
    assert_close(autograd(twin, far, g, dh, "silu"), wanted)
    glu_backward_(dh, far, g, "silu", backend=twin.backend)
    assert_close((dh, far, g), wanted)


@pytest.mark.gpu
def test_more_than_2_to_31_elements():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    n = 2**31 + 5_000
    e, g, dh = (torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(3))
    last = slice(n - 10_000, n)
    wanted = reference(e[last], g[last], dh[last], "silu")
    head = reference(e[:10_000], g[:10_000], dh[:10_000], "silu")
    glu_backward_(dh, e, g, "silu", backend="triton")
    assert_close((dh[last], e[last], g[last]), wanted)
    assert_close((dh[:10_000], e[:10_000], g[:10_000]), head)


def test_empty(twin):
    e = torch.empty(0, 16, device=twin.device, requires_grad=True)
    h = glu(e, torch.empty(0, 16, device=twin.device), "silu", backend=twin.backend)
    h.sum().backward()
    assert h.shape == e.grad.shape == (0, 16)


def test_autograd_refuses_buffers_it_saved(twin):
    e, g, dh = case(twin, 4, 20)
    e.requires_grad_()
    h = glu(e, g, "silu", backend=twin.backend)
    glu_backward_(dh.clone(), e, g, "silu", backend=twin.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.backward(dh)


def test_refusals(twin):
    e = twin.random(4, 6)
    backend = twin.backend
    with pytest.raises(ValueError, match="activation: unknown 'relu'"):
        glu(e, e, "relu", backend=backend)
    with pytest.raises(ValueError, match=r"g: .*\(4, 5\).*want all alike"):
        glu(e, e[:, :5], "silu", backend=backend)
    with pytest.raises(ValueError, match="g: torch.bfloat16"):
        glu(e, e.bfloat16(), "silu", backend=backend)
    with pytest.raises(ValueError, match="e: torch.int64"):
        glu(e.long(), e.long(), "silu", backend=backend)
    with pytest.raises(ValueError, match="out: "):
        glu_forward(e, e, "silu", out=e.double(), backend=backend)


@pytest.mark.parametrize("wrong", [lambda: torch.zeros(6, 4).T, lambda: torch.zeros(1, 6).expand(4, 6)])
def test_in_place_needs_rows_of_its_own(wrong):
    with pytest.raises(ValueError, match="g: strides"):
        rows.view_rows(wrong(), "g")
