"""Arguments of a reward in a configuration: a factory is called with them, a reward function gets them bound.

    {function: "rewards:code_tests", arguments: {tier: confined, max_tests: 20}}     a factory: makes the reward
    {function: "rewards:soft_overlong", arguments: {max_length: 4096, buffer: 512}}  a reward: two arguments are fixed

A factory is a callable without a parameter `completion`, `completions` or `prompts`. `tier` of a reward is its argument
of that name, so that what runs model-written code says where in one place.
Left out: functions as arguments (combinators are put together in a .py file), and checks of types, which are the
factory's own.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
from collections.abc import Collection, Mapping
from typing import Any

from grpo.errors import InputError, clip
from grpo.reward_import import describe

JUDGED = ("completions", "prompts", "completion")
"""A callable with one of these parameters is a reward function; another one is a factory of one."""


def all_arguments(arguments: Mapping[str, Any] | None, tier: str | None, label: str) -> dict[str, Any] | None:
    """`arguments` with `tier` among them; None when there are neither. Raises `InputError` for two tiers, and for
    values that JSON does not have (a worker process could not be given them)."""
    if arguments is None and tier is None:
        return None
    if arguments is not None and not isinstance(arguments, Mapping):
        raise InputError(f"{label}: arguments is {describe(arguments, 40)} (want names and values)")
    given = dict(arguments or {})
    if tier is not None:
        if given.get("tier", tier) != tier:
            raise InputError(f"{label}: tier is {tier!r} and arguments.tier {describe(given['tier'], 40)} (want one)")
        given["tier"] = tier
    for name, value in given.items():
        try:
            json.dumps({name: value}, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise InputError(f"{label}: arguments.{name} is {describe(value, 40)} (want JSON values)") from None
    return given


def with_arguments(function: Any, arguments: Mapping[str, Any] | None, label: str, fixed: Collection[str] = ()) -> Any:
    """The reward that `function` is, or makes, with `arguments`; `function` itself when they are None.

    Args:
        function: a reward function, or a factory.
        arguments: by name.
        label: what the user typed, for messages.
        fixed: names that every call gives and no argument may.

    Raises:
        InputError: an argument that it does not take, one that it wants and does not get, or what the factory raises.
    """
    if arguments is None:
        return function
    parameters = _parameters(function, label)
    is_factory = not any(name in parameters for name in JUDGED)
    _check_names(parameters, arguments, label, () if is_factory else fixed)
    if not is_factory:
        return functools.partial(function, **arguments)
    missing = [name for name, each in parameters.items() if _is_required(each) and name not in arguments]
    if missing:
        raise InputError(f"{label}: arguments: {', '.join(missing)} missing (it takes {_listed(parameters)})")
    return _made(function, arguments, label)


def missing_arguments(function: Any) -> str:
    """The end of a message on a callable that judges nothing: how to give a factory its arguments, or nothing."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ""
    named = {name: each for name, each in parameters.items() if each.kind in _BY_NAME}
    return f"; if it makes a reward, give it arguments: {{…}} (it takes {_listed(named)})" if named else ""


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _parameters(function: Any, label: str) -> dict[str, inspect.Parameter]:
    if not callable(function):
        raise InputError(f"{label}: is {type(function).__name__} (want a function or its name)")
    try:
        return dict(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        raise InputError(f"{label}: its signature cannot be read, so it can be given no arguments") from None


def _check_names(
    parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any], label: str, fixed: Collection[str]
) -> None:
    own = {name: each for name, each in parameters.items() if each.kind in _BY_NAME and name not in fixed}
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    problems = []
    for name in arguments:
        if name in fixed:
            problems.append(f"{label}: arguments.{name}: every call gives that (want another argument)")
        elif name not in own and not takes_all:
            near = difflib.get_close_matches(str(name), own, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            problems.append(f"{label}: arguments: takes no {clip(str(name))!r} ({hint}it takes {_listed(own)})")
    if problems:
        raise InputError(*problems)


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.kind in _BY_NAME and parameter.default is parameter.empty


def _listed(parameters: Mapping[str, inspect.Parameter]) -> str:
    names = [name for name, each in parameters.items() if each.kind in _BY_NAME]
    return clip(", ".join(names) or "none", 200)


def _made(factory: Any, arguments: Mapping[str, Any], label: str) -> Any:
    try:
        made = factory(**arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the boundary to user code: a factory may even sys.exit()
        raise InputError(f"{label}: with its arguments: {describe(error)}") from error
    if not callable(made):
        raise InputError(f"{label}: with its arguments made {describe(made, 40)} (want a reward function)")
    return made
