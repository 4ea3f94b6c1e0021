"""The side of a worker process: imports the function once, then judges what it is sent exactly as an inline call would.

Left out: limits and kills, which are the parent's (reward_pool.py).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from grpo.reward_arguments import with_arguments
from grpo.reward_calls import Log, TrainerState, to_rewards
from grpo.reward_import import resolve
from grpo.reward_isolation import Fault, guarded, seed_generators
from grpo.reward_spec import Kind, Reward


class Served:
    """One reward function in a worker. Made once with what finds it, called with the arguments of each call."""

    def __init__(
        self, target: str, label: str, name: str, kind: Kind, arguments: Mapping[str, Any] | None = None
    ) -> None:
        self.reward = Reward(with_arguments(resolve(target, label), arguments, label), name, kind, label)

    def __call__(
        self, given: dict[str, Any], provided: Sequence[str], state: Mapping[str, Any], key: Sequence[int | str],
        count: int,
    ) -> dict[str, Any]:  # fmt: skip
        """Judge `count` completions.

        Args:
            given: the arguments that are JSON values.
            provided: names of those that are made here: trainer_state, log_metric, log_extra.
            state: fields of the `TrainerState`.
            key: what the global random generators start at.
        """
        log = Log(self.reward, count)
        made = {
            "trainer_state": TrainerState(**state),
            "log_metric": log.metric,
            "log_extra": log.column if self.reward.kind == "batch" else partial(log.cell, 0),
        }
        seed_generators(*key)
        result = guarded(self._judge, given | {name: made[name] for name in provided})
        values = to_rewards(self.reward, log, range(count), result)
        whole = next((value for value in values if isinstance(value, Fault) and value.on_call), None)
        return {
            "fault": None if whole is None else whole.text,
            "values": [{"fault": value.text} if isinstance(value, Fault) else value for value in values],
            "metrics": log.metrics,
            "columns": log.columns,
            "num_dropped": log.num_dropped,
        }

    def _judge(self, arguments: dict[str, Any]) -> Any:
        result = self.reward.function(**arguments)
        return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result
