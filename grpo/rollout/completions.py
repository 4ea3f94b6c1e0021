"""What an engine answers, checked and turned into `Completion`s.

Every engine that is not our own decode loop passes here, so a protocol error ends the run in one line instead of
training on wrong numbers. Finish reasons, the only sign of truncation:

    "stop"            must end in one of `sampling.stop_token_ids`, else it is refused: the engine stops elsewhere.
                      Without any token it becomes "error": nothing was sampled.
    "length"          as it is
    "abort", "error"  as they are; scoring gives such a completion no reward, and it leaves its group's baseline
    None              becomes "error": the request did not end
    anything else     ("repetition", …) is refused: nobody asked for it

Left out: how an engine is asked. Nothing here knows of HTTP or of an engine's types.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from grpo.batch import Completion, FinishReason
from grpo.errors import RunError, clip
from grpo.rollout.engine import Sampling

MISSING = -9000.0  # servers floor log-probs at −9999 and report the same number for one that is absent
_ROUNDING = 1e-3  # a log-prob may exceed 0 by this much
_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")

Answer = tuple[Sequence[int], Sequence[float | None], str | None]  # token ids, log-probs, finish reason


def to_completions(answers: Sequence[Answer], sampling: Sampling, tokenizer: Any) -> list[Completion]:
    """Checked completions in the order of `answers`; texts are decoded in one batch, without special tokens.

    Raises:
        RunError: an answer breaks the protocol (see `checked` and the module's docstring).
    """
    found = []
    for place, answer in enumerate(answers):
        try:
            found.append(checked(answer, sampling))
        except RunError as error:
            raise RunError(f"completion {place} of {len(answers)}: {error}") from error
    texts = tokenizer.batch_decode([ids for ids, _, _ in found], skip_special_tokens=True) if found else []
    return [Completion(ids, logprobs, reason, text) for (ids, logprobs, reason), text in zip(found, texts, strict=True)]


def checked(answer: Answer, sampling: Sampling) -> tuple[list[int], list[float], FinishReason]:
    """One answer as a `Completion` wants it: finish reason mapped, missing log-probs (≤ −9000, None) as nan.

    Raises:
        RunError: ids that are no ids, one log-prob too few or too many, a log-prob above 0, a token behind a stop
            token, more tokens than asked for, or a finish reason that is not understood.
    """
    token_ids, logprobs, reason = answer
    ids = list(token_ids)
    wrong = next((token for token in ids if type(token) is not int or token < 0), None)
    if wrong is not None:
        raise RunError(f"{clip(repr(wrong), 40)} is no token id")
    if len(logprobs) != len(ids):
        raise RunError(f"{len(ids)} tokens but {len(logprobs)} log-probs")
    if len(ids) > sampling.max_completion_length:
        raise RunError(f"{len(ids)} tokens (asked for at most {sampling.max_completion_length})")
    early = next((place for place, token in enumerate(ids[:-1]) if token in sampling.stop_token_ids), None)
    if early is not None:
        raise RunError(f"{len(ids) - early - 1} tokens behind the stop token {ids[early]}")
    return ids, [_logprob(value) for value in logprobs], _finish_reason(ids, reason, sampling)


def _logprob(value: float | None) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RunError(f"{clip(repr(value), 40)} is no log-prob")
    if value > _ROUNDING:
        raise RunError(f"{value:.4g} is no log-prob (does the engine report logits?)")
    return math.nan if -math.inf < value <= MISSING else float(value)


def _finish_reason(ids: list[int], reason: str | None, sampling: Sampling) -> FinishReason:
    if reason is None or (reason == "stop" and not ids):
        return "error"
    if reason == "stop" and ids[-1] not in sampling.stop_token_ids:
        stops = clip(list(sampling.stop_token_ids), 60)
        raise RunError(f'finish reason "stop" after token {ids[-1]} (want one of the stop tokens {stops})')
    for known in _REASONS:
        if reason == known:
            return known
    raise RunError(f"finish reason {clip(repr(reason), 40)} (want one of {', '.join(_REASONS)})")
