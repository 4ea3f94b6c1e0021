"""Kernels, one pair each: the contract with its plain-torch twin, and the Triton twin under the same signature."""

from grpo.kernels.logprobs import TokenLogprobs, resolve_backend, token_logprobs

__all__ = ["TokenLogprobs", "resolve_backend", "token_logprobs"]
