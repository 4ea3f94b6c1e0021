"""One policy update on made-up rollouts: the tokens, and forward + backward over them as in trainer/update.py.

A row has 256 prompt tokens (half of it where it is shorter than 512) and the rest completion; ids, advantages and
reference log-probs are random, the latter some 4 below the policy's: no token's KL comes near 10, where Unsloth cuts it
off. The loss is GRPO's with beta 0.04.
Left out: rollouts and rewards, which cost no GPU memory while the policy is updated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo.algorithm import policy_loss
from grpo.batch import TokenBatch, Totals
from grpo.bench_models import Case, model_config
from grpo.model.policy import Policy
from grpo.packing import Document, pack_documents

PROMPT = 256
BETA = 0.04


def num_prompt(length: int) -> int:
    """Prompt tokens of a row."""
    return min(PROMPT, length // 2)


@dataclass(frozen=True)
class Method:
    """A way to run the update. `options` are Policy's; a peer has none."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    peer: bool = False


@dataclass(frozen=True)
class Data:
    """The same tokens as rows (for peers) and as bins (for us), with advantages and reference log-probs."""

    ids: Tensor  # [rows, length]
    prompt: int
    advantages: Tensor  # [rows]
    reference: Tensor  # [rows, length − prompt]
    batches: list[TokenBatch]

    @staticmethod
    def make(case: Case, device: torch.device) -> Data:
        """What a case trains on, the same every time."""
        vocabulary = model_config(case.shape).vocab_size
        generator = torch.Generator().manual_seed(1)
        prompt = num_prompt(case.length)
        ids = torch.randint(0, vocabulary, (case.rows, case.length), generator=generator)
        advantages = torch.randn(case.rows, generator=generator)
        reference = 0.5 * torch.randn(case.rows, case.length - prompt, generator=generator) - math.log(vocabulary) - 4
        documents = [
            Document(row, ids[row, :prompt].tolist(), ids[row, prompt:].tolist(), (), float(advantages[row]))
            for row in range(case.rows)
        ]
        batches = []
        for batch in pack_documents(documents, case.bin_tokens):
            full = torch.zeros(batch.input_ids.shape[0])
            full[batch.scored_index] = torch.cat([reference[row] for row in batch.row_ids.tolist()])
            batches.append(replace(batch, reference_logprobs=full).to(device))
        return Data(ids.to(device), prompt, advantages.to(device), reference.to(device), batches)

    @property
    def totals(self) -> Totals:
        """Divisors of the whole step."""
        return Totals(self.reference.numel(), len(self.ids), 1)


def ours(policy: Policy, data: Data) -> Callable[[], None]:
    """Forward and backward of every bin; gradients add up in the parameters."""

    def run() -> None:
        policy.module.train()
        for batch in data.batches:
            output = policy.logprobs(batch, 1.0, return_entropy=True)
            assert batch.reference_logprobs is not None
            loss, _ = policy_loss(
                "grpo",
                output.logprobs,
                batch.advantages.index_select(0, batch.scored_index),
                batch.completion_cu_seqlens,
                reference_logprobs=batch.reference_logprobs.index_select(0, batch.scored_index),
                entropy=output.entropy,
                totals=data.totals,
                beta=BETA,
            )
            loss.backward()

    return run
