"""Rotary position embedding against float64 rotations written as complex numbers, and against transformers."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from grpo.kernels import rows
from grpo.kernels.rope import rope, rotate
from tests.tolerances import ROPE, by_dtype

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

TOLERANCE = by_dtype(ROPE)


def angles(tokens, width, device, dtype=torch.float32):
    """(cos, sin) [T, D] of positions 0 … T − 1, both halves equal."""
    frequency = 100.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    theta = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
    theta = torch.cat((theta, theta), dim=1)
    return theta.cos().to(device, dtype), theta.sin().to(device, dtype)


def reference(x, cos, sin):
    """(x1 + i·x2)·(cos + i·sin) of every head, in float64; x of any shape [T, …] with heads of cos' width."""
    width = cos.shape[1]
    half = width // 2
    heads = x.detach().double().reshape(x.shape[0], -1, width)
    turn = torch.complex(cos.double(), sin.double())[:, None, :half]
    y = torch.complex(heads[..., :half], heads[..., half:]) * turn
    return torch.cat((y.real, y.imag), dim=-1).reshape(x.shape)


def assert_close(values, references):
    for value, wanted in zip(values, references, strict=True):
        assert value.shape == wanted.shape
        relative, absolute = TOLERANCE[value.dtype]
        absolute *= max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(value.detach().double(), wanted, rtol=relative, atol=absolute)


def check(twin, q, k, cos, sin, positions=None):
    """Values and gradients of rope, and rotate's inverse."""
    at = slice(None) if positions is None else positions.long()
    c, s = cos[at], sin[at]
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    out = rope(*leaves, cos, sin, positions=positions, backend=twin.backend)
    assert {x.dtype for x in out} == {q.dtype}
    assert_close(out, [reference(x, c, s) for x in (q, k)])
    upstream = [twin.random(*x.shape).mul(-2.3).to(x.dtype) for x in out]
    wanted = [reference(x, c, -s) for x in upstream]
    assert_close(torch.autograd.grad(out, leaves, upstream), wanted)
    assert_close(rotate(*upstream, cos, sin, positions=positions, inverse=True, backend=twin.backend), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("q_heads, k_heads", [(1, 1), (4, 2), (14, 2), (5, 5), (33, 34)])
def test_values_and_gradients(twin, q_heads, k_heads, dtype):
    for width in (2, 64, 80, 100):
        if q_heads == 33 and width != 64:
            continue
        q = twin.random(3, q_heads * width).to(dtype)
        k = twin.random(3, k_heads, width).flip(0).to(dtype)
        check(twin, q, k, *angles(3, width, twin.device, dtype if width == 80 else torch.float32))


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_positions_that_restart(twin, index_dtype, table_dtype):
    cos, sin = angles(9, 64, twin.device, table_dtype)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 0, 8], dtype=index_dtype, device=twin.device)
    q, k = twin.random(8, 4 * 64), twin.random(8, 2 * 64) + 1
    check(twin, q, k, cos, sin, positions)
    check(twin, q, k, cos, sin, positions.repeat_interleave(2)[::2])
    check(twin, q, k, cos[:, :64], sin[:, :64].T.contiguous().T, positions)


def test_a_position_outside_the_table_is_nan(twin):
    cos, sin = angles(4, 8, twin.device)
    q, k = twin.random(4, 16), twin.random(4, 8)
    q_out, k_out = rope(q, k, cos, sin, positions=torch.tensor([0, 4, 3, -1], device=twin.device), backend=twin.backend)
    for out in (q_out, k_out):
        assert out[[1, 3]].isnan().all() and not out[[0, 2]].isnan().any()


def test_equals_transformers(twin):
    tokens, q_heads, k_heads, width = 7, 6, 2, 100
    cos, sin = angles(tokens, width, twin.device)
    q = twin.random(1, q_heads, tokens, width).requires_grad_()
    k = twin.random(1, k_heads, tokens, width).requires_grad_()
    theirs = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    # Their layout, [1, heads, T, D], is read as it lies.
    ours = rope(q[0].transpose(0, 1), k[0].transpose(0, 1), cos, sin, backend=twin.backend)
    ours = [x.transpose(0, 1)[None] for x in ours]
    upstream = [twin.random(*x.shape) for x in theirs]
    both = [(*out, *torch.autograd.grad(out, (q, k), upstream)) for out in (ours, theirs)]
    for value, wanted in zip(*both, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


def test_strided(twin):
    """Slices of one QKV matrix, every second token, heads apart, a gradient that is one number."""
    width = 20
    cos, sin = angles(5, width, twin.device)
    qkv = twin.random(5, 8 * width + 3)
    check(twin, qkv[:, : 4 * width], qkv[:, 4 * width : 6 * width], cos, sin)
    tokens = twin.random(10, 6, width)
    check(twin, tokens[::2, ::2], tokens[1::2, 3:], cos, sin)
    check(twin, twin.random(3 * width, 5).T, tokens[:5], cos, sin)
    q, k = qkv[:, :width].detach().requires_grad_(), qkv[:, width : 2 * width]
    rope(q, k, cos, sin, backend=twin.backend)[0].sum().backward()
    assert_close([q.grad], [reference(torch.ones_like(q), cos, -sin)])


def test_in_place_on_private_outputs(twin):
    """Written over, the slice between them untouched, and the same gradients; backward keeps what it is given."""
    width = 16
    cos, sin = angles(5, width, twin.device)
    x = twin.random(5, 24).requires_grad_()
    weights = [twin.random(24, heads * width) for heads in (3, 1)]
    wanted = [reference(x.detach() @ w, cos, sin) for w in weights]
    q, k = (x @ w for w in weights)
    q_out, k_out = rope(q, k, cos, sin, in_place=True, backend=twin.backend)
    assert q_out is q and k_out is k
    assert_close((q, k), wanted)
    upstream = [twin.random(*y.shape) for y in (q, k)]
    kept = [u.clone() for u in upstream]
    (dx,) = torch.autograd.grad((q_out, k_out), x, upstream)
    plain = sum(reference(u, cos, -sin) @ w.double().T for u, w in zip(upstream, weights, strict=True))
    torch.testing.assert_close(dx.double(), plain, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(u, before) for u, before in zip(upstream, kept, strict=True))


def test_in_place_on_strided_tensors(twin):
    cos, sin = angles(5, 16, twin.device)
    qkv = twin.random(5, 6 * 16)
    kept = qkv.clone()
    q, k = qkv[:, :48], qkv[:, 64:80].view(5, 1, 16)
    wanted = [reference(x, cos, sin) for x in (q, k)]
    rotate(q, k, cos, sin, in_place=True, backend=twin.backend)
    assert_close((q, k), wanted)
    assert torch.equal(qkv[:, 48:64], kept[:, 48:64]) and torch.equal(qkv[:, 80:], kept[:, 80:])
    back = rotate(q, k, cos, sin, inverse=True, backend=twin.backend)
    assert_close(back, [kept[:, :48].double(), kept[:, 64:80].double().view(5, 1, 16)])
    heads = twin.random(5, 7, 16)
    kept = heads.clone()
    rotate(heads[:, ::2], heads[:, 1:6:4], cos, sin, in_place=True, backend=twin.backend)
    assert_close(
        (heads[:, [0, 2, 4, 6]], heads[:, [1, 5]]), [reference(kept[:, h], cos, sin) for h in ([0, 2, 4, 6], [1, 5])]
    )
    assert torch.equal(heads[:, 3], kept[:, 3])
    with pytest.raises(ValueError, match="q: strides"):
        rotate(twin.random(32, 5).T, k, cos, sin, in_place=True, backend=twin.backend)


def test_autograd_sees_the_write(twin):
    """A tensor that another operation saved, and a leaf, may not be written over."""
    cos, sin = angles(5, 16, twin.device)
    leaf, k = twin.random(5, 16).requires_grad_(), twin.random(5, 16)
    q = leaf * 2
    saved = (q * q).sum()
    rope(q, k, cos, sin, in_place=True, backend=twin.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
    with pytest.raises(RuntimeError, match="leaf"):
        rope(leaf, k, cos, sin, in_place=True, backend=twin.backend)


def test_one_output_unused_and_one_frozen(twin):
    cos, sin = angles(5, 16, twin.device)
    q, k = twin.random(5, 32).requires_grad_(), twin.random(5, 16).requires_grad_()
    upstream = twin.random(5, 32)
    rope(q, k, cos, sin, backend=twin.backend)[0].backward(upstream)
    assert_close([q.grad], [reference(upstream, cos, -sin)])
    assert (k.grad == 0).all()
    q.grad = None
    rope(q, k.detach(), cos, sin, backend=twin.backend)[0].backward(upstream)
    assert_close([q.grad], [reference(upstream, cos, -sin)])


def test_float64():
    cos, sin = angles(4, 6, "cpu", torch.float64)
    q, k = (torch.randn(4, n * 6, dtype=torch.float64, requires_grad=True) for n in (3, 1))
    assert_close(rope(q, k, cos, sin), [reference(x, cos, sin) for x in (q, k)])
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))


def test_offsets_of_64_bits(twin, monkeypatch):
    monkeypatch.setattr(rows, "LONG_FROM", 0)
    cos, sin = angles(9, 20, twin.device)
    q, k = twin.random(4, 5 * 20), twin.random(4, 40)
    check(twin, q, k, cos[:4], sin[:4])
    check(twin, q, k, cos, sin, torch.tensor([0, 8, 2, 0], dtype=torch.int32, device=twin.device))


@pytest.mark.parametrize("far_one", ["q", "k"])
def test_an_offset_of_more_than_2_to_31_elements(twin, far_one):
    """The third token's, at a stride that fits 32 bits. On the CPU untouched pages cost no memory."""
    cos, sin = angles(3, 16, twin.device)
    q, k = twin.random(3, 48).bfloat16(), twin.random(3, 16).bfloat16()
    wanted = [reference(x, cos, sin) for x in (q, k)]
    memory = torch.empty(2**31 + 200, dtype=q.dtype, device=twin.device)
    near = q if far_one == "q" else k
    far = memory.as_strided(near.shape, (2**30 + 24, 1)).copy_(near)
    both = (far, k) if far_one == "q" else (q, far)
    assert_close(rope(*both, cos, sin, backend=twin.backend), wanted)
    rotate(*both, cos, sin, in_place=True, backend=twin.backend)
    assert_close(both, wanted)


@pytest.mark.gpu
def test_more_than_2_to_31_elements():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tokens, width = 2**19 + 5, 128  # 32 heads of 128: 2^31 + 20,480 elements
    cos, sin = angles(1000, width, "cuda")
    positions = torch.arange(tokens, device="cuda") % 1000
    q = torch.empty(tokens, 32 * width, dtype=torch.bfloat16, device="cuda").normal_()
    k = torch.empty(tokens, width, dtype=torch.bfloat16, device="cuda").normal_()
    for part in (slice(0, 50), slice(tokens - 50, tokens)):
        kept = [x[part].clone() for x in (q, k)]
        at = positions[part]
        out = [x[part].clone() for x in rope(q, k, cos, sin, positions=positions, backend="triton")]
        assert_close(out, [reference(x, cos[at], sin[at]) for x in kept])
    rotate(q, k, cos, sin, positions=positions, in_place=True, backend="triton")
    assert_close((q[part], k[part]), [reference(x, cos[at], sin[at]) for x in kept])


def test_empty(twin):
    cos, sin = angles(3, 16, twin.device)
    q = torch.empty(0, 32, device=twin.device, requires_grad=True)
    k = torch.empty(0, 16, device=twin.device)
    rope(q, k, cos[:0], sin[:0], backend=twin.backend)[0].sum().backward()
    assert q.grad.shape == (0, 32)


def test_refusals(twin):
    cos, sin = angles(4, 16, twin.device)
    q, k = twin.random(4, 32), twin.random(4, 16)

    def refused(match, q=q, k=k, cos=cos, sin=sin, **settings):
        with pytest.raises(ValueError, match=match):
            rope(q, k, cos, sin, backend=twin.backend, **settings)

    refused("cos: shape", cos=cos[:, :15], sin=sin[:, :15])
    refused("sin: ", sin=sin[:3])
    refused(r"cos: 3 rows for 4 tokens", cos=cos[:3], sin=sin[:3])
    refused(r"q: shape \(4, 31\)", q=q[:, :31])
    refused(r"k: shape \(3, 16\)", k=k[:3])
    refused("k: torch.bfloat16", k=k.bfloat16())
    refused(r"q: shape \(4, 2, 8\)", q=q.view(4, 2, 16)[..., :8])
    refused("positions: torch.float32", positions=torch.zeros(4, device=twin.device))
    refused("cos, sin: require grad", cos=cos.clone().requires_grad_())
