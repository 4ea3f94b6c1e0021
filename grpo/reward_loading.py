"""Reward functions before training: found by name, their signature read once, what each will be given decided.

    batch   f(prompts, completions, **columns) -> list[float | None]
    sample  f(completion, answer, …)           -> float | None | rewards.Score

Everything is passed by keyword. A function that takes `**kwargs` gets everything, any other only what it names.
Left out: calling them (reward_calls.py), and `prefill`, which rollouts do not carry yet.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from grpo.errors import InputError, RunError, clip

Kind = Literal["batch", "sample"]

_SHARED = ("completion_ids", "truncated", "trainer_state", "log_extra", "log_metric")
PROVIDED: dict[Kind, tuple[str, ...]] = {
    "batch": ("prompts", "completions", *_SHARED),
    "sample": ("prompt", "completion", *_SHARED, "messages"),
}
NEVER_COLUMNS = frozenset({"prompt", "prompts", "completion", "completions", "completion_ids"})
MAX_WEIGHT = 1e6
ONLY_BY_NAME = "messages"  # many datasets have such a column: `**kwargs` gets the column, not ours

_FOREIGN = {  # a parameter that gives away where a function comes from -> how to wrap it
    "solution_str": "looks like verl's; wrap it: "
    "def reward(completion, ground_truth): return compute_score(None, completion, ground_truth)",
    "queries": "looks like OpenRLHF's; wrap it: def reward(prompts, completions, labels): "
    "return reward_func([p + c for p, c in zip(prompts, completions)], prompts, labels)['rewards'].tolist()",
    "entry": "looks like reasoning-gym's; wrap it: def reward(completion, question, answer, metadata): "
    "return dataset.score_answer(completion, dict(question=question, answer=answer, metadata=metadata))",
    "state": "looks like a verifiers rubric; wrap it: "
    "def reward(prompt, completion, answer): return rubric(prompt, completion, answer, state={})",
    "self": "is a method of a class; give one that is bound to an object",
}


class RewardError(RunError):
    """A reward function failed under `rewards.on_error: raise`, or failed too often under `none`."""


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
        metric_names: names it has logged in this run (at most 64), kept in the checkpoint.
        warned: warnings that were given once.
    """

    function: Callable[..., Any]
    name: str
    kind: Kind
    label: str
    weight: float = 1.0
    injected: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    metric_names: list[str] = field(default_factory=list, compare=False, repr=False)
    warned: set[str] = field(default_factory=set, compare=False, repr=False)


def load_rewards(
    functions: Sequence[str | Callable[..., Any] | tuple[str | Callable[..., Any], float]],
    weights: Sequence[float] | None,
    columns: Collection[str],
) -> list[Reward]:
    """Find every function and decide what it is given.

    Args:
        functions: "module:function", "path/file.py:function" (relative to the working directory), a callable, or
            a pair of one of these and its weight.
        weights: one per function; None: 1 each, or those of the pairs.
        columns: names of the dataset's columns.

    Raises:
        InputError: one line for each function that cannot be imported, is not callable, wants what nothing
            provides, or shares its name with another; and for weights that cannot be used.
    """
    pairs = _paired(functions, weights)
    rewards: list[Reward] = []
    problems: list[str] = []
    cause: InputError | None = None
    for index, (function, weight) in enumerate(pairs):
        typed = function if isinstance(function, str) else _name_of(function)
        label = f'rewards[{index}] "{clip(typed)}"'
        try:
            found = _resolve(function, label) if isinstance(function, str) else function
            reward = _understand(found, label, _checked_weight(weight, label), columns)
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
    return rewards


def check_columns(rewards: Sequence[Reward], columns: Collection[str], where: str) -> None:
    """Raise `InputError` when another dataset (`where`: "data.eval") lacks a column that a function must have."""
    problems = [
        f"{where}: no column {clip(name)!r}, which {reward.label} needs{_nearest(name, columns)}"
        for reward in rewards
        for name in reward.columns
        if name in reward.required and name not in columns
    ]
    if problems:
        raise InputError(*problems)


def _paired(functions: Sequence[Any], weights: Sequence[float] | None) -> list[tuple[Any, Any]]:
    if isinstance(functions, str) or not isinstance(functions, Sequence):
        raise InputError(f"rewards is {type(functions).__name__} (want a list of functions or their names)")
    if weights is not None and len(weights) != len(functions):
        raise InputError(f"rewards.weights has {len(weights)} values for {len(functions)} functions")
    pairs = []
    for index, entry in enumerate(functions):
        paired = isinstance(entry, tuple)
        if paired and (len(entry) != 2 or weights is not None):
            raise InputError(f"rewards[{index}] is a tuple (want (function, weight), and no rewards.weights beside it)")
        given = weights[index] if weights is not None else 1.0
        pairs.append(entry if paired else (entry, given))
    return pairs


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


def describe(value: object, limit: int = 200) -> str:
    """What came from user code, as one printable line: a repr, or an exception's type and text. Never raises."""
    try:
        text = (
            f"{type(value).__name__}: {value}".removesuffix(": ") if isinstance(value, BaseException) else repr(value)
        )
    except Exception:  # the boundary to user code: its __str__ or __repr__
        text = f"{type(value).__name__} that cannot be shown"
    return "".join(letter if letter.isprintable() else "�" for letter in clip(text, limit))


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, [str(each) for each in known], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# --- from a name to a function -------------------------------------------------------------------------------


def _resolve(text: str, label: str) -> Any:
    where, colon, attribute = text.rpartition(":")
    if not (colon and where and attribute):
        raise InputError(f'{label}: is not the name of a function (want "module:function" or "path/file.py:function")')
    is_file = where.endswith(".py") or "/" in where
    module = _load_file(Path(where).expanduser(), label) if is_file else _load_module(where, label)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            source = getattr(module, "__file__", None) or where
            raise InputError(f"{label}: {source} has no {attribute!r}{_nearest(part, dir(found))}")
        found = getattr(found, part)
    return found


@contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    """`folders` first on sys.path, as after `python -m`; later last, for imports inside functions, hiding nothing."""
    names = [str(folder) for folder in folders]
    sys.path[:0] = names
    importlib.invalidate_caches()  # the file may have been written a moment ago
    try:
        yield
    finally:
        for name in names:
            with suppress(ValueError):  # the imported code may have removed it
                sys.path.remove(name)
        sys.path.extend(name for name in names if name not in sys.path)


def _load_module(name: str, label: str) -> ModuleType:
    with _importable(Path.cwd()), _import_errors(label, _files_here(name)):
        return importlib.import_module(name)


class _FreshSource(importlib.machinery.SourceFileLoader):
    """Reads the source itself: a bytecode cache is keyed by whole seconds and may be that of the text before."""

    def path_stats(self, path: Any) -> Mapping[str, Any]:
        raise OSError(f"no bytecode cache for {path}")


def _load_file(path: Path, label: str) -> ModuleType:
    """The module in `path`, run once for each content: an edited file is a new module."""
    path = path.resolve()
    if path.suffix != ".py" or not path.is_file():
        what = "is not a .py file" if path.is_file() else "no such file"
        near = _nearest(path.name, [each.name for each in path.parent.glob("*.py")])
        raise InputError(f"{label}: {path}: {what}{near}")
    key = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:16]
    name = f"_reward_file_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}_{key}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_loader(name, _FreshSource(name, str(path)))
    assert spec is not None and spec.loader is not None  # the loader was given
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their classes up there
    try:
        with _importable(path.parent, Path.cwd()), _import_errors(label):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextmanager
def _import_errors(label: str, hint: str = "") -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the boundary to user code: a module without a main guard may even sys.exit()
        raise InputError(f"{label}: import failed: {describe(error)}{hint}") from error


def _files_here(name: str) -> str:
    top = name.partition(".")[0]
    here = [path.stem if path.suffix == ".py" else path.name for path in Path.cwd().iterdir()]
    return "" if top in here else _nearest(top, here)


# --- from a function to what it is given ---------------------------------------------------------------------


def _unwrapped(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _name_of(function: Any) -> str:
    name = getattr(_unwrapped(function), "__name__", None)
    return name if isinstance(name, str) else type(_unwrapped(function)).__name__


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
    near = next((_nearest(each, ("completions", "completion", "prompts")) for each in names), "")
    raise InputError(
        f"{label}: has neither a parameter 'completions' (all at once) nor 'completion' (one at a time){hint or near}"
    )


def _understand(function: Any, label: str, weight: float, columns: Collection[str]) -> Reward:
    parameters = _parameters(function, label)
    bound = function.keywords if isinstance(function, functools.partial) else {}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    kind = _kind_of(function, named, label)

    def taken(name: str) -> bool:
        return name in named or (takes_all and name not in bound)

    injected = tuple(n for n in PROVIDED[kind] if taken(n) and (n in named or n != ONLY_BY_NAME))
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
            raise InputError(_missing(label, name, kind, own))
    return Reward(function, _name_of(function), kind, label, weight, injected, used, frozenset(required & set(used)))


def _missing(label: str, name: str, kind: Kind, columns: Sequence[str]) -> str:
    if name in _FOREIGN:
        return f"{label}: parameter {name!r} is provided by nothing; it {_FOREIGN[name]}"
    near = _nearest(name, [*PROVIDED[kind], *columns])
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
        | ({} if _state_owner(reward.function) is None else {"state": _state_of(reward)})
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
        owner = _state_owner(reward.function)
        if owner is None:
            continue
        if "state" not in saved:
            raise InputError(f"{reward.label}: the checkpoint holds no state for it")
        try:
            owner.load_state_dict(json.loads(json.dumps(saved["state"])))
        except Exception as error:  # the boundary to user code
            raise InputError(f"{reward.label}: load_state_dict failed: {describe(error)}") from error


def _state_owner(function: Any) -> Any:
    """The object whose state is the function's: itself, or the one that a method is bound to."""
    function = _unwrapped(function)
    owner = function.__self__ if inspect.ismethod(function) else function
    has_state = all(callable(getattr(owner, name, None)) for name in ("state_dict", "load_state_dict"))
    return owner if has_state and not isinstance(owner, type) else None


def _state_of(reward: Reward) -> Any:
    owner = _state_owner(reward.function)
    if owner is None:
        return None
    try:
        return json.loads(json.dumps(owner.state_dict(), allow_nan=False))
    except Exception as error:  # the boundary to user code
        raise RewardError(f"{reward.label}: state_dict() gave no JSON values: {describe(error)}") from error
