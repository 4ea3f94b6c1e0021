r"""Repetition penalty over n-grams.

    r = −penalty · (1 − distinct n-grams / n-grams),   0 for fewer than n + 1 units

Source: the n-gram penalties of arXiv 2502.03373 (section 4) and of public replications of DeepSeek-R1, in the form
that looks at all n-grams of a completion alike. Token ids need no word boundaries, so they work for every language;
words (split at white space) do not for Chinese or Japanese.
Small n punishes ordinary prose: what repeats by nature are words, what loops repeats dozens of tokens.
Left out: penalties per token.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def token_repetition(completion: str, completion_ids: Sequence[int], *, size: int = 40, penalty: float = 1.0) -> float:
    """`-penalty` times the share of n-grams of `size` token ids that stand there already; 0.0 for none.

    >>> token_repetition("…", [1, 2] * 4, size=2)  # (1, 2), (2, 1) of 7
    -0.7142857142857143
    >>> token_repetition("…", list(range(100)))
    0.0
    """
    return _penalty(completion_ids, size, penalty)


def word_repetition(completion: str, *, size: int = 20, penalty: float = 1.0) -> float:
    """`-penalty` times the share of n-grams of `size` words, in lower case, that stand there already.

    >>> word_repetition("so it is So it is so it is", size=3)  # 3 distinct ones of 7
    -0.5714285714285714
    """
    return _penalty(completion.lower().split(), size, penalty)


def _penalty(units: Sequence[Hashable], size: int, penalty: float) -> float:
    if not size > 0:
        raise ValueError(f"size is {size} (want at least 1)")
    num = len(units) - size + 1
    if num <= 1:
        return 0.0
    units = [numbers.setdefault(unit, len(numbers)) for numbers in [dict[Hashable, int]()] for unit in units]
    distinct = len({tuple(units[start : start + size]) for start in range(num)})
    return -penalty * (1 - distinct / num) if distinct < num else 0.0
