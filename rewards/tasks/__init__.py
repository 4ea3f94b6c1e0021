r"""Generated tasks: rows with `prompt` and `answer` without end, from the standard library, a seed and a difficulty.

    make(name, count, seed=0, difficulty=1) -> rows        scorer(name) -> reward        oracle(name) -> prompt → answer

Row i is a function of (name, seed, difficulty, i) alone: equal in every run, process and for every `count`. The oracle
reads nothing but the prompt. Constant answers and copies of the prompt score nothing worth learning (tested).
Source: tasks used to show that reinforcement learning works at small sizes: countdown (TinyZero), arithmetic and GSM8K
(arXiv 2110.14168), sorting and string operations.
Left out: anything with a library behind it (`from_reasoning_gym` has a hundred more).
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

NAMES = ("arithmetic", "countdown", "sorting", "strings", "words", "bases")
MAX_DIFFICULTY = 10


def make(name: str, count: int, *, seed: int = 0, difficulty: int = 1) -> list[dict[str, Any]]:
    """`count` rows of a task.

    Args:
        name: one of NAMES.
        count: rows, at least 1.
        seed: another seed, other rows.
        difficulty: 1 to 10.

    Raises:
        ValueError: an unknown name, or a number out of range.

    >>> make("sorting", 1)[0]["answer"]
    '14 23 25 76'
    """
    module = _module(name)
    if count < 1 or not 1 <= difficulty <= MAX_DIFFICULTY:
        raise ValueError(f"tasks: count {count}, difficulty {difficulty} (want at least 1, and 1 to {MAX_DIFFICULTY})")
    return [module.make(random.Random(f"{name}/{seed}/{difficulty}/{row}"), difficulty) for row in range(count)]


def scorer(name: str) -> Callable[..., float | None]:
    """The reward of a task, `f(completion, answer, …)`; in a configuration `rewards.tasks.<name>:<name>_score`.

    >>> scorer("sorting")("<think>hm</think> 1 2 10", "1 2 10")
    1.0
    """
    return getattr(_module(name), f"{name}_score")


def oracle(name: str) -> Callable[[str], str]:
    """What solves every prompt of a task, from its text alone.

    >>> row = make("arithmetic", 1, seed=3)[0]
    >>> scorer("arithmetic")(oracle("arithmetic")(row["prompt"]), row["answer"])
    1.0
    """
    return _module(name).oracle


def from_uri(text: str) -> list[dict[str, Any]]:
    """Rows of `tasks:NAME?count=…&seed=…&difficulty=…`, for places that hold a name.

    Raises:
        ValueError: another form, or an option that is none.

    >>> from_uri("tasks:bases?count=2&seed=1") == make("bases", 2, seed=1)
    True
    """
    scheme, _, rest = text.partition(":")
    name, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if scheme != "tasks" or not options.keys() <= {"count", "seed", "difficulty"}:
        raise ValueError(f"{text!r} is no generated task (want tasks:NAME?count=…&seed=…&difficulty=…)")
    try:
        numbers = {key: int(value) for key, value in options.items()}
    except ValueError:
        raise ValueError(f"{text!r}: count, seed and difficulty are whole numbers") from None
    return make(name, numbers.pop("count", 1000), **numbers)


def from_reasoning_gym(name: str, count: int, *, seed: int = 0, **options: Any) -> list[dict[str, Any]]:
    """Rows of a task of reasoning-gym: prompt, answer, metadata. Its scorer is `rewards.adapters.from_reasoning_gym`.

    Args:
        name: of the dataset there, e.g. "basic_arithmetic".
        count, seed, options: of the dataset; options are its own knobs.

    Raises:
        ImportError: reasoning-gym is not installed.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise ImportError(f"tasks of reasoning-gym ({name}): want `pip install leangrpo[tasks]`") from None
    dataset = reasoning_gym.create_dataset(name, size=count, seed=seed, **options)
    return [{"prompt": row["question"], "answer": row["answer"], "metadata": row["metadata"]} for row in dataset]


def _module(name: str) -> ModuleType:
    if name not in NAMES:
        raise ValueError(f"tasks: no task {name!r} (there are {', '.join(NAMES)})")
    return importlib.import_module(f"rewards.tasks.{name}")
