"""After a sync: do engine and policy give the same log-probs? Stops a run whose engine has stale or corrupt weights.

    gap = mean |ℓ_engine − ℓ_policy| over a few fixed sequences, nats

The first gap is the baseline b (numerics of two implementations); above 2b + 0.01 it is said, above 5b + 0.05 the run
ends, saved. A baseline above 0.5 ends it at once: then the two are not the same model. What it cannot see: one stale
step at a small learning rate (the engine reads its weights back for that) and a stale prefix cache (`score` never
reads it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from grpo.errors import RunError
from grpo.model.policy import Policy
from grpo.packing import Document, pack_documents

NUM_SEQUENCES = 8
LENGTH = 32  # tokens of each: an engine forms full-vocabulary logits for all of them at once
MAX_BASELINE = 0.5

Score = Callable[[list[list[int]]], list[list[float]]]


class WeightProbe:
    """Compares an engine with the policy on fixed sequences after each sync.

    Args:
        sequences: token ids, e.g. of the first prompts; those of at least two tokens are cut to `LENGTH`.
        say: told of a gap that is larger than it should be.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], say: Callable[[str], None] | None = None) -> None:
        usable = [list(ids[:LENGTH]) for ids in sequences if len(ids) > 1]
        self.sequences = usable[:NUM_SEQUENCES]
        self.baseline: float | None = None
        self._say = say or (lambda line: None)

    def check(self, policy: Policy, score: Score) -> float:
        """The gap in nats; `score` is the engine's, at temperature 1.

        Raises:
            RunError: the gap says that the engine does not have the policy's weights.
        """
        if not self.sequences:
            return 0.0
        engine = torch.tensor([value for values in score(self.sequences) for value in values])
        gap = float((engine - policy_scores(policy, self.sequences)).abs().mean())
        if self.baseline is None:
            self.baseline = gap
            limit = MAX_BASELINE
        else:
            limit = 5 * self.baseline + 0.05
        if not gap <= limit:
            raise RunError(
                f"the rollout engine has stale or corrupt weights: its log-probs are {gap:.3g} nats off the policy, on "
                f"average (want at most {limit:.3g})"
            )
        if gap > 2 * self.baseline + 0.01:
            self._say(
                f"warning: engine and policy differ by {gap:.3g} nats on average, {self.baseline:.3g} at the start"
            )
        return gap


@torch.no_grad()
def policy_scores(policy: Policy, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probs (float32, CPU) at temperature 1 of every token but the first of each sequence, concatenated."""
    documents = [Document(row, ids[:1], ids[1:]) for row, ids in enumerate(sequences)]
    total = sum(document.length for document in documents)
    (batch,) = pack_documents(documents, total)
    with policy.evaluating():
        scores = policy.logprobs(batch.to(policy.device), 1.0).logprobs.float().cpu()
    bounds = batch.completion_cu_seqlens.tolist()
    spans = {int(row): slice(bounds[d], bounds[d + 1]) for d, row in enumerate(batch.row_ids)}
    return torch.cat([scores[spans[row]] for row in range(len(sequences))])
