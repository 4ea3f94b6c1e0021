"""Where a reward function runs, and within which limits: decided before training, refused in one line.

    inline   in this process, one call after another; cannot be ended early, so it has no time limit
    gpu      the same, without gradients: a reward model that uses torch and the policy's GPU
    async    with the others of the step in one event loop; cancelled at its limit, if it yields
    process  in a worker that is killed at its limit; no GPU, JSON values only (tuples arrive as lists)

Left out: the calls themselves (reward_calls.py, reward_pool.py).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo.errors import InputError
from grpo.reward_import import describe
from grpo.reward_spec import (
    PROCESS_CONCURRENCY,
    PROCESS_MEMORY,
    PROCESS_TIMEOUT,
    Reward,
    RewardSpec,
    Where,
    state_owner,
    unwrapped,
)


def placed(reward: Reward, spec: RewardSpec, timeout: float | None) -> Reward:
    """`reward` with the name, place and limits that `spec` asks for. Raises `InputError` for what cannot be."""
    where = _where(reward, spec)
    outside = where in ("process", "async")
    for name, value in (("timeout_s", spec.timeout_s), ("max_concurrency", spec.max_concurrency)):
        if value is not None and not outside:
            raise InputError(f"{reward.label}: {name} is {value} (want none: what runs {where} cannot be ended early)")
        if value is not None and (isinstance(value, bool) or not 0 < value < 1e6):
            raise InputError(f"{reward.label}: {name} is {value} (want more than 0)")
    if spec.max_concurrency is not None and reward.kind == "batch":
        raise InputError(
            f"{reward.label}: max_concurrency is {spec.max_concurrency} (want none: it judges all in one call)"
        )
    limit = spec.timeout_s if spec.timeout_s is not None else timeout if outside else None
    concurrency = spec.max_concurrency
    if where == "process":
        limit = PROCESS_TIMEOUT if limit is None else limit
        concurrency = 1 if reward.kind == "batch" else concurrency or PROCESS_CONCURRENCY
    return replace(
        reward,
        name=reward.name if spec.name is None else _checked_name(spec.name, reward.label),
        where=where,
        timeout=limit,
        on_error=spec.on_error,
        max_concurrency=concurrency,
        memory_mb=PROCESS_MEMORY if spec.memory_mb is None else spec.memory_mb,
        target=_target(_found(reward, spec), spec.function),
    )


def _found(reward: Reward, spec: RewardSpec) -> Any:
    """What a worker has to import: with arguments the factory, or the function that they are bound to."""
    return reward.function if reward.arguments is None else spec.function


def _where(reward: Reward, spec: RewardSpec) -> Where:
    is_async = _is_async(reward.function)
    where: Where = spec.where or ("async" if is_async else "inline")
    if where not in ("inline", "process", "async", "gpu"):
        raise InputError(f"{reward.label}: where is {describe(where, 40)} (want inline, process, async or gpu)")
    if where == "async" and not is_async:
        raise InputError(f"{reward.label}: where is async (want inline or process: it is no async function)")
    if where in ("inline", "gpu") and is_async:
        raise InputError(f"{reward.label}: where is {where} (want async or process: it is an async function)")
    if where == "process" and state_owner(reward.function) is not None:
        raise InputError(
            f"{reward.label}: where is process (want inline: a worker would keep its state_dict to itself)"
        )
    if where == "process" and _target(_found(reward, spec), spec.function) is None:
        raise InputError(
            f"{reward.label}: where is process (want a function that a worker can import, by its name module:function; "
            "lambdas, closures and functions of a script or notebook run inline)"
        )
    return where


def _is_async(function: Any) -> bool:
    function = unwrapped(function)
    return any(map(inspect.iscoroutinefunction, (function, getattr(type(function), "__call__", None))))  # noqa: B004


def _target(function: Any, typed: Any) -> str | None:
    """How another process finds the function; None when it cannot."""
    if isinstance(typed, str):
        where, _, attribute = typed.rpartition(":")
        is_file = where.endswith(".py") or "/" in where
        return f"{Path(where).expanduser().resolve()}:{attribute}" if is_file else typed
    module, path = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not isinstance(module, str) or module == "__main__" or not path or "<" in path:
        return None
    found: Any = sys.modules.get(module)
    if getattr(getattr(found, "__spec__", None), "origin", None) is None or module.startswith("_reward_file_"):
        return None
    for part in path.split("."):
        found = getattr(found, part, None)
    return f"{module}:{path}" if found is function else None


def _checked_name(name: str, label: str) -> str:
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 100 or "/" in name:
        raise InputError(f"{label}: name is {describe(name, 40)} (want 1 to 100 printable characters without /)")
    return name


def placement_lines(rewards: Sequence[Reward]) -> list[str]:
    """One line for each place where functions run, for the start of a run, and what a function says of itself.

    A reward that runs model-written code tells by `describe()` in which sandbox, and what that leaves open.
    """
    lines = []
    for where, say in _PLACES.items():
        names = [reward for reward in rewards if reward.where == where]
        lines += [f"rewards {say}: {', '.join(_placement(reward) for reward in names)}"] if names else []
    for reward in rewards:
        describe = getattr(reward.function, "describe", None)
        if callable(describe):
            lines.append(f"reward {reward.name}: {describe()}")
    return lines


_PLACES: dict[Where, str] = {
    "inline": "in this process, without a time limit",
    "gpu": "in this process, with the GPU, without a time limit",
    "async": "in one event loop",
    "process": "in worker processes",
}


def _placement(reward: Reward) -> str:
    if reward.where in ("inline", "gpu"):
        return reward.name if reward.target else f"{reward.name} (a worker could not import it)"
    limit = "no time limit" if reward.timeout is None else f"{reward.timeout:g} s a call"
    return f"{reward.name} ({limit}, {reward.max_concurrency or 'all'} at a time)"
