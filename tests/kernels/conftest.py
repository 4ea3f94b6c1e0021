"""The twins under test. Without a CUDA device Triton runs in its interpreter, which has to be asked for before import."""

from dataclasses import dataclass

import pytest
import torch

from grpo.kernels import TokenLogprobs, logprobs, token_logprobs


@dataclass(frozen=True)
class Twin:
    """One back end on one device: call it as `token_logprobs`."""

    backend: str
    device: str

    def __call__(self, hidden, weight, targets, *, tile=None, **settings) -> TokenLogprobs:
        """`tile`: rows and columns of the tiles of logits, instead of what `tile_shape` would choose."""
        with pytest.MonkeyPatch.context() as patch:
            if tile is not None:
                patch.setattr(logprobs, "tile_shape", lambda *_: tile)
            return token_logprobs(hidden, weight, targets, backend=self.backend, **settings)

    def case(self, n, h, v, dtype=torch.float32, spread=1.0, requires_grad=True):
        """Random (hidden [n, h], weight [v, h], targets [n]); logits have standard deviation about 3·spread."""
        generator = torch.Generator().manual_seed(1000 * n + 10 * v + h)
        hidden = torch.randn(n, h, generator=generator, dtype=torch.float64) * spread
        weight = torch.randn(v, h, generator=generator, dtype=torch.float64) * (3 / h**0.5)
        targets = torch.randint(0, v, (n,), generator=generator)
        hidden, weight = (x.to(self.device, dtype) for x in (hidden, weight))
        return hidden.requires_grad_(requires_grad), weight, targets.to(self.device)

    def random(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(self.device, dtype)


TWINS = [
    pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(("triton", "cpu"), id="triton-interpreted"),
    pytest.param(("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=TWINS)
def twin(request) -> Twin:
    backend, device = request.param
    if backend == "triton":
        triton = pytest.importorskip("triton")
        if device == "cpu" and not torch.cuda.is_available() and isinstance(triton.language.sum, triton.JITFunction):
            pytest.fail("triton was imported before TRITON_INTERPRET=1 was set (set it in tests/conftest.py)")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if (backend, device) == ("triton", "cpu") and torch.cuda.is_available():
        pytest.skip("Triton is compiled, not interpreted, in a process with a CUDA device")
    return Twin(backend, device)
