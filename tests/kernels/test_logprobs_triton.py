"""The row kernel alone: a 16-bit D laid over its own tile, races, sizes beyond 2^31 elements, memory."""

import pytest
import torch

from grpo.kernels import token_logprobs
from grpo.kernels.logprobs import Coefficients, HeadCall, TokenLogprobs, torch_row_step
from tests.kernels.conftest import chunk_mb
from tests.tolerances import HIDDEN_GRADIENT, relative_error

pytest.importorskip("triton")
from grpo.kernels import logprobs_triton

GIB = 2**30
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def head_call(targets, operand_dtype, rows):
    return HeadCall(
        targets=targets,
        temperature=1.0,
        softcap=None,
        logit_scale=1.0,
        with_entropy=True,
        rows_per_tile=rows,
        dtype=operand_dtype,
        operand_dtype=operand_dtype,
        tile_dtype=torch.float32,
        row_step=logprobs_triton.triton_row_step,
    )


def outputs(rows, device):
    return TokenLogprobs(*(torch.empty(rows, device=device) for _ in range(3)))


def skip_unless(device):
    if (device == "cuda") != torch.cuda.is_available():
        pytest.skip(f"not a {device} process")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("v", [1, 50, 4096, 4097, 10_000])
def test_a_16_bit_d_lies_over_its_tile(device, v):
    skip_unless(device)
    n, stride = 3, -(-v // 64) * 64
    raw = torch.randn(n, stride, device=device) * 3
    targets = torch.tensor([0, v - 1, v // 2], device=device)
    call = head_call(targets, torch.bfloat16, n)
    mine, theirs = outputs(n, device), outputs(n, device)
    tile = raw.clone()[:, :v]
    d = logprobs_triton.triton_row_step(tile, None, call, slice(0, n), mine, Coefficients())
    wanted = torch_row_step(raw.clone()[:, :v], None, call, slice(0, n), theirs, Coefficients())
    assert d.data_ptr() == tile.data_ptr() and d.dtype == torch.bfloat16
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    # One bfloat16 step: the interpreter truncates where the device rounds.
    assert torch.allclose(d.float(), wanted.float(), rtol=2**-7, atol=1e-30)


@pytest.mark.gpu
@pytest.mark.parametrize("v", [4096, 5000, 128_256])
def test_overwriting_the_tile_is_no_race(monkeypatch, v):
    """1,000 runs over the tile, each bit for bit what a D in memory of its own gives."""
    skip_unless("cuda")
    n = 1024
    raw = torch.randn(n, -(-v // 64) * 64, device="cuda") * 3
    call = head_call(torch.randint(0, v, (n,), device="cuda"), torch.bfloat16, n)
    out = outputs(n, "cuda")

    def step(tile):
        return logprobs_triton.triton_row_step(tile, None, call, slice(0, n), out, Coefficients())

    with monkeypatch.context() as patch:
        patch.setattr(logprobs_triton, "_over", lambda tile, dtype: torch.empty_like(tile, dtype=dtype))
        apart = step(raw[:, :v])
    wanted_logprobs = out.logprobs.clone()
    tile = torch.empty_like(raw)
    differences = torch.zeros((), dtype=torch.long, device="cuda")
    for _ in range(1000):
        tile.copy_(raw)
        d = step(tile[:, :v])
        assert d.data_ptr() == tile.data_ptr()
        differences += (d.view(torch.int16) != apart.view(torch.int16)).sum()
        differences += (out.logprobs != wanted_logprobs).sum()
    assert differences.item() == 0


@pytest.mark.gpu
def test_more_than_2_to_31_logits_in_one_tile():
    skip_unless("cuda")
    n, h, v = 17_024, 16, 131_072  # 2.2e9 logits, an 8.3 GiB tile
    hidden = torch.randn(n, h, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(v, h, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, v, (n,), device="cuda")
    whole = token_logprobs(hidden, weight, targets, chunk_mb=chunk_mb(n, v))
    parts = token_logprobs(hidden, weight, targets, chunk_mb=chunk_mb(1024, v))
    assert torch.allclose(whole.logprobs, parts.logprobs, rtol=1e-5, atol=1e-4)
    one, other = (torch.autograd.grad(x.logprobs.sum(), hidden)[0] for x in (whole, parts))
    assert relative_error(one, other) < HIDDEN_GRADIENT["bfloat16"]
    assert relative_error(one[-100:], other[-100:]) < HIDDEN_GRADIENT["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["forward", "u", "recompute"])
@pytest.mark.parametrize("v", [32_000, 50_257])
def test_peak_memory_is_the_formula(path, v):
    """Tile + statistics (+ u, which becomes the gradient) (+ dh, dW in float32 and its cast), within 5 %."""
    skip_unless("cuda")
    n_total, h, n = 8192, 1024, 512
    hidden = torch.randn(n_total, h, device="cuda", dtype=torch.bfloat16).requires_grad_(path != "forward")
    weight = torch.randn(v, h, device="cuda", dtype=torch.bfloat16).requires_grad_(path == "recompute")
    targets = torch.randint(0, v, (n_total,), device="cuda")

    def run():
        out = token_logprobs(hidden, weight, targets, return_entropy=True, chunk_mb=chunk_mb(n, v))
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
    formula += 4 * n * (-(-v // 64) * 64) + 12 * n_total
    assert peak <= 1.05 * formula
    assert peak >= 0.5 * formula
