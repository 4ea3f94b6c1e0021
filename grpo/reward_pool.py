"""Reward functions in worker processes: JSON arguments go out, JSON values and what was logged come back.

A worker that hangs, dies or sends garbage costs the completion it was judging and is replaced (rewards/worker.py); what
comes back is checked like what an inline function returns. The other side is reward_served.py.
Left out: several functions at the same time; each uses all of its own workers in turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.errors import InputError
from grpo.reward_isolation import Fault
from grpo.reward_spec import Reward

_SERVED = "grpo.reward_served:Served"


@dataclass(frozen=True)
class Reply:
    """What one call in a process gave: `values` (numbers, None or `Fault`) or a fault, and what it logged."""

    values: list[Any] | Fault
    seconds: float
    metrics: Mapping[str, Sequence[float]]
    columns: Mapping[str, Sequence[Any]]
    num_dropped: int


def start_pools(rewards: Sequence[Reward]) -> None:
    """Start the workers of every function that runs in processes and wait until one of each is ready.

    Raises:
        InputError: one line for each function that no worker can import.
    """
    from rewards.worker import WorkerFault

    problems = []
    pools = [(reward, _pool(reward)) for reward in rewards if reward.where == "process"]  # all start at once
    for reward, pool in pools:
        try:
            pool.wait_ready()
        except WorkerFault as fault:
            problems.append(f"{reward.label}: no worker process starts: {fault}")
    if problems:
        close_pools(rewards)
        raise InputError(*problems)


def close_pools(rewards: Sequence[Reward]) -> None:
    """End every worker. A later call starts new ones."""
    for reward in rewards:
        while reward.pools:
            reward.pools.pop().close()


def _pool(reward: Reward) -> Any:
    from rewards.worker import Pool

    if not reward.pools:
        assert reward.timeout is not None  # as every function in a process has one
        reward.pools.append(
            Pool(
                _SERVED,
                timeout=reward.timeout,
                size=reward.max_concurrency or 1,
                memory_mb=reward.memory_mb,
                init=[reward.target, reward.label, reward.name, reward.kind, reward.arguments],
            )
        )
    return reward.pools[0]


def ask(reward: Reward, calls: Sequence[Mapping[str, Any] | Fault], counts: Sequence[int]) -> list[Reply]:
    """`Served.__call__` with each of `calls`, as keywords; for a `Fault` (no arguments could be made) that fault."""
    faults = [call if isinstance(call, Fault) else _json_fault(call) for call in calls]
    outcomes = iter(_pool(reward).run([([], call) for call, fault in zip(calls, faults, strict=True) if fault is None]))
    replies = []
    for fault, count in zip(faults, counts, strict=True):
        replies.append(_reply(next(outcomes), count, reward) if fault is None else Reply(fault, 0.0, {}, {}, 0))
    return replies


def _json_fault(call: Any) -> Fault | None:
    try:
        json.dumps(call, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return Fault(f"cannot be given its arguments in a process: {error} (want JSON values)", on_call=True)
    return None


def _reply(outcome: Any, count: int, reward: Reward) -> Reply:
    from rewards.worker import WorkerTimeout

    if outcome.error is not None:
        late = isinstance(outcome.error, WorkerTimeout)
        text = f"gave no answer within {reward.timeout:g} s (its worker was killed)" if late else str(outcome.error)
        return Reply(Fault(text, on_call=True, timed_out=late), outcome.seconds, {}, {}, 0)
    try:
        return _checked(outcome.value, count, outcome.seconds)
    except (KeyError, TypeError, AttributeError, ValueError):  # the function wrote a frame itself
        return Reply(Fault("its worker sent what is no answer", on_call=True), outcome.seconds, {}, {}, 0)


def _checked(message: Any, count: int, seconds: float) -> Reply:
    """The reply in a message of `packed`, whose form is not taken on trust."""
    values: list[Any] | Fault
    if (text := message["fault"]) is not None:
        values = Fault(_text(text), on_call=True)
    else:
        values = [Fault(_text(each["fault"])) if isinstance(each, dict) else each for each in message["values"]]
        if len(values) != count:
            raise ValueError("values for other completions")
    metrics = {_text(name): [float(value) for value in logged] for name, logged in message["metrics"].items()}
    columns = {_text(name): list(column) for name, column in message["columns"].items()}
    if any(len(column) != count for column in columns.values()):
        raise ValueError("columns for other completions")
    return Reply(values, seconds, metrics, columns, int(message["num_dropped"]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value
