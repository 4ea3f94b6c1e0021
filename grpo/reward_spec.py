"""What a reward function is: as a user writes it (`RewardSpec`), and as it is called (`Reward`).

Left out: how the one becomes the other (reward_loading.py, reward_placement.py).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo.errors import RunError

Kind = Literal["batch", "sample"]
Where = Literal["inline", "process", "async", "gpu"]
OnError = Literal["raise", "none"]

PROCESS_TIMEOUT = 10.0
"""Seconds of a call in a process for which nothing else is said."""
PROCESS_CONCURRENCY = 4
"""Worker processes of a sample function for which nothing else is said."""
PROCESS_MEMORY = 4096
"""MiB of address space of a worker process for which nothing else is said."""


class RewardError(RunError):
    """A reward function failed under `rewards.on_error: raise`, or failed too often under `none`."""


@dataclass(frozen=True)
class RewardSpec:
    """A function and how it is to be called, as a user writes it. What is None is decided by `load_rewards`.

    Attributes:
        function: "module:function", "path/file.py:function" (relative to the working directory), or a callable.
        weight: in the sum. 0 makes it a metric only.
        name: in metrics; None: the function's own.
        where: None: "async" for an async function, else "inline".
        timeout_s: seconds of a call (of a completion in the sample form, of the whole step in the batch form), for
            functions that do not run inline.
        on_error: what its faults do; None: as the run says.
        max_concurrency: completions judged at the same time, for functions that do not run inline.
        memory_mb: MiB of address space of a worker process.
        arguments: of the factory that `function` is, or bound to the reward that it is (reward_arguments.py); in Python
            a partial, or the factory's result, does the same.
        range: (lowest, highest) value; another one is a fault. What is known of the total's range comes from these.
        tier: argument of that name, for rewards that run model-written code.
    """

    function: str | Callable[..., Any]
    weight: float = 1.0
    name: str | None = None
    where: Where | None = None
    timeout_s: float | None = None
    on_error: OnError | None = None
    max_concurrency: int | None = None
    memory_mb: int | None = None
    arguments: Mapping[str, Any] | None = None
    range: tuple[float, float] | None = None
    tier: str | None = None


@dataclass(frozen=True)
class Reward:
    """One reward function and what it is given.

    Attributes:
        function: what is called, with keywords only.
        name: in metrics: `rewards/<name>/mean`.
        kind: "batch" is called once a step, "sample" once a completion.
        label: what the user typed, for messages: `rewards[1] "my.mod:fn"`.
        weight: in the sum. 0 makes it a metric only.
        injected: names of `PROVIDED` that it takes.
        columns: dataset columns that it takes.
        required: those of `columns` that have no default.
        where: it runs.
        timeout: s of a call; None: no limit.
        on_error: what its faults do; None: as the run says.
        max_concurrency: calls at the same time; None: no limit (async).
        memory_mb: MiB of address space of a worker process.
        target: how a worker process finds the function, "module:function" or "/path/file.py:function"; None: it cannot.
        arguments: what `target` is called with, or bound to, in a worker; None: `target` is the reward.
        range: (lowest, highest) value; None: any.
        prefill: what the chat template puts in front of every completion; None: not known, so nothing is injected.
        metric_names: names it has logged in this run (at most 64), kept in the checkpoint.
        warned: warnings that were given once.
        pools: the workers that run it, when they are there (reward_pool.py).
    """

    function: Callable[..., Any]
    name: str
    kind: Kind
    label: str
    weight: float = 1.0
    injected: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    where: Where = "inline"
    timeout: float | None = None
    on_error: OnError | None = None
    max_concurrency: int | None = None
    memory_mb: int = PROCESS_MEMORY
    target: str | None = None
    arguments: Mapping[str, Any] | None = None
    range: tuple[float, float] | None = None
    prefill: str | None = None
    metric_names: list[str] = field(default_factory=list, compare=False, repr=False)
    warned: set[str] = field(default_factory=set, compare=False, repr=False)
    pools: list[Any] = field(default_factory=list, compare=False, repr=False)


def unwrapped(function: Any) -> Any:
    """The function inside partials."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def name_of(function: Any) -> str:
    """Its own name, or that of its class."""
    name = getattr(unwrapped(function), "__name__", None)
    return name if isinstance(name, str) else type(unwrapped(function)).__name__


def state_owner(function: Any) -> Any:
    """The object whose state is the function's: itself, or the one that a method is bound to."""
    function = unwrapped(function)
    owner = function.__self__ if inspect.ismethod(function) else function
    has_state = all(callable(getattr(owner, name, None)) for name in ("state_dict", "load_state_dict"))
    return owner if has_state and not isinstance(owner, type) else None
