"""LoRA linears, QKV and the gated MLP: values and gradients against autograd over the plain formulas in float64."""

import dataclasses
import itertools
import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from grpo.kernels import lora_mlp as lora_mlp_module
from grpo.kernels.lora import LoRALinear, lora_linear, lora_qkv
from grpo.kernels.lora_mlp import lora_mlp
from grpo.kernels.nf4 import SCRATCH, dequantize
from tests.kernels.test_nf4 import random_weight
from tests.tolerances import LORA_GRADIENT, LORA_VALUE, by_dtype, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

FLOAT64, FLOAT32, BFLOAT16 = torch.float64, torch.float32, torch.bfloat16
VALUE, GRADIENT = by_dtype(LORA_VALUE), by_dtype(LORA_GRADIENT)
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda e: F.gelu(e, approximate="tanh")}
DTYPES = [(FLOAT64, FLOAT64), (FLOAT32, FLOAT32), (FLOAT32, BFLOAT16), (BFLOAT16, FLOAT32), (BFLOAT16, BFLOAT16)]


def random(*shape, dtype=FLOAT64, device="cpu"):
    return torch.randn(*shape, dtype=FLOAT64).to(device, dtype)


def linear_of(into, out, r=4, dtype=FLOAT64, adapter_dtype=None, bias=True, scale=1.7, nf4=False, device="cpu"):
    """r = 0: no adapter. All parts are of a size that shows in the output."""
    adapter_dtype = adapter_dtype or dtype
    weight = random(out, into, dtype=dtype, device=device) / into**0.5
    if nf4:
        weight = random_weight((out, into), dtype, double=True, device=device)
        weight = dataclasses.replace(weight, absmax_scale=weight.absmax_scale / into**0.5)
    a = random(r, into, dtype=adapter_dtype, device=device).requires_grad_() if r else None
    b = random(out, r, dtype=adapter_dtype, device=device) / max(r, 1) / 5
    return LoRALinear(
        weight,
        random(out, dtype=dtype, device=device) if bias else None,
        a,
        b.requires_grad_() if r else None,
        scale,
    )


def double_of(linear):
    """The same layer with a dense float64 weight and leaves of its own."""

    def leaf(tensor):
        return None if tensor is None else tensor.detach().cpu().double().requires_grad_(tensor.requires_grad)

    weight = linear.weight if isinstance(linear.weight, torch.Tensor) else dequantize(linear.weight, backend="torch")
    return dataclasses.replace(linear, weight=leaf(weight), bias=leaf(linear.bias), a=leaf(linear.a), b=leaf(linear.b))


def plain(x, linear):
    y = x @ linear.weight.t()
    y = y if linear.bias is None else y + linear.bias
    return y if linear.a is None else y + linear.scale * (x @ linear.a.t()) @ linear.b.t()


def plain_qkv(x, *linears):
    return tuple(plain(x, linear) for linear in linears)


def plain_mlp(activation):
    def mlp(x, gate, up, down):
        return plain(ACTIVATIONS[activation](plain(x, gate)) * plain(x, up), down)

    return mlp


def ours_mlp(activation="silu", **settings):
    return lambda x, gate, up, down: lora_mlp(x, gate, up, down, activation, **settings)


def run(function, x, linears, dys):
    """Outputs and the gradients of Σ dY·y in x and every adapter matrix (None: none arrived)."""
    ys = function(x, *linears)
    ys = ys if isinstance(ys, tuple) else (ys,)
    leaves = [x, *(t for linear in linears for t in (linear.a, linear.b) if t is not None)]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    loss = sum((y * dy.to(y.device, y.dtype)).sum() for y, dy in zip(ys, dys, strict=True))
    return ys, leaves, torch.autograd.grad(loss, leaves, allow_unused=True)


def compare(function, reference, x, linears, values=True, factor=1.0, looser=1.0):
    """`function` on (x, linears) against `reference` in float64; returns the gradients."""
    doubles = [double_of(linear) for linear in linears]
    x64 = x.detach().cpu().double().requires_grad_(x.requires_grad)
    shapes = reference(x64, *doubles)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    dys = [random(*y.shape).to(x.dtype).double() * factor for y in shapes]
    ys, leaves, found = run(function, x, linears, dys)
    wanted_ys, _, wanted = run(reference, x64, doubles, dys)
    for y, wanted_y in zip(ys, wanted_ys, strict=True):
        assert y.dtype == x.dtype and y.shape == wanted_y.shape
        assert not values or relative_error(y.detach().cpu(), wanted_y.detach()) < VALUE[x.dtype] * looser
    for leaf, gradient, wanted_gradient in zip(leaves, found, wanted, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        coarse = max(x.dtype, leaf.dtype, key=lambda dtype: GRADIENT[dtype])
        assert relative_error(gradient.cpu(), wanted_gradient) < GRADIENT[coarse] * looser
    return found


def mlp_of(h=6, i=10, ranks=(4, 4, 4), **settings):
    return [linear_of(*size, r, **settings) for size, r in zip([(h, i), (h, i), (i, h)], ranks, strict=True)]


class Recorder(TorchDispatchMode):
    """Shapes of all tensors that operations return, less those on storage that existed before."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.shapes.append(tuple(tensor.shape))
        return out


def saved_by(function):
    """What autograd keeps of `function()`."""
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        result = function()
    return kept, result


# --- 1. one linear, and three ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("r", [0, 1, 4, 16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype, adapter_dtype, r, bias):
    x = random(13, 7, dtype=dtype).requires_grad_()
    compare(lora_linear, plain, x, [linear_of(7, 11, r, dtype, adapter_dtype, bias)])


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (16, 1, 3), (0, 4, 0), (4, 0, 2), (0, 0, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_qkv(dtype, adapter_dtype, ranks, bias):
    x = random(2, 9, 7, dtype=dtype).requires_grad_()
    sizes = zip((12, 5, 4), ranks, (0.5, 2.0, 3.0), strict=True)
    linears = [linear_of(7, out, r, dtype, adapter_dtype, bias, scale) for out, r, scale in sizes]
    compare(lora_qkv, plain_qkv, x, linears)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 4, 7), (0, 7), (3, 0, 7)])
def test_leading_shapes(shape):
    x = random(*shape).requires_grad_()
    compare(lora_linear, plain, x, [linear_of(7, 11)])
    compare(lora_qkv, plain_qkv, x, [linear_of(7, out) for out in (12, 5, 4)])
    for tiles in (1, 3):
        compare(ours_mlp(tiles=tiles), plain_mlp("silu"), x, mlp_of(7))


def test_strided_x_and_expanded_gradient():
    x = random(7, 5).t().requires_grad_()
    linear = linear_of(7, 11)
    compare(lora_linear, plain, x, [linear])
    wanted = torch.autograd.grad(plain(x, double_of(linear)).sum(), x)[0]
    assert torch.allclose(torch.autograd.grad(lora_linear(x, linear).sum(), x)[0], wanted, rtol=0, atol=1e-12)


def test_gradcheck_of_projections():
    x = random(4, 3).requires_grad_()
    linears = [linear_of(3, out, r) for out, r in ((4, 2), (2, 1), (3, 2))]

    def function(x, *adapters):
        pairs = zip(linears, adapters[::2], adapters[1::2], strict=True)
        return lora_qkv(x, *(dataclasses.replace(linear, a=a, b=b) for linear, a, b in pairs))

    assert torch.autograd.gradcheck(function, (x, *(t for linear in linears for t in (linear.a, linear.b))))


@pytest.mark.parametrize("frozen", [set(), {"x"}, {"a"}, {"b"}, {"x", "a"}, {"a", "b"}])
def test_gradients_only_where_asked(frozen):
    for tiles in (1, 2):
        x = random(6, 7).requires_grad_("x" not in frozen)
        for function, reference, linears in [
            (lora_linear, plain, [linear_of(7, 11)]),
            (lora_qkv, plain_qkv, [linear_of(7, out) for out in (12, 5, 4)]),
            (ours_mlp(tiles=tiles), plain_mlp("silu"), mlp_of(7)),
        ]:
            for linear in linears:
                linear.a.requires_grad_("a" not in frozen)
                linear.b.requires_grad_("b" not in frozen)
            compare(function, reference, x, linears)


def test_no_gradient_of_a_frozen_x_is_formed():
    """[T, in] = [13, 7] is the shape of X and of dX alone."""
    for needed in (True, False):
        x, linear = random(13, 7).requires_grad_(needed), linear_of(7, 11)
        y = lora_linear(x, linear)
        with Recorder(x) as recorder:
            y.sum().backward()
        assert ((13, 7) in recorder.shapes) is needed
        mlp = mlp_of(7, 10)
        y = lora_mlp(x, *mlp, "silu")
        dy = torch.ones_like(y)
        with Recorder(x, dy) as recorder:
            y.backward(dy)
        assert ((13, 7) in recorder.shapes) is needed


def test_an_unused_output_costs_nothing():
    x = random(13, 7).requires_grad_()
    linears = [linear_of(7, out) for out in (12, 5, 9)]
    wanted = torch.autograd.grad(plain(x, linears[1]).sum(), [x, linears[1].a, linears[1].b])
    loss = lora_qkv(x, *linears)[1].sum()
    with Recorder() as recorder:
        loss.backward()
    assert (13, 5) in recorder.shapes and not {(13, 12), (13, 9)} & set(recorder.shapes)
    assert [t.grad is None for linear in linears for t in (linear.a, linear.b)] == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    for found, value in zip((x.grad, linears[1].a.grad, linears[1].b.grad), wanted, strict=True):
        assert relative_error(found, value) < 1e-12


@pytest.mark.parametrize("r", [1, 16])
def test_adapter_gradients_are_not_rounded_on_the_way(r):
    """bf16 activations, fp32 adapters: with v and x·Aᵀ exact in bf16, dA and dB are good to fp32."""
    x = torch.randint(-2, 3, (40, 9)).to(BFLOAT16)
    linear = linear_of(9, 12, r, BFLOAT16, FLOAT32, scale=2.0)
    a = torch.zeros(r, 9)
    a[:, :3] = torch.randint(-1, 2, (r, 3))
    linear = dataclasses.replace(linear, a=a.requires_grad_(), b=torch.eye(12, r).requires_grad_())
    dy = random(40, 12, dtype=BFLOAT16)
    _, _, (da, db) = run(lora_linear, x, [linear], [dy])
    _, _, (wanted_a, wanted_b) = run(plain, x.double(), [double_of(linear)], [dy.double()])
    assert relative_error(da, wanted_a) < 1e-6 and relative_error(db, wanted_b) < 1e-6
    assert (da != da.to(BFLOAT16)).any() and (db != db.to(BFLOAT16)).any()


# --- 2. the MLP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tiles", [1, 2, 5, 13])
def test_mlp(dtype, adapter_dtype, activation, tiles):
    x = random(13, 6, dtype=dtype).requires_grad_()
    mlp = mlp_of(dtype=dtype, adapter_dtype=adapter_dtype)
    compare(ours_mlp(activation, tiles=tiles), plain_mlp(activation), x, mlp)


@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("ranks", [*itertools.product((0, 3), repeat=3), (1, 16, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp_with_some_adapters(tiles, ranks, bias):
    x = random(3, 5, 6).requires_grad_()
    compare(ours_mlp(tiles=tiles), plain_mlp("silu"), x, mlp_of(ranks=ranks, bias=bias))


@pytest.mark.parametrize("tiles", [1, 2, 5])
@pytest.mark.parametrize("factor", [1.0, -3e4])
def test_skipped_output_has_exact_gradients(tiles, factor):
    x = random(13, 6).requires_grad_()
    compare(ours_mlp(tiles=tiles, skip_output=True), plain_mlp("silu"), x, mlp_of(), values=False, factor=factor)


def test_skipped_output_does_not_do_the_work():
    """Whole, it makes e and g and nothing of the down projection; tiled, nothing."""
    x, mlp = random(13, 6).requires_grad_(), mlp_of()
    shapes = {}
    for tiles, skip in itertools.product((1, 13), (True, False)):
        with Recorder(x) as recorder:
            lora_mlp(x, *mlp, "silu", tiles=tiles, skip_output=skip)
        shapes[tiles, skip] = recorder.shapes
    assert not {(1, 10), (13, 10)} & set(shapes[13, True]) and (1, 10) in shapes[13, False]
    assert (13, 10) in shapes[1, True]
    down = tuple(mlp[2].a.t().shape)
    assert down in shapes[1, False] and down not in shapes[1, True]


@pytest.mark.parametrize("twin_tiles", [1, 3])
def test_mlp_of_both_twins(twin, twin_tiles):
    x = random(13, 6, dtype=FLOAT32, device=twin.device).requires_grad_()
    mlp = mlp_of(dtype=FLOAT32, device=twin.device, nf4=True)
    compare(ours_mlp(tiles=twin_tiles, backend=twin.backend), plain_mlp("silu"), x, mlp, looser=2)


class Fresh(torch.autograd.Function):
    """`function`, with a graph of its own for every backward: gradcheck asks for many."""

    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return None, *torch.autograd.grad(ctx.function(*inputs), inputs, dy)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tiles", [1, 2])
def test_gradcheck_of_the_mlp(activation, tiles):
    x, mlp = random(5, 3).requires_grad_(), mlp_of(3, 4, (2, 1, 2))

    def function(x, *adapters):
        pairs = zip(mlp, adapters[::2], adapters[1::2], strict=True)
        linears = (dataclasses.replace(linear, a=a, b=b) for linear, a, b in pairs)
        return lora_mlp(x, *linears, activation, tiles=tiles)

    inputs = (x, *(t for linear in mlp for t in (linear.a, linear.b)))
    assert torch.autograd.gradcheck(lambda *tensors: Fresh.apply(function, *tensors), inputs)


@pytest.mark.parametrize("tiles", [1, 3])
def test_a_second_backward_raises(tiles):
    y = lora_mlp(random(6, 6).requires_grad_(), *mlp_of(), "silu", tiles=tiles).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        y.backward()


def test_a_changed_adapter_is_noticed():
    for function, linears in [(lora_linear, [linear_of(6, 5)]), (ours_mlp(), mlp_of()), (ours_mlp(tiles=2), mlp_of())]:
        y = function(random(6, 6), *linears).sum()
        with torch.no_grad():
            linears[0].a.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@pytest.mark.parametrize("tiles", [1, 3])
def test_checkpointed(tiles):
    """Recomputation may skip the output: first pass whole, second one for the gradients alone."""
    passes = []

    def function(x, *linears):
        def layer(x):
            passes.append(len(passes))
            return lora_mlp(x, *linears, "silu", tiles=tiles, skip_output=len(passes) > 1)

        return x + checkpoint(layer, x, use_reentrant=False)

    def reference(x, *linears):
        return x + plain_mlp("silu")(x, *linears)

    compare(function, reference, random(13, 6).requires_grad_(), mlp_of())
    assert len(passes) == 2


def test_without_gradients_the_value_is_the_same():
    x, mlp = random(13, 6), mlp_of()
    wanted = plain_mlp("silu")(x, *mlp)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for tiles in (1, 3):
                assert relative_error(lora_mlp(x, *mlp, "silu", tiles=tiles), wanted.detach()) < 1e-12


# --- 3. memory -------------------------------------------------------------------------------------------------------


def sizes(tensors):
    return sorted(tensor.numel() for tensor in tensors)


def adapter_sizes(linears):
    return [t.numel() for linear in linears for t in (linear.a, linear.b)]


@pytest.mark.parametrize("nf4", [True, False])
def test_what_is_saved(nf4):
    t, h, i = 13, 6, 10
    x = random(t, h, dtype=FLOAT32).requires_grad_()
    qkv = [linear_of(h, out, dtype=FLOAT32, nf4=nf4) for out in (12, 5, 4)]
    mlp = mlp_of(h, i, dtype=FLOAT32, nf4=nf4)
    for function, linears, wanted in [
        (lambda: lora_linear(x, qkv[0]), qkv[:1], [t * h]),
        (lambda: lora_qkv(x, *qkv), qkv, [t * h]),
        (lambda: lora_mlp(x, *mlp, "silu"), mlp, [t * h, t * i, t * i]),
        (lambda: lora_mlp(x, *mlp, "silu", skip_output=True), mlp, [t * h, t * i, t * i]),
        (lambda: lora_mlp(x, *mlp, "silu", tiles=2), mlp, [t * h]),
    ]:
        kept, result = saved_by(function)
        assert sizes(kept) == sorted(wanted + adapter_sizes(linears))
        storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
        assert x.untyped_storage().data_ptr() in storages  # X itself, no copy
        del result


def test_tiles_bound_the_width():
    """No tensor of the MLP's width has more rows than a tile, in forward or backward; X, Y and their gradients do."""
    t, h, i = 13, 6, 10
    x, mlp = random(t, h).requires_grad_(), mlp_of(h, i, (2, 2, 2))
    known = [tensor for linear in mlp for tensor in (linear.weight, linear.bias, linear.a, linear.b)]
    rows = {}
    for tiles in (1, 2, 5):
        with Recorder(*known) as recorder:
            lora_mlp(x, *mlp, "silu", tiles=tiles).sum().backward()
        rows[tiles] = max(shape[0] for shape in recorder.shapes if shape[1:] == (i,))
    assert rows == {1: 13, 2: 7, 5: 3}


class Live(TorchDispatchMode):
    """The most bytes that tensors [*, width] held at one time, the known ones aside."""

    def __init__(self, width, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.width, self.alive, self.peak = width, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == self.width:
            self.alive.append(weakref.ref(out))
        kept = [tensor for tensor in (ref() for ref in self.alive) if tensor is not None]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        self.peak = max(self.peak, sum(size for place, size in storages.items() if place not in self.known))
        self.alive = [weakref.ref(tensor) for tensor in kept]
        return out


@pytest.mark.parametrize(("tiles", "rows"), [(1, 60), (2, 30), (4, 15), (7, 9)])
def test_peak_of_e_g_and_h_is_that_of_one_tile(tiles, rows, monkeypatch):
    """Forward e, g (h over e if free), backward e, g, dh. Without the elementwise step: its torch twin has temporaries."""
    monkeypatch.setattr(lora_mlp_module, "glu_backward_", lambda *_, **__: None)
    monkeypatch.setattr(
        lora_mlp_module, "glu_forward", lambda e, g, a, out=None, backend=None: e.clone() if out is None else out
    )
    x, mlp = random(60, 5).requires_grad_(), mlp_of(5, 23, (0, 0, 0))
    known = [linear.weight for linear in mlp]
    with Live(23, known) as live:
        lora_mlp(x, *mlp, "silu", tiles=tiles).sum().backward()
    assert live.peak == 3 * rows * 23 * 8
    with torch.no_grad(), Live(23, known) as live:
        lora_mlp(x, *mlp, "silu", tiles=tiles)
    assert live.peak == 2 * rows * 23 * 8


@pytest.mark.parametrize("skip_output", [False, True])
def test_no_uninitialised_memory_is_read(skip_output):
    """Deterministic mode fills new memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        test_qkv(FLOAT64, FLOAT64, (4, 0, 2), True)
        test_qkv(FLOAT32, FLOAT32, (4, 1, 2), False)
        test_qkv(BFLOAT16, FLOAT32, (4, 1, 2), False)
        for dtype, tiles in itertools.product((FLOAT64, FLOAT32, BFLOAT16), (1, 5)):
            x = random(13, 6, dtype=dtype).requires_grad_()
            function = ours_mlp(tiles=tiles, skip_output=skip_output)
            compare(function, plain_mlp("silu"), x, mlp_of(dtype=dtype), values=not skip_output)
            assert (
                lora_mlp(x, *mlp_of(dtype=dtype), "silu", tiles=tiles, skip_output=skip_output).isnan().all()
                == skip_output
            )
    finally:
        torch.use_deterministic_algorithms(before)


def test_no_gradient_of_a_weight_is_formed():
    t, h, i = 2, 30, 40
    x, mlp = random(t, h).requires_grad_(), mlp_of(h, i)
    with Recorder(*(linear.weight for linear in mlp)) as recorder:
        lora_mlp(x, *mlp, "silu").sum().backward()
        lora_linear(x, mlp[0]).sum().backward()
    biggest = max(torch.Size(shape).numel() for shape in recorder.shapes)
    assert biggest <= 2 * 4 * i  # Σr × H or r × I, never H × I


# --- 4. NF4 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(FLOAT64, FLOAT64), (FLOAT32, FLOAT32), (BFLOAT16, FLOAT32)])
@pytest.mark.parametrize("r", [0, 4])
def test_nf4(dtype, adapter_dtype, r):
    x = random(13, 7, dtype=dtype).requires_grad_()
    settings = {"dtype": dtype, "adapter_dtype": adapter_dtype, "nf4": True}
    compare(lora_linear, plain, x, [linear_of(7, 11, r, **settings)])
    compare(lora_qkv, plain_qkv, x, [linear_of(7, out, r, **settings) for out in (12, 5, 40)])
    for tiles in (1, 3):
        compare(ours_mlp(tiles=tiles), plain_mlp("silu"), x, mlp_of(7, 10, (r, r, r), **settings))


def test_nf4_layers_share_one_buffer_as_large_as_the_largest():
    SCRATCH.release()
    x = random(13, 6, dtype=FLOAT32).requires_grad_()
    mlp = mlp_of(dtype=FLOAT32, nf4=True)
    q = linear_of(6, 9, dtype=FLOAT32, nf4=True)
    lora_mlp(lora_linear(x, q)[:, :6], *mlp, "silu").sum().backward()
    assert SCRATCH.num_bytes == 6 * 10 * 4


# --- 5. another implementation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [1, 3])
def test_like_peft(tiles):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaMLP

    names = ["gate_proj", "up_proj", "down_proj"]
    module = LlamaMLP(transformers.LlamaConfig(hidden_size=32, intermediate_size=40, hidden_act="silu"))
    wrapped = peft.get_peft_model(
        torch.nn.ModuleDict({"mlp": module}), peft.LoraConfig(r=8, lora_alpha=12, target_modules=names)
    )
    module = wrapped.base_model.model["mlp"]
    linears = []
    for layer in (getattr(module, name) for name in names):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.nn.init.normal_(b, std=0.1)
        linears.append(LoRALinear(layer.base_layer.weight, None, a, b, layer.scaling["default"]))
    x = random(2, 7, 32, dtype=FLOAT32).requires_grad_()
    dys = [random(2, 7, 32, dtype=FLOAT32)]
    (y,), _, found = run(ours_mlp(tiles=tiles), x, linears, dys)
    (wanted_y,), _, wanted = run(lambda x, *_: module(x), x, linears, dys)
    assert relative_error(y.detach(), wanted_y.detach()) < 1e-6
    for gradient, value in zip(found, wanted, strict=True):
        assert relative_error(gradient, value) < 2e-6


# --- 6. what is refused ----------------------------------------------------------------------------------------------


def test_parts_that_do_not_fit_are_refused():
    linear = linear_of(7, 11)
    for changes, message in [
        ({"weight": linear.weight.clone().requires_grad_()}, "weight: requires grad"),
        ({"bias": linear.bias[:5]}, "bias: "),
        ({"bias": linear.bias.clone().requires_grad_()}, "bias: "),
        ({"a": None}, "a: None"),
        ({"b": None}, "b: None"),
        ({"a": linear.a[:, :5]}, "a: shape"),
        ({"b": linear.b[:, :3]}, "b: shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(linear, **changes)


def test_calls_that_do_not_fit_are_refused():
    x, linear, (gate, up, down) = random(5, 7), linear_of(7, 11), mlp_of(7)
    with pytest.raises(ValueError, match="x: shape"):
        lora_linear(random(5, 6), linear)
    with pytest.raises(ValueError, match="weight: torch.float64"):
        lora_linear(x.float(), linear)
    with pytest.raises(ValueError, match="bias: torch.float32"):
        lora_linear(x, dataclasses.replace(linear, bias=linear.bias.float()))
    with pytest.raises(ValueError, match="h: shape"):
        lora_mlp(x, gate, up, linear_of(9, 7), "silu")
    with pytest.raises(ValueError, match="up: weight"):
        lora_mlp(x, gate, linear_of(7, 9), down, "silu")
    with pytest.raises(ValueError, match="tiles: 0"):
        lora_mlp(x, gate, up, down, "silu", tiles=0)


def test_autocast_is_refused_where_it_would_change_the_dtype():
    x, mlp = random(5, 6, dtype=FLOAT32).requires_grad_(), mlp_of(dtype=FLOAT32)
    with torch.autocast("cpu", dtype=BFLOAT16):
        for function in (lambda: lora_linear(x, mlp[0]), lambda: lora_mlp(x, *mlp, "silu")):
            with pytest.raises(ValueError, match="autocast"):
                function()


@pytest.mark.parametrize("tiles", [1, 2])
def test_backward_under_autocast_is_as_outside(tiles):
    x, mlp = random(13, 6, dtype=BFLOAT16).requires_grad_(), mlp_of(dtype=BFLOAT16, adapter_dtype=FLOAT32)
    leaves = [x, *(t for linear in mlp for t in (linear.a, linear.b))]
    wanted = torch.autograd.grad(lora_mlp(x, *mlp, "silu", tiles=tiles).sum(), leaves)
    with torch.autocast("cpu", dtype=BFLOAT16):
        found = torch.autograd.grad(lora_mlp(x, *mlp, "silu", tiles=tiles).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# --- 7. on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("adapter_dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("nf4", [True, False])
@pytest.mark.parametrize("r", [0, 1, 16])
def test_bfloat16_on_a_gpu(adapter_dtype, nf4, r):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    settings = {"dtype": BFLOAT16, "adapter_dtype": adapter_dtype, "nf4": nf4, "device": "cuda"}
    x = random(300, 128, dtype=BFLOAT16, device="cuda").requires_grad_()
    compare(lora_linear, plain, x, [linear_of(128, 192, r, **settings)])
    compare(lora_qkv, plain_qkv, x, [linear_of(128, out, r, **settings) for out in (128, 64, 64)])
    for tiles in (1, 4):
        mlp = mlp_of(128, 320, (r, r, r), **settings)
        compare(ours_mlp(tiles=tiles), plain_mlp("silu"), x, mlp, looser=2.0)  # a product of two rounded projections


@pytest.mark.gpu
def test_float32_adapter_gradients_on_a_gpu_keep_their_digits():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    linear = linear_of(64, 96, 16, BFLOAT16, FLOAT32, scale=2.0, device="cuda")
    eye = torch.eye(96, 16, device="cuda")
    linear = dataclasses.replace(linear, b=eye.requires_grad_())  # v = 2·dY[:, :16], exact in bf16
    x, dy = random(4096, 64, dtype=BFLOAT16, device="cuda"), random(4096, 96, dtype=BFLOAT16)
    _, _, (da, _) = run(lora_linear, x, [linear], [dy])
    wanted = 2 * dy[:, :16].double().t() @ x.cpu().double()
    assert relative_error(da.cpu(), wanted) < 1e-5
