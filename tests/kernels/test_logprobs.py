"""Token log-probs and their gradients: both twins against one unchunked float64 oracle, every path, every knob."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from grpo.algorithm import RECIPES, policy_loss
from grpo.kernels import resolve_backend, scratch_bytes, tile_shape, token_logprobs
from tests.kernels.conftest import Twin
from tests.kernels.oracle import oracle
from tests.tolerances import HIDDEN_GRADIENT, LOGPROBS, relative_error

# The interpreter computes with numpy, which warns of the infinities and NaN that a `where` then discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SETTINGS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "per-token temperature": {"temperature": "rows"},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.25},
    "negative scale": {"logit_scale": -1.5},
    "all": {"bias": True, "temperature": "rows", "softcap": 8.0, "logit_scale": 1.7},
}


def settings_of(twin, name, n, v, dtype=FLOAT32):
    settings = dict(SETTINGS[name])
    if settings.get("bias"):
        settings["bias"] = twin.random(v, dtype=dtype)
    if settings.get("temperature") == "rows":
        settings["temperature"] = 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(3)).to(twin.device)
    return settings


def assert_logprobs(got, wanted, tolerance=LOGPROBS["float32"]):
    """|Δ| ≤ tolerance·(1 + |logp|) on every row, and no log-prob above 0."""
    assert got.logprobs.shape == wanted.logprobs.shape
    assert (got.logprobs <= 0).all()
    assert ((got.logprobs - wanted.logprobs).abs() <= tolerance * (1 + wanted.logprobs.abs())).all()
    assert ((got.lse - wanted.lse).abs() <= tolerance * (1 + wanted.lse.abs())).all()
    if got.entropy is not None:
        assert ((got.entropy - wanted.entropy).abs() <= tolerance * (1 + wanted.lse.abs())).all()


def gradients(out, coefficients, *inputs):
    return torch.autograd.grad((out.logprobs * coefficients).sum(), inputs)


# --- 1. the oracle -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [1, 2, 255, 256, 257, 1000, 1024, 1280, 32000])
@pytest.mark.parametrize("h", [8, 64, 100])
def test_oracle(twin, v, h):
    if (v, h) == (32000, 8):
        pytest.skip("a float32 BLAS product of 32,000 terms and 8 columns is itself off by 1.5e-5")
    tile = (7, 512 if v < 32000 else 16_384)
    for n in (1, 6, 7, 8) if (v < 32000 and h == 64) else (8,):
        hidden, weight, targets = twin.case(n, h, v)
        got = twin(hidden, weight, targets, return_entropy=True, tile=tile)
        wanted = oracle(hidden, weight, targets)
        assert_logprobs(got, wanted)
        c = twin.random(n)
        assert (
            relative_error(gradients(got, c, hidden)[0], gradients(wanted, c, hidden)[0]) < HIDDEN_GRADIENT["float32"]
        )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("path", ["forward", "u", "recompute"])
def test_settings(twin, name, path):
    n, h, v = 9, 32, 300
    hidden, weight, targets = twin.case(n, h, v)
    settings = settings_of(twin, name, n, v)
    bias = settings.get("bias")
    if path == "recompute":
        weight.requires_grad_()
        settings |= {} if bias is None else {"bias": bias.requires_grad_()}
    with torch.set_grad_enabled(path != "forward"):
        got = twin(hidden, weight, targets, return_entropy=True, tile=(4, 64), **settings)
        wanted = oracle(hidden, weight, targets, **settings)
    assert_logprobs(got, wanted)
    assert got.logprobs.requires_grad == (path != "forward")
    if path != "forward":
        c = twin.random(n)
        inputs = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
        for mine, theirs in zip(gradients(got, c, *inputs), gradients(wanted, c, *inputs), strict=True):
            assert relative_error(mine, theirs) < HIDDEN_GRADIENT["float32"]


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("head_trains", [False, True])
def test_entropy_gradient(twin, name, head_trains):
    n, h, v = 9, 32, 300
    hidden, weight, targets = twin.case(n, h, v)
    settings = settings_of(twin, name, n, v)
    inputs = [hidden]
    if head_trains:
        inputs += [weight.requires_grad_()]
        inputs += [settings["bias"].requires_grad_()] if "bias" in settings else []
    got = twin(hidden, weight, targets, return_entropy="grad", tile=(4, 64), **settings)
    wanted = oracle(hidden, weight, targets, **settings)
    for weight_of_logp in (0.0, 1.0):
        c, e = twin.random(n) * weight_of_logp, twin.random(2, n)[1]
        mine, theirs = (
            torch.autograd.grad((x.logprobs * c + x.entropy * e).sum(), inputs, retain_graph=True)
            for x in (got, wanted)
        )
        for a, b in zip(mine, theirs, strict=True):
            assert relative_error(a, b) < HIDDEN_GRADIENT["float32"]


# --- 2. float64: exact formulas (torch twin) -------------------------------------------------------------------------


def float64_case(n=6, h=5, v=70, **changes):
    torch.manual_seed(1)
    hidden = torch.randn(n, h, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(v, h, dtype=torch.float64)
    settings = {
        "bias": torch.randn(v, dtype=torch.float64),
        "temperature": torch.rand(n, dtype=torch.float64) + 0.5,
        "softcap": 3.0,
        "logit_scale": 1.3,
        "tile": (4, 32),
    } | changes
    return hidden, weight, torch.randint(0, v, (n,)), settings


@pytest.mark.parametrize("c", [[0.7, -1.2, 0.0, 3.0, -0.1, 1.0], [0.0] * 6])
def test_u_path_in_float64(c):
    hidden, weight, targets, settings = float64_case()
    got = Twin("torch", "cpu")(hidden, weight, targets, return_entropy=True, **settings)
    del settings["tile"]
    wanted = oracle(hidden, weight, targets, **settings)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    c = torch.tensor(c, dtype=torch.float64)
    assert relative_error(gradients(got, c, hidden)[0], gradients(wanted, c, hidden)[0]) < 1e-12


@pytest.mark.parametrize("entropy", [False, "grad"])
def test_gradcheck_of_the_recompute_path(entropy):
    hidden, weight, targets, settings = float64_case(n=3, h=2, v=5, tile=(2, 3))
    bias = settings.pop("bias").requires_grad_()
    weight.requires_grad_()

    def function(hidden, weight, bias):
        out = Twin("torch", "cpu")(hidden, weight, targets, bias=bias, return_entropy=entropy, **settings)
        return (out.logprobs, out.entropy) if entropy else out.logprobs

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


# --- 3. extremes -----------------------------------------------------------------------------------------------------


def logit_case(twin, logits):
    """Hidden states and weights whose logits are exactly the given [N, V]."""
    logits = torch.as_tensor(logits, dtype=FLOAT32, device=twin.device)
    return torch.eye(len(logits), device=twin.device), logits.T.contiguous()


@pytest.mark.parametrize("which", ["first", "last", "argmax", "argmin"])
def test_extreme_logits(twin, which):
    v = 257
    torch.manual_seed(2)
    one_hot, twice = torch.zeros(v), torch.zeros(v)
    one_hot[100] = 1e4
    twice[[3, 200]] = 50.0
    spread = torch.randn(v).clamp(-1, 1) * 1e4
    rows = torch.stack(
        [spread, torch.zeros(v), torch.full((v,), -1e4), torch.full((v,), 1e4), one_hot, twice, -one_hot]
    )
    hidden, weight = logit_case(twin, rows)
    hidden.requires_grad_()
    targets = {
        "first": torch.zeros(len(rows), dtype=torch.long),
        "last": torch.full((len(rows),), v - 1),
        "argmax": rows.argmax(1),
        "argmin": rows.argmin(1),
    }[which].to(twin.device)
    got = twin(hidden, weight, targets, return_entropy=True)
    wanted = oracle(hidden, weight, targets)
    assert_logprobs(got, wanted)
    c = twin.random(len(rows))
    assert relative_error(gradients(got, c, hidden)[0], gradients(wanted, c, hidden)[0]) < HIDDEN_GRADIENT["float32"]


@pytest.mark.parametrize("head_trains", [False, True])
def test_confident_tokens_keep_their_digits(twin, head_trains):
    """p_y → 1: logp and u, both of size 1 − p_y, to full relative precision, down to 1 − p_y ≈ 1e-13."""
    margins = torch.tensor([5.0, 10.0, 15.0, 20.0, 25.0, 30.0])
    rows = torch.zeros(len(margins), 40)
    rows[:, 11] = margins
    hidden, weight = logit_case(twin, rows)
    hidden.requires_grad_()
    weight.requires_grad_(head_trains)
    targets = torch.full((len(margins),), 11, device=twin.device)
    got = twin(hidden, weight, targets)
    others = 39 * torch.exp(-margins.double()).to(twin.device)
    exact = -torch.log1p(others)
    assert ((got.logprobs - exact) / exact).abs().max() < 3e-6
    diagonal = torch.autograd.grad(got.logprobs.sum(), hidden)[0].diagonal()  # (1 − p_y)·margin
    exact = others / (1 + others) * margins.to(twin.device)
    assert ((diagonal - exact) / exact).abs().max() < 1e-5


@pytest.mark.parametrize("banned", [slice(0, 100), slice(100, 200)])
def test_banned_tokens(twin, banned):
    """A bias of −inf takes tokens out of the distribution."""
    hidden, weight, targets = twin.case(5, 16, 300)
    targets = targets % 50 + 220
    bias = torch.zeros(300, device=twin.device)
    bias[banned] = float("-inf")
    got = twin(hidden, weight, targets, bias=bias, return_entropy=True)
    keep = torch.isfinite(bias)
    shifted = targets - (~keep).sum()
    wanted = oracle(hidden, weight[keep], shifted)
    assert_logprobs(got, wanted)
    c = twin.random(5)
    assert relative_error(gradients(got, c, hidden)[0], gradients(wanted, c, hidden)[0]) < HIDDEN_GRADIENT["float32"]
    forbidden = twin(hidden, weight, torch.full_like(targets, banned.start), bias=bias)
    assert (forbidden.logprobs == -torch.inf).all()


# --- 4. chunks and paths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 512), (5, 64), (5, 256), (11, 128), (12, 256), (12, 257), (13, 64), (13, 258), (128, 512)],
)
def test_any_tile_gives_the_same_numbers(twin, rows, columns):
    n, h, v = 12, 32, 257
    hidden, weight, targets = twin.case(n, h, v)
    one = twin(hidden, weight, targets, return_entropy=True)
    many = twin(hidden, weight, targets, return_entropy=True, tile=(rows, columns))
    for a, b in zip(one, many, strict=True):
        assert ((a - b).abs() <= LOGPROBS["float32"] * (1 + b.abs())).all()
    c = twin.random(n)
    assert relative_error(gradients(many, c, hidden)[0], gradients(one, c, hidden)[0]) < HIDDEN_GRADIENT["float32"]


@pytest.mark.parametrize("step", [-30.0, -1.0, 0.5, 3.0, 30.0])
@pytest.mark.parametrize("target", [0, 70, 299])
def test_a_maximum_that_moves_from_tile_to_tile(twin, step, target):
    """Logits that rise or fall by `step` from each tile to the next: sums and their rescaling stay right."""
    hidden, weight, _ = twin.case(5, 16, 300)
    settings = {"bias": step * (torch.arange(300, device=twin.device) // 64)}
    targets = torch.full((5,), target, device=twin.device)
    got = twin(hidden, weight, targets, return_entropy=True, tile=(3, 64), **settings)
    wanted = oracle(hidden, weight, targets, **settings)
    assert_logprobs(got, wanted)
    c = twin.random(5)
    assert relative_error(gradients(got, c, hidden)[0], gradients(wanted, c, hidden)[0]) < HIDDEN_GRADIENT["float32"]


@pytest.mark.parametrize("jump", [8.0, 60.0, 100.0, 1000.0])
@pytest.mark.parametrize("target", [250, 251])
def test_one_token_far_above_all_tiles_before_it(twin, jump, target):
    """Token 250 rises alone, as the target and beside it: no overflow, lse and entropy too."""
    hidden, weight, _ = twin.case(5, 16, 300)
    bias = torch.zeros(300, device=twin.device)
    bias[250] = jump
    targets = torch.full((5,), target, device=twin.device)
    got = twin(hidden, weight, targets, return_entropy=True, tile=(3, 64), bias=bias)
    wanted = oracle(hidden, weight, targets, bias=bias)
    assert_logprobs(got, wanted)
    c = twin.random(5)
    ours, theirs = gradients(got, c, hidden)[0], gradients(wanted, c, hidden)[0]
    if target == 251 or jump < 60:  # else both are 0 to float32
        assert relative_error(ours, theirs) < HIDDEN_GRADIENT["float32"]
    assert (ours - theirs).abs().max() < 1e-4


def test_shuffled_rows(twin):
    hidden, weight, targets = twin.case(13, 32, 300, requires_grad=False)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0)).to(twin.device)
    straight = twin(hidden, weight, targets, tile=(5, 64)).logprobs
    shuffled = twin(hidden[order], weight, targets[order], tile=(5, 64)).logprobs
    assert ((straight[order] - shuffled).abs() <= LOGPROBS["float32"] * (1 + straight[order].abs())).all()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_all_paths_give_the_same_bits(twin, dtype):
    """Old, reference and policy log-probs of one chunking are equal bit for bit, so the first ratio is exactly 1."""
    hidden, weight, targets = twin.case(13, 32, 300, dtype)
    settings = settings_of(twin, "all", 13, 300, dtype) | {"tile": (5, 128)}
    with torch.no_grad():
        old = twin(hidden, weight, targets, **settings)
    policy = twin(hidden, weight, targets, **settings)
    trained = twin(hidden, weight.clone().requires_grad_(), targets, **settings)
    with_entropy = twin(hidden, weight, targets, return_entropy="grad", **settings)
    for other in (policy, trained, with_entropy):
        assert torch.equal(old.logprobs, other.logprobs)
        assert torch.equal(old.lse, other.lse)
    assert (torch.exp(policy.logprobs - old.logprobs) == 1).all()
    d = old.logprobs - policy.logprobs
    assert (torch.expm1(d) - d).abs().max() < 1e-10  # k3


@pytest.mark.parametrize("v", [1, 64, 1000, 128_256, 151_936])
@pytest.mark.parametrize("h", [1, 64, 2048, 4096, 16_384])
@pytest.mark.parametrize("mib", [0.001, 0.5, 4, 16, 64, 512, 4096])
def test_tile_shape_keeps_within_the_limit(v, h, mib):
    rows, columns = tile_shape(h, v, mib)
    whole = -(-v // 64) * 64
    assert rows == 1 or 6 * rows * (columns + h) <= mib * 2**20
    assert rows < 128 or rows % 128 == 0
    assert 1 <= rows <= 4096 and min(64, whole) <= columns <= whole and columns % 64 == 0
    parts = -(-v // columns)
    assert parts == 1 or v - (parts - 1) * columns > columns - 64 * parts  # equal parts, not a ragged last one
    more_rows, more_columns = tile_shape(h, v, 4 * mib)
    assert more_rows * more_columns >= rows * columns


def test_tile_shapes_of_known_models():
    assert tile_shape(4096, 128_256, 512) == (2048, 32_064)
    assert tile_shape(4096, 128_256, 128) == (1024, 16_064)
    assert tile_shape(4096, 128_256, 16) == (256, 6784)
    assert tile_shape(4096, 128_256, 1) == (34, 1024)
    assert tile_shape(2048, 151_936, 512) == (2048, 38_016)
    assert tile_shape(1024, 151_936, 512) == (4096, 19_008)
    assert scratch_bytes(4096, 128_256) == 2048 * (6 * 32_064 + 6 * 4096 + 16)


# --- 5. any loss on log-probs ----------------------------------------------------------------------------------------

OLD_SHIFT = torch.linspace(-0.4, 0.4, 12)
LOSSES = {
    "clip": lambda lp, old: -torch.minimum((lp - old).exp() * 0.7, (lp - old).exp().clamp(0.8, 1.28) * 0.7).mean(),
    "sequence ratio": lambda lp, old: -((lp[:5] - old[:5]).mean().exp() * 1.1 + (lp[5:] - old[5:]).mean().exp() * -0.3),
    "sequence sum": lambda lp, old: ((lp - old).sum() * 0.1).exp(),
    "k3 with ratio": lambda lp, old: ((lp - lp.detach()).exp() * (torch.expm1(old - lp) - (old - lp))).mean(),
    "square": lambda lp, old: (lp.sum() - old.sum()) ** 2 / 100,
    "cispo": lambda lp, old: -((lp - old).exp().clamp(max=1.1).detach() * lp).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("head_trains", [False, True])
def test_any_loss_against_autograd_over_full_logits(twin, name, head_trains):
    hidden, weight, targets = twin.case(12, 32, 300)
    inputs = (hidden, weight.requires_grad_()) if head_trains else (hidden,)
    got, wanted = twin(hidden, weight, targets, tile=(5, 64)), oracle(hidden, weight, targets)
    old = wanted.logprobs.detach() + OLD_SHIFT.to(twin.device)
    mine = torch.autograd.grad(LOSSES[name](got.logprobs, old), inputs)
    theirs = torch.autograd.grad(LOSSES[name](wanted.logprobs, old), inputs)
    for a, b in zip(mine, theirs, strict=True):
        assert relative_error(a, b) < HIDDEN_GRADIENT["float32"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("head_trains", [False, True])
def test_every_recipe_against_autograd_over_full_logits(twin, recipe, head_trains):
    hidden, weight, targets = twin.case(12, 32, 300)
    inputs = (hidden, weight.requires_grad_()) if head_trains else (hidden,)
    bounds = torch.tensor([0, 5, 12], device=twin.device)
    advantages = torch.tensor([1.1, -0.4], device=twin.device)
    wanted = oracle(hidden, weight, targets)
    others = {
        name: (wanted.logprobs.detach() + OLD_SHIFT.to(twin.device).roll(shift)).float()
        for shift, name in enumerate(("old_logprobs", "reference_logprobs", "sampler_logprobs"))
    }

    def gradient(out):
        loss, _ = policy_loss(recipe, out.logprobs, advantages, bounds, beta=0.1, max_completion_length=8, **others)
        return torch.autograd.grad(loss, inputs)

    for a, b in zip(gradient(twin(hidden, weight, targets, tile=(7, 192))), gradient(wanted), strict=True):
        assert relative_error(a, b) < HIDDEN_GRADIENT["float32"]


@pytest.mark.parametrize("head_trains", [False, True])
def test_a_loss_times_three_gives_gradients_times_three(twin, head_trains):
    hidden, weight, targets = twin.case(6, 16, 100)
    inputs = (hidden, weight.requires_grad_()) if head_trains else (hidden,)
    once = torch.autograd.grad(twin(hidden, weight, targets).logprobs.sum(), inputs)
    thrice = torch.autograd.grad(3 * twin(hidden, weight, targets).logprobs.sum(), inputs)
    for a, b in zip(once, thrice, strict=True):
        assert relative_error(b, 3 * a) < 1e-6


# --- 6. what is kept, what is refused, what does no harm -------------------------------------------------------------


VIEWS = (
    "aten::t",
    "aten::detach",
    "aten::slice.Tensor",
    "aten::as_strided",
    "aten::unsqueeze",
    "aten::select.int",
    "aten::unbind.int",
)


class Allocations(TorchDispatchMode):
    """Shapes of every tensor any operation returns."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and func.name() not in VIEWS:
                self.shapes.append(tuple(x.shape))
        return out


def test_no_grad_and_frozen_head_allocate_only_what_they_need(twin):
    n, h, v = 12, 33, 300
    hidden, weight, targets = twin.case(n, h, v)
    with torch.no_grad(), Allocations() as forward_only:
        twin(hidden, weight, targets, tile=(5, 64))
    assert (n, h) not in forward_only.shapes
    with Allocations() as frozen:
        twin(hidden, weight, targets, tile=(5, 64)).logprobs.sum().backward()
    assert frozen.shapes.count((n, h)) >= 1  # the recorder sees u
    assert (v, h) not in frozen.shapes  # no gradient of the head
    assert all(shape[:1] != (n,) or v not in shape for shape in frozen.shapes)  # no [N, V]
    with Allocations() as trained:
        twin(hidden, weight.requires_grad_(), targets).logprobs.sum().backward()
    assert (v, h) in trained.shapes


def test_second_backward(twin):
    hidden, weight, targets = twin.case(4, 16, 50)
    out = twin(hidden, weight, targets).logprobs
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        out.sum().backward()
    weight.requires_grad_()
    trained = twin(hidden, weight, targets).logprobs  # the recompute path can
    first = torch.autograd.grad(trained.sum(), weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(trained.sum(), weight)[0])


@pytest.mark.parametrize("head_trains", [False, True])
def test_entropy_and_lse_are_constants_unless_asked(twin, head_trains):
    hidden, weight, targets = twin.case(4, 16, 50)
    weight.requires_grad_(head_trains)
    out = twin(hidden, weight, targets, return_entropy=True)
    assert not out.entropy.requires_grad and not out.lse.requires_grad
    asked = twin(hidden, weight, targets, return_entropy="grad")
    assert asked.entropy.requires_grad and not asked.lse.requires_grad
    assert twin(hidden, weight, targets).entropy is None


def test_inputs_are_left_alone(twin):
    hidden, weight, targets = twin.case(6, 16, 50)
    bias, temperature = twin.random(50), torch.full((6,), 0.5, device=twin.device)
    before = [x.clone() for x in (hidden, weight, targets, bias, temperature)]
    for entropy in (True, "grad"):
        settings = {"bias": bias, "temperature": temperature, "softcap": 5.0, "return_entropy": entropy}
        twin(hidden, weight, targets, **settings).logprobs.sum().backward()
    for x, y in zip((hidden, weight, targets, bias, temperature), before, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("bad", [-1, -100, 50, 10**6, 2**40])
@pytest.mark.parametrize("head_trains", [False, True])
def test_a_target_outside_the_vocabulary_is_nan_in_its_row_alone(twin, bad, head_trains):
    hidden, weight, targets = twin.case(6, 16, 50)
    weight.requires_grad_(head_trains)
    good = twin(hidden, weight, targets, return_entropy=True, tile=(4, 16))
    targets[2] = bad
    out = twin(hidden, weight, targets, return_entropy=True, tile=(4, 16))
    keep = torch.tensor([0, 1, 3, 4, 5], device=twin.device)
    assert out.logprobs[2].isnan()
    assert torch.equal(out.logprobs[keep], good.logprobs[keep])
    assert torch.allclose(out.lse, good.lse, rtol=1e-6) and torch.allclose(out.entropy, good.entropy, rtol=1e-5)
    gradient = torch.autograd.grad(out.logprobs.sum(), hidden)[0]
    assert gradient[2].isnan().all()
    wanted = torch.autograd.grad(good.logprobs[keep].sum(), hidden)[0]
    assert relative_error(gradient[keep], wanted[keep]) < HIDDEN_GRADIENT["float32"]


def test_a_nan_hidden_row_stays_in_its_row(twin):
    hidden, weight, targets = twin.case(6, 16, 50, requires_grad=False)
    clean = twin(hidden, weight, targets, return_entropy=True)
    hidden[3] = float("nan")
    hidden[4, 2] = float("inf")
    hidden.requires_grad_()
    out = twin(hidden, weight, targets, return_entropy=True)
    keep = torch.tensor([0, 1, 2, 5], device=twin.device)
    for value, wanted in zip(out, clean, strict=True):
        assert value[3].isnan()
        assert not value[4].isfinite()
        assert torch.equal(value[keep], wanted[keep])
    assert torch.autograd.grad(out.logprobs.sum(), hidden)[0][keep].isfinite().all()


def test_unscored_rows_cannot_leak(twin):
    hidden, weight, targets = twin.case(6, 16, 50, requires_grad=False)
    hidden[[0, 3]] = float("nan")
    hidden.requires_grad_()
    index = torch.tensor([1, 2, 4, 5], device=twin.device)
    out = twin(hidden.index_select(0, index), weight, targets[index])
    assert out.logprobs.isfinite().all()
    gradient = torch.autograd.grad(out.logprobs.sum(), hidden)[0]
    assert gradient[[0, 3]].eq(0).all() and gradient[index].isfinite().all() and gradient[index].ne(0).any()


def test_a_shared_row_adds_its_gradients(twin):
    """With shared prompts one hidden row predicts several targets."""
    hidden, weight, _ = twin.case(3, 16, 50)
    index = torch.tensor([0, 0, 0, 1, 2, 2], device=twin.device)
    wide = twin.random(6).abs().mul(49).long().remainder(50)
    got = twin(hidden.index_select(0, index), weight, wide)
    wanted = oracle(hidden.index_select(0, index), weight, wide)
    c = twin.random(6)
    assert relative_error(gradients(got, c, hidden)[0], gradients(wanted, c, hidden)[0]) < HIDDEN_GRADIENT["float32"]


@pytest.mark.parametrize("entropy", [False, True, "grad"])
@pytest.mark.parametrize("head_trains", [False, True])
def test_no_rows_give_a_differentiable_zero(twin, entropy, head_trains):
    hidden, weight, targets = twin.case(0, 16, 50)
    bias = twin.random(50)
    inputs = [hidden] + ([weight.requires_grad_(), bias.requires_grad_()] if head_trains else [])
    out = twin(hidden, weight, targets, bias=bias, return_entropy=entropy)
    assert out.logprobs.shape == (0,) and out.logprobs.sum().item() == 0
    for x, gradient in zip(inputs, torch.autograd.grad(out.logprobs.sum(), inputs), strict=True):
        assert gradient.shape == x.shape and gradient.eq(0).all()


def test_tied_embeddings_get_the_sum_of_both_gradients(twin):
    _, weight, targets = twin.case(7, 16, 50)
    weight.requires_grad_()
    ids = (targets + 1) % 50

    def gradient(function):
        return torch.autograd.grad(
            function(torch.nn.functional.embedding(ids, weight), weight, targets).logprobs.sum(), weight
        )[0]

    assert relative_error(gradient(twin), gradient(oracle)) < HIDDEN_GRADIENT["float32"]


# --- 7. dtypes, layouts, contexts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("path", ["forward", "u", "recompute"])
def test_bfloat16(twin, name, path):
    """Against float64 on the same bfloat16 values: the logits are never rounded to 16 bits."""
    n, h, v = 12, 64, 1000
    hidden, weight, targets = twin.case(n, h, v, BFLOAT16)
    settings = settings_of(twin, name, n, v, BFLOAT16)
    weight.requires_grad_(path == "recompute")
    with torch.set_grad_enabled(path != "forward"):
        got = twin(hidden, weight, targets, return_entropy=True, tile=(5, 512), **settings)
        wanted = oracle(hidden, weight, targets, **settings)
    assert got.logprobs.dtype == FLOAT32
    assert_logprobs(got, wanted, LOGPROBS["bfloat16" if twin.device == "cuda" else "float32"])
    if path != "forward":
        c = twin.random(n)
        inputs = (hidden, weight) if path == "recompute" else (hidden,)
        for x, mine, theirs in zip(inputs, gradients(got, c, *inputs), gradients(wanted, c, *inputs), strict=True):
            assert mine.dtype == x.dtype
            assert relative_error(mine, theirs) < HIDDEN_GRADIENT["bfloat16"]


def test_float16_is_scored_but_not_trained(twin):
    hidden, weight, targets = twin.case(5, 32, 100, torch.float16)
    with torch.no_grad():
        assert_logprobs(twin(hidden, weight, targets), oracle(hidden, weight, targets), LOGPROBS["bfloat16"])
    with pytest.raises(ValueError, match="float16 gradients underflow"):
        twin(hidden, weight, targets)


@pytest.mark.parametrize("layout", ["columns", "step", "transposed", "expanded"])
def test_any_strides(twin, layout):
    n, h, v = 6, 16, 101
    base = twin.random(2 * n, 2 * h)
    hidden = {
        "columns": base[:n, h:],
        "step": base[::2, ::2],
        "transposed": twin.random(h, n).T,
        "expanded": base[:1, :h].expand(n, h),
    }[layout].detach()
    assert hidden.shape == (n, h) and not hidden.is_contiguous()
    hidden.requires_grad_()
    weight = twin.random(h, v).T
    targets = torch.arange(2 * n, device=twin.device)[::2]
    got, wanted = twin(hidden, weight, targets), oracle(hidden, weight, targets)
    assert_logprobs(got, wanted)
    c = twin.random(n, 2)[:, 1]
    assert relative_error(gradients(got, c, hidden)[0], gradients(wanted, c, hidden)[0]) < HIDDEN_GRADIENT["float32"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_integer_targets(twin, dtype):
    hidden, weight, targets = twin.case(6, 16, 100)
    assert torch.equal(twin(hidden, weight, targets.to(dtype)).logprobs, twin(hidden, weight, targets).logprobs)


def test_rows_of_the_weight_beyond_the_vocabulary_are_never_seen(twin):
    hidden, weight, targets = twin.case(6, 16, 90)
    padded = torch.cat([weight, torch.full((38, 16), 1e6, device=twin.device)])
    padded[100:] = float("nan")
    got, wanted = twin(hidden, padded[:90], targets, return_entropy=True), oracle(hidden, weight, targets)
    assert_logprobs(got, wanted)
    c = twin.random(6)
    assert relative_error(gradients(got, c, hidden)[0], gradients(wanted, c, hidden)[0]) < HIDDEN_GRADIENT["float32"]


@pytest.mark.parametrize("head_trains", [False, True])
def test_autocast_means_16_bit_operands_and_float32_logits(twin, head_trains):
    n, h, v = 8, 64, 300
    hidden, weight, targets = twin.case(n, h, v)
    bias = twin.random(v)
    inputs = [hidden] + ([weight.requires_grad_(), bias.requires_grad_()] if head_trains else [])
    c = twin.random(n)
    with torch.autocast(twin.device, dtype=BFLOAT16):
        got = twin(hidden, weight, targets, bias=bias, return_entropy=True, tile=(5, 64))
        mine = gradients(got, c, *inputs)
    wanted = oracle(hidden.to(BFLOAT16), weight.to(BFLOAT16), targets, bias=bias)
    assert_logprobs(got, wanted, LOGPROBS["bfloat16"])
    for x, a, b in zip(inputs, mine, gradients(wanted, c, *inputs), strict=True):
        assert a.dtype == x.dtype
        assert relative_error(a, b) < HIDDEN_GRADIENT["bfloat16"]


@pytest.mark.filterwarnings("ignore")
def test_compiled_callers(twin):
    hidden, weight, targets = twin.case(6, 16, 50)

    def loss(hidden, function=twin):
        return (function(torch.tanh(hidden) * 2, weight, targets).logprobs * 3).sum()

    compiled = torch.compile(loss, backend="eager")
    got, wanted = compiled(hidden), loss(hidden)
    assert torch.equal(got, wanted)
    mine = torch.autograd.grad(got, hidden)[0]
    assert relative_error(mine, torch.autograd.grad(loss(hidden, oracle), hidden)[0]) < HIDDEN_GRADIENT["float32"]


def test_checkpointed_backbone(twin):
    hidden, weight, targets = twin.case(6, 16, 50)
    layer = torch.nn.Linear(16, 16).to(twin.device)

    def gradient(function, backbone):
        return torch.autograd.grad(function(backbone(hidden), weight, targets).logprobs.sum(), layer.weight)[0]

    kept = gradient(twin, lambda x: layer(x).tanh())
    recomputed = gradient(twin, lambda x: checkpoint(lambda y: layer(y).tanh(), x, use_reentrant=False))
    assert torch.equal(kept, recomputed)
    assert relative_error(kept, gradient(oracle, lambda x: layer(x).tanh())) < HIDDEN_GRADIENT["float32"]


def test_inference_mode(twin):
    hidden, weight, targets = twin.case(6, 16, 50)
    with torch.inference_mode():
        out = twin(hidden, weight, targets, return_entropy=True)
    assert_logprobs(out, oracle(hidden, weight, targets))


# --- refusals --------------------------------------------------------------------------------------------------------


class Sharded(torch.Tensor):
    """Stands for a DTensor or a quantised storage class."""


def refusals():
    h, w, y = torch.zeros(4, 8), torch.zeros(10, 8), torch.zeros(4, dtype=torch.long)
    return {
        "hidden 3-D": ("hidden: shape (1, 4, 8)", (h[None], w, y), {}),
        "hidden integer": ("hidden: torch.int64", (h.long(), w, y), {}),
        "width": (r"lm_head_weight: shape (10, 7) (want [V, 8])", (h, w[:, :7], y), {}),
        "weight 1-D": ("lm_head_weight: shape (8,)", (h, w[0], y), {}),
        "no vocabulary": ("lm_head_weight: shape (0, 8)", (h, w[:0], y), {}),
        "quantised": ("lm_head_weight: torch.uint8", (h, w.to(torch.uint8), y), {}),
        "dtypes": ("lm_head_weight: torch.bfloat16, hidden torch.float32", (h, w.bfloat16(), y), {}),
        "sharded": ("lm_head_weight: Sharded", (h, w.as_subclass(Sharded), y), {}),
        "targets length": ("targets: shape (3,) (want [4])", (h, w, y[:3]), {}),
        "targets floating": ("targets: torch.float32", (h, w, y.float()), {}),
        "targets boolean": ("targets: torch.bool", (h, w, y.bool()), {}),
        "device": ("lm_head_weight: on meta, hidden on cpu", (h, w.to("meta"), y), {}),
        "bias shape": ("bias: shape (9,) (want [10])", (h, w, y), {"bias": torch.zeros(9)}),
        "bias dtype": ("bias: torch.float64", (h, w, y), {"bias": torch.zeros(10, dtype=torch.float64)}),
        "temperature zero": ("temperature: 0", (h, w, y), {"temperature": 0.0}),
        "temperature nan": ("temperature: nan", (h, w, y), {"temperature": float("nan")}),
        "temperature shape": ("temperature: shape (3,)", (h, w, y), {"temperature": torch.ones(3)}),
        "temperature trains": ("temperature: ", (h, w, y), {"temperature": torch.ones(4, requires_grad=True)}),
        "softcap": ("softcap: 0", (h, w, y), {"softcap": 0.0}),
        "scale": ("logit_scale: 0", (h, w, y), {"logit_scale": 0.0}),
        "entropy": ("return_entropy: 'gradient'", (h, w, y), {"return_entropy": "gradient"}),
        "chunk": ("chunk_mb: 0", (h, w, y), {"chunk_mb": 0}),
        "backend": ("backend: unknown 'cuda'", (h, w, y), {"backend": "cuda"}),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_does_not_fit_is_refused_in_one_line(name):
    message, tensors, settings = refusals()[name]
    with pytest.raises(ValueError) as caught:
        token_logprobs(*tensors, **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value) and "want" in str(caught.value)


def test_backend_choice(monkeypatch):
    assert resolve_backend("auto", "cpu") == ("torch", "auto: cpu tensors")
    assert resolve_backend("auto", "cuda") == ("triton", "auto: CUDA")
    assert resolve_backend("auto", "cuda", torch.float64) == ("torch", "auto: float64")
    assert resolve_backend("torch", "cuda") == ("torch", "asked for")
    assert resolve_backend("triton", "cuda") == ("triton", "asked for")
    with pytest.raises(ValueError, match="no float64"):
        resolve_backend("triton", "cuda", torch.float64)
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ValueError, match="cannot run on cpu"):
        resolve_backend("triton", "cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_backend("auto", "cuda") == ("torch", "auto: triton is not installed")
    with pytest.raises(ValueError, match="triton is not installed"):
        resolve_backend("triton", "cuda")
