r"""Length rewards, in tokens: n of a completion, L its limit.

    linear        1 − n / L, within 0 and 1
    soft overlong 0 up to L − B, then (L − B − n) / B, −1 beyond L                      (DAPO, arXiv 2503.14476, eq. 13)
    cosine        r_L + (r_0 − r_L)·(1 + cos(π·n / L)) / 2, with other r_0, r_L for right than for wrong answers, and
                  r_exceed at n ≥ L                                                       (arXiv 2502.03373, section 4)
    shorter       λ = ½ − (n − min n) / (max n − min n) over the group; wrong answers min(0, λ)
                                                                                 (Kimi k1.5, arXiv 2501.12599, eq. 8)

The first two judge one completion. The others wrap a reward that says what is right. Numbers are bound once:
`soft = functools.partial(soft_overlong, max_length=1024, buffer=128)`.
Left out: lengths in characters, targets given in the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.parts import Combined, Values, per_row


def length_linear(completion: str, completion_ids: Sequence[int], *, max_length: int) -> float:
    """1 for nothing, falling to 0 at `max_length` tokens. Alone it pays for empty answers: multiply it or gate it.

    >>> length_linear("…", [5] * 250, max_length=1000), length_linear("…", [5] * 2000, max_length=1000)
    (0.75, 0.0)
    """
    return max(0.0, 1 - len(completion_ids) / _positive("max_length", max_length))


def soft_overlong(completion: str, completion_ids: Sequence[int], *, max_length: int, buffer: int) -> float:
    """0 while `buffer` tokens are left, then falling to −1 at `max_length`; to be added to a reward for being right.

    >>> [soft_overlong("…", [5] * num, max_length=100, buffer=20) for num in (80, 90, 100, 101)]
    [0.0, -0.5, -1.0, -1.0]
    """
    if not 0 < buffer <= _positive("max_length", max_length):
        raise ValueError(f"buffer is {buffer} (want 1 to max_length, {max_length})")
    over = len(completion_ids) - (max_length - buffer)
    return max(-1.0, -over / buffer) if over > 0 else 0.0


def length_cosine(
    reward: Callable[..., Any],
    *,
    max_length: int,
    right: tuple[float, float] = (2.0, 1.0),
    wrong: tuple[float, float] = (-10.0, 0.0),
    exceed: float = -10.0,
    threshold: float = 1.0,
) -> Combined:
    """`reward`, replaced by a cosine of the length: short right answers above long ones, long wrong ones above short.

    Args:
        reward: says what is right: a value of at least `threshold`. Its None stays None.
        max_length: L, in tokens; `exceed` is the reward from there on.
        right, wrong: (r_0, r_L), the rewards at length 0 and at L. Defaults: the paper's.

    >>> def correct(completion, answer): return float(completion == answer)
    >>> shaped = length_cosine(correct, max_length=100)
    >>> shaped.__name__, [shaped(completion="7", answer="7", completion_ids=[5] * num) for num in (0, 50, 100)]
    ('correct', [2.0, 1.5, -10.0])
    """
    _positive("max_length", max_length)

    def shape(value: float | None, given: Mapping[str, Any]) -> float | None:
        num = len(given["completion_ids"])
        if value is None or num >= max_length:
            return None if value is None else exceed
        start, end = right if value >= threshold else wrong
        return end + (start - end) * (1 + math.cos(math.pi * num / max_length)) / 2

    return Combined([reward], per_row(shape), needs=("completion_ids",))


def shorter_correct(reward: Callable[..., Any], *, threshold: float = 1.0) -> Combined:
    """Among the completions of a prompt, +½ for the shortest right answer to −½ for the longest; wrong ones at most 0.

    The length term alone, to be added to `reward` with a small weight, and late: the paper switches it on after a
    while. Completions with equal prompts are one group. All of one length: 0. Its None stays None.

    >>> def correct(completion, answer): return float(completion == answer)
    >>> ids = [[5] * num for num in (10, 20, 30, 10)]
    >>> batch = dict(prompts=["2+5?"] * 4, completions=["7", "7", "7", "8"], answer=["7"] * 4, completion_ids=ids)
    >>> shorter_correct(correct)(**batch)
    [0.5, 0.0, -0.5, 0.0]
    """

    def shape(values: Sequence[Values], given: Mapping[str, Any]) -> Values:
        lengths = [len(ids) for ids in given["completion_ids"]]
        groups: dict[str, list[int]] = {}
        for row, prompt in enumerate(given["prompts"]):
            groups.setdefault(str(prompt), []).append(row)
        shaped: Values = [None] * len(lengths)
        for rows in groups.values():
            shortest, longest = min(lengths[row] for row in rows), max(lengths[row] for row in rows)
            for row in rows:
                if (value := values[0][row]) is not None:
                    ahead = 0.5 - (lengths[row] - shortest) / (longest - shortest) if longest > shortest else 0.0
                    shaped[row] = ahead if value >= threshold else min(0.0, ahead)
        return shaped

    return Combined([reward], shape, needs=("completion_ids", "prompts"), kind="batch", suffix="_shorter")


def _positive(name: str, value: int) -> int:
    if not value > 0:
        raise ValueError(f"{name} is {value} (want at least 1)")
    return value
