"""Counter-based random numbers: a value is a function of its key and counter, never of what was drawn before.

That makes sampling independent of batch order and of restarts: the noise of token t of one completion is
f(run seed, step, prompt, generation, t). Keys come from SHA-256, counters through SplitMix64 (Steele et al. 2014).
torch is imported where it is used: worker processes of rewards come here for seeds alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def seed_for(*key: int | str) -> int:
    """A 62-bit seed from any key, e.g. `seed_for(run_seed, "rollout", step, prompt_id, generation)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def uniforms(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """float64 uniforms in [0, 1), one per pair of `seeds` and `counters` (broadcast), 53 random bits each."""
    with np.errstate(over="ignore"):
        z = seeds.astype(np.uint64) + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX1
        z = (z ^ (z >> np.uint64(27))) * _MIX2
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(size: int, seed: int, epoch: int) -> list[int]:
    """The order of rows in `epoch`: f(seed, epoch), so that a resumed second epoch has its own order."""
    order = list(range(size))
    random.Random(seed_for(seed, "permutation", epoch)).shuffle(order)
    return order


# --- the generators of the process -----------------------------------------------------------------------------------


def generators() -> dict[str, Tensor]:
    """States of torch (CPU and every CUDA device), numpy and `random`, as tensors."""
    import torch

    version, internal, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = legacy
    states = {
        "torch": torch.get_rng_state(),
        "random": torch.tensor([version, *internal], dtype=torch.int64),
        "random_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy_keys": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_generators(states: Mapping[str, Tensor]) -> None:
    """Put back what `generators` returned."""
    import torch

    torch.set_rng_state(states["torch"].cpu())
    version, *internal = states["random"].tolist()
    gauss = states["random_gauss"].tolist()
    random.setstate((version, tuple(internal), gauss[0] if gauss else None))
    position, has_gauss = states["numpy_position"].tolist()
    keys = states["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, states["numpy_gauss"].item()))
    for key, state in states.items():
        if key.startswith("cuda:") and torch.cuda.is_available():
            torch.cuda.set_rng_state(state.cpu(), int(key.removeprefix("cuda:")))


@contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever draws from or reseeds the process's generators inside the block leaves them as they were."""
    before = generators()
    try:
        yield
    finally:
        restore_generators(before)
