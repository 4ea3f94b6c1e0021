"""`grpo check-rewards`: the configured reward functions on completions made from the data, before any GPU work.

Given a model (`difficulty`), also what it scores now: pass@k, a histogram of pass rates, and the share of groups that
teach nothing. Without it no weights are loaded; the tokenizer is, to know whether the chat template opens `<think>`.
Left out: what is tried and found (rewards/check.py), and printing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpo.config import GRPOConfig
from grpo.data import check_column, load_table, prompt_problem, with_system
from grpo.errors import InputError, clip
from grpo.reward_prefill import prefill_of
from grpo.scoring import Reward, RewardSpec, close_pools, load_rewards
from grpo.seeds import permutation

BANDS = 8
"""Bars of the histogram between the groups that are all wrong and those that are all right."""


@dataclass(frozen=True)
class CheckOptions:
    """How the functions are tried; see `rewards.check_report.Setting`.

    Attributes:
        samples: rows of data.train.
        skip: names of tries, or kinds of findings, to leave out.
        gold: column of the right answer; None: the first that is called like one.
        maximum: reward of a right answer; None: the top of `range`, where the configuration has it, else the highest.
        presentations: texts with `{answer}` in them, as `NAME=TEXT` or `TEXT`; empty: the usual ones.
        timeout_s: seconds of a call.
    """

    samples: int = 16
    skip: Sequence[str] = ()
    gold: str | None = None
    maximum: float | None = None
    presentations: Sequence[str] = ()
    timeout_s: float = 10.0


def check_rewards(config: GRPOConfig, options: CheckOptions = CheckOptions()) -> Any:
    """The `rewards.check` report on rows of data.train, drawn by the seed.

    Functions are called in a copy of this process that is killed at the limit, wherever a run calls them; those with
    `where: gpu` in this process, without a limit.

    Raises:
        InputError: the data, the functions or the options cannot be used.
    """
    from rewards.check import check

    given = _setting(options)
    rows = sampled_rows(config, options.samples)
    tokenizer = _tokenizer(config)
    prefill = prefill_of(tokenizer, rows[0]["prompt"])
    loaded = _loaded(config, rows, prefill)
    if options.maximum is None:
        given["maximum"] = {reward.name: reward.range[1] for reward in loaded if reward.range is not None}
    try:
        return check(
            [reward.function for reward in loaded],
            rows,
            weights=[reward.weight for reward in loaded],
            names=[reward.name for reward in loaded],
            in_process=[reward.name for reward in loaded if reward.where == "gpu"],
            prefill=prefill,
            tokenize=None if tokenizer is None else lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            **given,
        )
    except ValueError as error:
        raise InputError(f"rewards: {clip(error, 200)}") from error


def _setting(options: CheckOptions) -> dict[str, Any]:
    """Fields of `Setting`. Raises `InputError` for a presentation without a place for the answer."""
    if not 0 < options.timeout_s < 1e6:
        raise InputError(f"timeout is {options.timeout_s} (want more than 0)")
    given: dict[str, Any] = {"skip": tuple(options.skip), "gold": options.gold, "maximum": options.maximum}
    given["timeout_s"] = options.timeout_s
    forms = {}
    for text in options.presentations:
        name, named, form = text.partition("=")
        whole = not named or "{answer}" in name  # `x={answer}` without a name has no `=` before the answer
        forms[text if whole else name] = text if whole else form
        if "{answer}" not in text:
            raise InputError(f"presentations: {clip(text, 80)!r} has no place for the answer (want {{answer}} in it)")
    return given | ({"presentations": forms} if forms else {})


def sampled_rows(config: GRPOConfig, count: int) -> list[dict[str, Any]]:
    """`count` rows of data.train with the prompt as a run has it."""
    if config.data.train is None:
        raise InputError("data.train is null (want a path or a hub id)")
    if count < 1:
        raise InputError(f"samples is {count} (want at least 1)")
    table = load_table(config.data.train, "data.train")
    check_column(table, config.data.prompt_column, "data.prompt_column")
    size = len(table.rows)
    places = sorted(permutation(size, config.seed, 0)[:count])  # not every k-th row: data repeats itself
    rows = []
    for place in places:
        row = dict(table.rows[place])
        prompt = row.get(config.data.prompt_column)
        if problem := prompt_problem(prompt):
            raise InputError(f"{table.name}: row {place + 1}: {config.data.prompt_column} {problem}")
        rows.append({**row, "prompt": with_system(prompt, config.data.system_prompt)})
    return rows


def _loaded(config: GRPOConfig, rows: Sequence[dict[str, Any]], prefill: str | None) -> list[Reward]:
    entries = config.rewards.functions
    if not entries:
        raise InputError("rewards is empty (want at least one function: `rewards: [{function: module:name}]`)")
    columns = {name for row in rows for name in row}
    loaded = load_rewards(
        [RewardSpec(**entry.model_dump()) for entry in entries], None, columns, config.rewards.timeout, prefill
    )
    close_pools(loaded)  # they start, which is worth knowing, and are not needed
    return loaded


def _tokenizer(config: GRPOConfig) -> Any:
    if not config.model.name_or_path:
        return None
    from grpo.model.load import load_tokenizer

    return load_tokenizer(config.model)


# --- difficulty ----------------------------------------------------------------------------------------------


def measure_difficulty(config: GRPOConfig, num_prompts: int, console: Any) -> dict[str, Any]:
    """What the model scores on `num_prompts` prompts of data.train, sampled as in training.

    Returns:
        the metrics of `evaluate_rollouts` (pass@k up to G = rollout.num_generations); `zero_variance_frac`, of it
        `all_right_frac` and `all_wrong_frac`, shares of groups whose valid rewards are all equal (to 12 digits) and
        right or not; `histogram`, the number of prompts by pass rate in BANDS + 2 bars: 0, between, 1.
    """
    from grpo.evaluate import evaluate_rollouts
    from grpo.rollout.engine import Sampling
    from grpo.seeds import seed_for
    from grpo.trainer.build import build_parts

    parts = build_parts(config, None, None, (None, None), None, None, console)
    sampling = Sampling.of(config.rollout, parts.stop_token_ids, seed_for(config.seed, "difficulty"))
    prompts = [replace(prompt) for prompt in parts.data.take(min(num_prompts, len(parts.data.prompts)))]
    with parts.engine.awake():
        parts.engine.load_weights(parts.policy)
        rollouts = parts.engine.generate(prompts, sampling)
    threshold = config.evaluation.pass_threshold
    metrics, scored = evaluate_rollouts(rollouts, parts.rewards, threshold, seed=config.seed)
    return {**metrics, **group_statistics(scored.rewards, threshold)}


def group_statistics(rewards: Sequence[Sequence[float | None]], threshold: float) -> dict[str, Any]:
    """Groups without signal, and prompts by pass rate, of rewards [P][G]; see `measure_difficulty`."""
    histogram, flat, right, wrong = [0] * (BANDS + 2), 0, 0, 0
    for group in rewards:
        rate = statistics.fmean(value is not None and value >= threshold for value in group)
        histogram[0 if rate == 0 else BANDS + 1 if rate == 1 else 1 + int(rate * BANDS)] += 1
        valid = {round(value, 12) for value in group if value is not None}
        flat += len(valid) <= 1
        right += len(valid) == 1 and min(valid) >= threshold
        wrong += len(valid) == 1 and min(valid) < threshold
    shares = {"zero_variance_frac": flat, "all_right_frac": right, "all_wrong_frac": wrong}
    return {name: count / len(rewards) for name, count in shares.items()} | {"histogram": histogram}
