"""Kernels, one pair each: the contract with its plain-torch twin, and the Triton twin under the same signature."""

from grpo.kernels.backend import resolve_backend
from grpo.kernels.logprobs import token_logprobs
from grpo.kernels.logprobs_tiles import TokenLogprobs, scratch_bytes, tile_shape

__all__ = ["TokenLogprobs", "resolve_backend", "scratch_bytes", "tile_shape", "token_logprobs"]
