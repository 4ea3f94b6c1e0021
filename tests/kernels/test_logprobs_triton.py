"""The Triton steps alone: 16-bit results laid over their own tile, races, sizes beyond 2^31 elements, memory."""

import pytest
import torch

from grpo.kernels import logprobs_torch, scratch_bytes, token_logprobs
from grpo.kernels.logprobs_tiles import Coefficients, HeadCall, Scratch, TokenLogprobs
from tests.kernels.conftest import Twin
from tests.tolerances import HIDDEN_GRADIENT, relative_error

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpretedFunction

from grpo.kernels import logprobs_triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def skip_unless(device):
    if (device == "cuda") != torch.cuda.is_available():
        pytest.skip(f"not a {device} process")
    if device == "cpu" and not isinstance(logprobs_triton._fold_kernel, InterpretedFunction):
        pytest.fail("triton was imported before TRITON_INTERPRET=1 was set (set it in tests/conftest.py)")


class Step:
    """One fold, and one gradient, of a whole vocabulary [n, v] with bfloat16 results."""

    def __init__(self, n, v, device):
        self.n, self.v = n, v
        self.raw = torch.randn(n, -(-v // 64) * 64, device=device) * 3
        targets = torch.randint(0, v, (n,), device=device)
        dtypes = (torch.bfloat16, torch.bfloat16, torch.float32)
        self.call = HeadCall(targets, 1.0, None, 1.0, True, v, self.raw.shape, *dtypes, logprobs_triton)
        self.given = Coefficients(torch.randn(n, device=device), torch.randn(n, device=device))
        self.out = TokenLogprobs(*(torch.empty(n, device=device) for _ in range(3)))

    def run(self, twin, step):
        hidden = torch.empty(self.n, 8, device=self.raw.device)
        scratch = Scratch.allocate(hidden, self.call, with_product=True, with_sum=True)
        scratch.tile.copy_(self.raw)
        scratch.product.fill_(torch.nan)
        (chunk,) = scratch.chunks(hidden, self.call)
        tile, product = scratch.views(self.n, self.v)
        if step == "fold":
            twin.fold(tile, product, 0, None, self.call, chunk)
            twin.finish(self.call, chunk, self.out, None, None)
        else:
            twin.gradient(tile, product, 0, None, self.call, chunk, self.out, self.given)
        assert scratch.product[:, self.v :].isnan().all()  # nothing outside the tile is written
        return product


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("v", [1, 50, 1024, 4097, 8192])
@pytest.mark.parametrize("step", ["fold", "gradient"])
def test_16_bit_products(device, v, step):
    skip_unless(device)
    case = Step(3, v, device)
    case.run(logprobs_torch, "fold")
    wanted, got = case.run(logprobs_torch, step), case.run(logprobs_triton, step)
    # One bfloat16 step each: the interpreter truncates where the device rounds.
    assert torch.allclose(got.float(), wanted.float(), rtol=2**-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("head_trains", [False, True])
def test_a_thousand_runs_give_the_same_bits(head_trains):
    """No race between programs, streams or buffers that chunks use again."""
    skip_unless("cuda")
    twin = Twin("triton", "cuda")
    hidden, weight, targets = twin.case(300, 64, 5000, torch.bfloat16)
    inputs = (hidden, weight.requires_grad_()) if head_trains else (hidden,)
    first = None
    differences = torch.zeros((), dtype=torch.long, device="cuda")
    for _ in range(1000):
        out = twin(hidden, weight, targets, return_entropy=True, tile=(128, 2048))
        results = (*out, *torch.autograd.grad(out.logprobs.sum(), inputs))
        first = first or [x.clone() for x in results]
        for x, y in zip(results, first, strict=True):
            differences += (x.detach() != y.detach()).sum()
    assert differences.item() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["forward", "u", "recompute"])
def test_more_than_2_to_31_elements(path):
    """Offsets beyond 2^31 in hidden and u [N, H], in weight and dW [V, H], and in one tile [n, w]."""
    skip_unless("cuda")
    n, h, v = 1_050_000, 2112, 8_192  # N·H = 2.2e9
    if path == "recompute":
        n, v = 300, 1_050_000
    hidden = torch.randn(n, h, device="cuda", dtype=torch.bfloat16).requires_grad_(path != "forward")
    weight = (torch.randn(v, h, device="cuda", dtype=torch.bfloat16) * 0.05).requires_grad_(path == "recompute")
    targets = torch.randint(0, v, (n,), device="cuda")
    targets[-1] = v - 1
    last = slice(n - 300, n)
    few_hidden = hidden[last].detach().requires_grad_(path != "forward")
    whole = token_logprobs(hidden, weight, targets)
    few = token_logprobs(few_hidden, weight, targets[last])
    assert torch.allclose(whole.logprobs[last], few.logprobs, rtol=1e-5, atol=1e-4)
    if path == "u":
        whole.logprobs.sum().backward()
        (wanted,) = torch.autograd.grad(few.logprobs.sum(), few_hidden)
        assert relative_error(hidden.grad[last], wanted) < HIDDEN_GRADIENT["bfloat16"]
    if path == "recompute":
        (dw,) = torch.autograd.grad(whole.logprobs.sum(), weight)
        logits = hidden.detach() @ weight[-64:].detach().T
        p = torch.exp(logits.float() - whole.lse[:, None])
        chosen = (targets[:, None] == torch.arange(v - 64, v, device="cuda")).float()
        assert relative_error(dw[-64:], (chosen - p).T @ hidden.detach().float()) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(17_024, 131_072)])
def test_a_tile_of_more_than_2_to_31_logits(monkeypatch, tile):
    skip_unless("cuda")
    twin = Twin("triton", "cuda")
    n, h, v = 17_024, 16, 131_072  # 2.2e9 logits, an 8.3 GiB tile, one block of 131,072 columns a row
    hidden, weight, targets = twin.case(n, h, v, torch.bfloat16)
    whole = twin(hidden, weight, targets, tile=tile)
    parts = twin(hidden, weight, targets)
    assert torch.allclose(whole.logprobs, parts.logprobs, rtol=1e-5, atol=1e-4)
    one, other = (torch.autograd.grad(x.logprobs.sum(), hidden)[0] for x in (whole, parts))
    assert relative_error(one[-100:], other[-100:]) < HIDDEN_GRADIENT["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["forward", "u", "recompute"])
@pytest.mark.parametrize("v", [32_000, 50_257])
@pytest.mark.parametrize("chunk_mb", [512, 16])
def test_peak_memory_is_the_formula(path, v, chunk_mb):
    """Scratch + statistics (+ u, which becomes the gradient) (+ dh, dW in float32 and its cast), within 5 %."""
    skip_unless("cuda")
    n_total, h = 65_536, 2048
    hidden = torch.randn(n_total, h, device="cuda", dtype=torch.bfloat16).requires_grad_(path != "forward")
    weight = torch.randn(v, h, device="cuda", dtype=torch.bfloat16).requires_grad_(path == "recompute")
    targets = torch.randint(0, v, (n_total,), device="cuda")

    def run():
        out = token_logprobs(hidden, weight, targets, return_entropy=True, chunk_mb=chunk_mb)
        if path != "forward":
            out.logprobs.sum().backward()

    run()  # compiles, and lets cuBLAS take its workspace
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    peak = torch.cuda.max_memory_allocated() - before
    formula = {"forward": 0, "u": 2 * n_total * h, "recompute": 2 * n_total * h + 6 * v * h}[path]
    formula += scratch_bytes(h, v, chunk_mb) + 16 * n_total
    assert peak <= 1.05 * formula
    assert peak >= (0.2 if path == "forward" else 0.4) * formula  # the sum and W_y are not there without a gradient
