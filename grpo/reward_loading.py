"""Reward functions before training: found by name, their signature read once, what each will be given decided.

    batch   f(prompts, completions, **columns) -> list[float | None]
    sample  f(completion, answer, …)           -> float | None | rewards.Score

Everything is passed by keyword. A function that takes `**kwargs` gets everything, any other only what it names.
Left out: calling them (reward_calls.py), where they run (reward_placement.py), and arguments in a configuration
(reward_arguments.py).
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from grpo.errors import InputError, clip
from grpo.reward_arguments import all_arguments, missing_arguments, with_arguments
from grpo.reward_import import describe, nearest, resolve
from grpo.reward_placement import placed
from grpo.reward_pool import start_pools
from grpo.reward_spec import Kind, Reward, RewardError, RewardSpec, name_of, state_owner

_SHARED = ("completion_ids", "truncated", "trainer_state", "log_extra", "log_metric", "prefill")
PROVIDED: dict[Kind, tuple[str, ...]] = {
    "batch": ("prompts", "completions", *_SHARED),
    "sample": ("prompt", "completion", *_SHARED, "messages"),
}
_FIXED = frozenset(name for names in PROVIDED.values() for name in names if name != "prefill")  # no argument's name
NEVER_COLUMNS = frozenset({"prompt", "prompts", "completion", "completions", "completion_ids"})
MAX_WEIGHT = 1e6
ONLY_BY_NAME = ("messages", "prefill")  # datasets have such columns: `**kwargs` gets the column, not ours

_FOREIGN = {  # a parameter that gives away where a function comes from -> how to wrap it
    "solution_str": "looks like verl's; wrap it: rewards.adapters.from_verl(compute_score)",
    "queries": "looks like OpenRLHF's; wrap it: rewards.adapters.from_openrlhf(reward_func)",
    "entry": "looks like reasoning-gym's; wrap it: rewards.adapters.from_reasoning_gym(dataset)",
    "state": "looks like a verifiers rubric's; wrap it: rewards.adapters.from_verifiers(function)",
    "self": "is a method of a class; give one that is bound to an object",
}


def load_rewards(
    functions: Sequence[str | Callable[..., Any] | tuple[str | Callable[..., Any], float] | RewardSpec],
    weights: Sequence[float] | None,
    columns: Collection[str],
    timeout: float | None = None,
    prefill: str | None = None,
) -> list[Reward]:
    """Find every function and decide what it is given.

    Args:
        functions: "module:function", "path/file.py:function" (relative to the working directory), a callable, a pair
            of one of these and its weight, or a `RewardSpec`.
        weights: one per function; None: 1 each, or those of the pairs and specifications.
        columns: names of the dataset's columns.
        timeout: seconds of a call for functions that do not run inline and say nothing themselves.
        prefill: what the chat template puts in front of every completion (reward_prefill.py), "" for nothing; None: not
            known, then a parameter `prefill` keeps its default.

    Functions with `where="process"` have a worker that is ready when this returns.

    Raises:
        InputError: one line for each function that cannot be imported, is not callable, wants what nothing
            provides, shares its name with another, or cannot be called as asked; and for weights that cannot be used.
    """
    specs = _specified(functions, weights)
    rewards: list[Reward] = []
    problems: list[str] = []
    cause: InputError | None = None
    for index, spec in enumerate(specs):
        typed = spec.function if isinstance(spec.function, str) else name_of(spec.function)
        label = f'rewards[{index}] "{clip(typed)}"'
        try:
            reward = placed(_loaded(spec, label, columns, prefill), spec, timeout)
            _refuse_equal_name(reward, rewards)
            _state_of(reward)
            rewards.append(reward)
        except InputError as error:
            cause = cause or error
            problems += error.lines
        except RewardError as error:  # from state_dict
            problems.append(str(error))
    if not problems and rewards and not any(reward.weight for reward in rewards):
        problems.append("rewards: every weight is 0 (want at least one function that counts)")
    if problems:
        raise InputError(*problems) from cause
    start_pools(rewards)
    return rewards


def _loaded(spec: RewardSpec, label: str, columns: Collection[str], prefill: str | None) -> Reward:
    """One function, found, given its arguments, understood; where it runs is not decided yet."""
    found = resolve(spec.function, label) if isinstance(spec.function, str) else spec.function
    arguments = all_arguments(spec.arguments, spec.tier, label)
    given = with_arguments(found, arguments, label, fixed=_FIXED)
    reward = _understand(given, label, _checked_weight(spec.weight, label), columns, prefill is not None)
    return replace(reward, arguments=arguments, range=_checked_range(spec.range, label), prefill=prefill)


def _checked_range(given: Any, label: str) -> tuple[float, float] | None:
    if given is None:
        return None
    numbers = isinstance(given, list | tuple) and all(isinstance(v, int | float) and abs(v) <= 1e6 for v in given)
    if not numbers or len(given) != 2 or not given[0] < given[1]:
        raise InputError(f"{label}: range is {describe(given, 40)} (want [lowest, highest], of at most 1e6 in size)")
    return float(given[0]), float(given[1])


def check_columns(rewards: Sequence[Reward], columns: Collection[str], where: str) -> None:
    """Raise `InputError` when another dataset (`where`: "data.eval") lacks a column that a function must have."""
    problems = [
        f"{where}: no column {clip(name)!r}, which {reward.label} needs{nearest(name, columns)}"
        for reward in rewards
        for name in reward.columns
        if name in reward.required and name not in columns
    ]
    if problems:
        raise InputError(*problems)


def _specified(functions: Sequence[Any], weights: Sequence[float] | None) -> list[RewardSpec]:
    if isinstance(functions, str) or not isinstance(functions, Sequence):
        raise InputError(f"rewards is {type(functions).__name__} (want a list of functions or their names)")
    if weights is not None and len(weights) != len(functions):
        raise InputError(f"rewards.weights has {len(weights)} values for {len(functions)} functions")
    specs = []
    for index, entry in enumerate(functions):
        paired = isinstance(entry, tuple)
        if paired and (len(entry) != 2 or weights is not None):
            raise InputError(f"rewards[{index}] is a tuple (want (function, weight), and no rewards.weights beside it)")
        if isinstance(entry, RewardSpec) and weights is not None:
            raise InputError(
                f"rewards[{index}] is a RewardSpec (want its own weight, and no rewards.weights beside it)"
            )
        function, weight = entry if paired else (entry, weights[index] if weights is not None else 1.0)
        specs.append(entry if isinstance(entry, RewardSpec) else RewardSpec(function, weight))
    return specs


def _checked_weight(weight: Any, label: str) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= MAX_WEIGHT:
        raise InputError(f"{label}: weight is {describe(weight, 80)} (want a number of at most {MAX_WEIGHT:g} in size)")
    return float(weight)


def _refuse_equal_name(reward: Reward, others: Sequence[Reward]) -> None:
    for other in others:
        if other.name == reward.name:
            raise InputError(
                f"{reward.label}: has the metric name {reward.name!r}, as {other.label} (rename one function)"
            )


# --- from a function to what it is given ---------------------------------------------------------------------


def _parameters(function: Any, label: str) -> dict[str, inspect.Parameter]:
    if isinstance(function, type):
        raise InputError(f"{label}: is a class (want a function, or an instance: reward = {function.__name__}(…))")
    if not callable(function):
        raise InputError(f"{label}: is {type(function).__name__} (want a function or its name)")
    try:
        found = dict(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        raise InputError(f"{label}: its signature cannot be read (wrap it in a def)") from None
    for name, parameter in found.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise InputError(f"{label}: parameter {name!r} is positional-only (arguments are passed by name)")
    bound = function.keywords if isinstance(function, functools.partial) else {}
    return {name: parameter for name, parameter in found.items() if name not in bound}


def _kind_of(function: Any, names: Collection[str], label: str) -> Kind:
    batch, sample = [n for n in ("completions", "prompts") if n in names], "completion" in names
    if batch and sample:
        raise InputError(f"{label}: has both {batch[0]!r} and 'completion' (want one: all completions, or each)")
    if batch or sample:
        return "batch" if batch else "sample"
    hint = next((f"; it {text}" for name, text in _FOREIGN.items() if name in names), "")
    if hasattr(function, "forward") and hasattr(function, "parameters"):
        hint = "; it looks like a reward model: call it in a function of prompts and completions"
    near = next((nearest(each, ("completions", "completion", "prompts")) for each in names), "")
    end = hint or near or missing_arguments(function)
    raise InputError(
        f"{label}: has neither a parameter 'completions' (all at once) nor 'completion' (one at a time){end}"
    )


def _understand(function: Any, label: str, weight: float, columns: Collection[str], with_prefill: bool) -> Reward:
    parameters = _parameters(function, label)
    bound = function.keywords if isinstance(function, functools.partial) else {}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    kind = _kind_of(function, named, label)

    def taken(name: str) -> bool:
        return name in named or (takes_all and name not in bound)

    provided = [name for name in PROVIDED[kind] if with_prefill or name != "prefill"]
    injected = tuple(n for n in provided if taken(n) and (n in named or n not in ONLY_BY_NAME))
    own = sorted(name for name in columns if isinstance(name, str) and name not in NEVER_COLUMNS)
    used = tuple(name for name in own if taken(name))
    for name in used:
        if name in injected:
            raise InputError(
                f"{label}: column {name!r} has the name of what rewards are given anyway (rename the column)"
            )
    required = {name for name, parameter in named.items() if parameter.default is parameter.empty}
    for name in named:
        if name in required and name not in injected and name not in used:
            raise InputError(_missing(label, name, provided, own))
    return Reward(function, name_of(function), kind, label, weight, injected, used, frozenset(required & set(used)))


def _missing(label: str, name: str, provided: Sequence[str], columns: Sequence[str]) -> str:
    if name in _FOREIGN:
        return f"{label}: parameter {name!r} is provided by nothing; it {_FOREIGN[name]}"
    near = nearest(name, [*provided, *columns])
    return (
        f"{label}: parameter {name!r} is provided by nothing{near} (columns: {clip(', '.join(columns) or 'none', 200)})"
    )


# --- state of reward objects ---------------------------------------------------------------------------------


def reward_states(rewards: Sequence[Reward]) -> dict[str, Any]:
    """What a checkpoint keeps of every function, as JSON values (copies): its own `state_dict()` and metric names.

    Raises:
        RewardError: a `state_dict()` failed or holds what JSON cannot (tensors, NaN).
    """
    return {
        reward.name: {"metric_names": list(reward.metric_names)}
        | ({} if state_owner(reward.function) is None else {"state": _state_of(reward)})
        for reward in rewards
    }


def load_reward_states(rewards: Sequence[Reward], states: Mapping[str, Any]) -> None:
    """Put back what `reward_states` returned. A function that it does not know keeps its present state.

    Raises:
        InputError: it knows a function that had no state then and has one now, or `load_state_dict` fails.
    """
    for reward in rewards:
        saved = states.get(reward.name)
        if saved is None:
            continue
        reward.metric_names[:] = saved["metric_names"]
        owner = state_owner(reward.function)
        if owner is None:
            continue
        if "state" not in saved:
            raise InputError(f"{reward.label}: the checkpoint holds no state for it")
        try:
            owner.load_state_dict(json.loads(json.dumps(saved["state"])))
        except Exception as error:  # the boundary to user code
            raise InputError(f"{reward.label}: load_state_dict failed: {describe(error)}") from error


def _state_of(reward: Reward) -> Any:
    owner = state_owner(reward.function)
    if owner is None:
        return None
    try:
        return json.loads(json.dumps(owner.state_dict(), allow_nan=False))
    except Exception as error:  # the boundary to user code
        raise RewardError(f"{reward.label}: state_dict() gave no JSON values: {describe(error)}") from error
