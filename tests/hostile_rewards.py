"""Reward functions that misbehave on purpose: `hostile` does what the completion "!name" names, `hostile_batch` what its
first one does; on any other completion both answer its length. Importable by worker processes."""

import os
import time
from decimal import Decimal

from tests.rewards import hostile as deeds


class NoFloat:
    def __float__(self):
        raise RuntimeError("no float")


class Unprintable(Exception):  # noqa: N818
    def __str__(self):
        raise RuntimeError("no text")


def _raise(error):
    raise error


def _recurse():
    return _recurse()


ACTS = {  # name -> (what it does, what the fault says)
    "nan": (lambda: float("nan"), "returned nan (want a finite number"),
    "inf": (lambda: float("inf"), "returned inf (want a finite number"),
    "minus_inf": (lambda: -float("inf"), "returned -inf (want a finite number"),
    "1e39": (lambda: 1e39, "returned 1e+39 (want at most 1e+06"),
    "1e30": (lambda: -1e30, "returned -1e+30 (want at most"),
    "long": (lambda: 10**400, "returned an int of 1329 bits"),
    "text": (lambda: "0.5", "returned str '0.5'"),
    "bytes": (lambda: b"1", "returned bytes"),
    "dict": (lambda: {"score": 1.0}, "returned dict"),
    "set": (lambda: {1.0}, "returned set"),
    "list": (lambda: [1.0], "returned list [1.0]"),
    "complex": (lambda: 1j, "returned complex"),
    "decimal": (lambda: Decimal("0.5"), "returned Decimal"),
    "no_float": (lambda: NoFloat(), "returned NoFloat"),
    "generator": (lambda: (1.0 for _ in "x"), "returned generator"),
    "raises": (lambda: _raise(ValueError("boom\nand more")), "raised ValueError: boom"),
    "unprintable": (lambda: _raise(Unprintable()), "raised Unprintable that cannot be shown"),
    "exits": (lambda: _raise(SystemExit(0)), "raised SystemExit: 0"),
    "generator_exit": (lambda: _raise(GeneratorExit()), "raised GeneratorExit"),
    "memory_error": (lambda: _raise(MemoryError()), "raised MemoryError"),
    "recursion": (_recurse, "raised RecursionError"),
}
_KILLED = "gave no answer within 1.5 s (its worker was killed)"
_ENDED = "the worker ended with "
PROCESS_ACTS = {  # only where they can be ended
    "sleeps": (lambda: time.sleep(60), _KILLED),
    "ignores_sigterm": (deeds.ignores_sigterm, _KILLED),
    "holds_gil": (deeds.holds_gil, _KILLED),
    "power_tower": (deeds.power_tower, _KILLED),
    "starts_children": (deeds.starts_children, _KILLED),
    "leaves_file": (deeds.leaves_file, _KILLED),
    "os_exit": (lambda: os._exit(0), _ENDED + "exit code 0"),
    "segfault": (deeds.segfault, _ENDED + "signal 11"),
    "closes_pipe": (deeds.closes_pipe, _ENDED + "signal 9"),
    "garbage": (deeds.garbage, "the worker sent Expecting value"),
    "forged": (deeds.forged, "the worker sent an answer to no question"),
    "memory_bomb": (lambda: len(bytearray(8 * 10**9)), "raised MemoryError"),
}

BATCH_ACTS = {
    "none": (lambda n: None, "returned None (want a list"),
    "scalar": (lambda n: 1.0, "returned float 1.0 (want a list"),
    "empty": (lambda n: [], "returned 0 values for 4 completions"),
    "short": (lambda n: [1.0] * (n - 1), "returned 3 values for 4 completions"),
    "long": (lambda n: [1.0] * (n + 1), "returned 5 values for 4 completions"),
    "one": (lambda n: [1.0], "returned 1 values for 4 completions"),
    "texts": (lambda n: ["1"] * n, "returned str '1'"),
    "dict": (lambda n: dict.fromkeys(range(n), 1.0), "returned dict"),
    "set": (lambda n: set(range(n)), "returned set"),
    "generator": (lambda n: (1.0 for _ in range(n)), "returned generator"),
    "nested": (lambda n: [[1.0]] * n, "returned list [1.0]"),
    "raises": (lambda n: _raise(KeyError("answer")), "raised KeyError: 'answer'"),
}


def hostile(completion):
    if completion.startswith("!"):
        return (ACTS | PROCESS_ACTS)[completion[1:]][0]()
    return float(len(completion))


def hostile_batch(completions):
    if completions[0].startswith("!"):
        return BATCH_ACTS[completions[0][1:]][0](len(completions))
    return [float(len(completion)) for completion in completions]


def talks(completion, answer, trainer_state, log_metric, log_extra):
    """Uses all that it is given."""
    import random

    log_metric("size", len(completion))
    log_metric("step", trainer_state.global_step)
    log_extra("note", f"{answer}:{completion}")
    return random.random()


def talks_batch(prompts, completions, completion_ids, truncated, log_extra, **columns):
    log_extra(
        "seen", [f"{p}|{c}|{i}|{t}" for p, c, i, t in zip(prompts, completions, completion_ids, truncated, strict=True)]
    )
    return [
        float(len(completion)) if answer != "a1" else None
        for completion, answer in zip(completions, columns["answer"], strict=True)
    ]


def scores(completion):
    from rewards import Score

    return Score(len(completion), halves=len(completion) / 2, said=completion)


async def later(completion):
    import asyncio

    await asyncio.sleep(0 if completion != "!late" else 60)
    return float(len(completion))


def floods_metrics(completion, log_metric):
    for number in range(100_000):
        log_metric(f"name {number}", 1.0)
    return 1.0


def slow(completion):
    time.sleep(0.02)
    return len(completion) / 10


def failing(completion, answer):
    if answer == "31":
        raise ValueError("no such task")
    return 1.0


def hanging(completion, answer):
    if answer == "995":
        time.sleep(60)
    return 0.5


class Adjustable:
    def __call__(self, completion):
        return 1.0


adjustable = Adjustable()
