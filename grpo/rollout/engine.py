"""What every rollout engine offers, and what it is asked for. Ids in, ids out: text is decoded once, for people."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from grpo.batch import Prompt, Rollouts
from grpo.config import RolloutConfig
from grpo.seeds import seed_for

Phase = Callable[[str], AbstractContextManager[None]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; `top_p` 1, `top_k` 0 and `min_p` 0 are off.

    `seed` belongs to one rollout; the noise of a sample is a function of (seed, epoch, prompt id, generation, token).
    """

    num_generations: int
    max_completion_length: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop_token_ids: tuple[int, ...]
    seed: int

    @classmethod
    def of(cls, rollout: RolloutConfig, stop_token_ids: tuple[int, ...], seed: int) -> Sampling:
        """As the configuration's rollout section has it."""
        return cls(
            num_generations=rollout.num_generations,
            max_completion_length=rollout.max_completion_length,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
            stop_token_ids=stop_token_ids,
            seed=seed,
        )

    def seed_of(self, prompt: Prompt, generation: int) -> int:
        """62 bits for one sample, of which its noise is a function."""
        return seed_for(self.seed, prompt.epoch, prompt.id, generation)


@dataclass(frozen=True)
class SyncReport:
    """What `load_weights` moved: bytes and seconds (0 where the engine is the policy itself), and how far the engine's
    log-probs are from the policy's afterwards, in nats on average (None: not compared)."""

    policy_version: int
    num_bytes: int
    seconds: float
    probe_gap: float | None = None


def unbilled(name: str) -> AbstractContextManager[None]:
    """The `phase` of an engine that belongs to no run."""
    return nullcontext()


def unseen(done: int, total: int) -> None:
    """The `progress` of an engine that nobody watches."""


class RolloutEngine(Protocol):
    """One way to sample. `policy_version` is −1 before the first `load_weights` and grows by one with each.

    `phase(name)` bills what happens inside ("wake", "sync", "probe", "sleep") to the run's ledger;
    `progress(done, total)` is told of completions during `generate`.
    """

    policy_version: int
    phase: Phase
    progress: Progress

    def awake(self) -> AbstractContextManager[None]:
        """Resources for sampling exist inside this block alone, also when an exception passes."""

    def load_weights(self, policy: Any) -> SyncReport:
        """Bring the engine to the policy's present weights; only inside `awake()`."""

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> Rollouts:
        """`sampling.num_generations` completions for each prompt, in prompt order."""

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Teacher-forced log-probs at temperature 1 of every token but the first, for consistency probes."""

    def unmapped_bytes(self) -> int:
        """Bytes that torch counts as allocated although they are not on the device now."""

    def release(self) -> None:
        """The run is over: leave nothing behind elsewhere (adapters on servers). Sampling may go on after it."""

    def close(self) -> None:
        """Give everything back."""
