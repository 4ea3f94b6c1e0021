"""`grpo check-rewards`: the configured reward functions on completions made from the data, before any GPU work.

Given a model (`difficulty`), also what it scores now: pass@k, a histogram of pass rates, and the share of groups that
teach nothing. Without it no weights are loaded; the tokenizer is, to know whether the chat template opens `<think>`.
Left out: what is tried and found (rewards/check.py), and printing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from grpo.config import GRPOConfig
from grpo.data import check_column, load_table, prompt_problem, with_system
from grpo.errors import InputError, clip
from grpo.reward_loading import PROVIDED
from grpo.scoring import Reward, load_rewards
from grpo.seeds import permutation

BANDS = 8
"""Bars of the histogram between the groups that are all wrong and those that are all right."""


def check_rewards(config: GRPOConfig, num_samples: int, skip: Sequence[str] = ()) -> Any:
    """The `rewards.check` report on `num_samples` rows of data.train, drawn by the seed.

    Raises:
        InputError: the data or the functions cannot be used.
    """
    from rewards.check import check

    rows = sampled_rows(config, num_samples)
    loaded = _loaded(config, rows)
    tokenizer = _tokenizer(config)
    prefill = prefill_of(tokenizer, rows[0]["prompt"])
    try:
        return check(
            [reward.function for reward in loaded],
            rows,
            weights=[reward.weight for reward in loaded],
            prefill=prefill,
            skip=tuple(skip),
            tokenize=None if tokenizer is None else lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            without=() if "prefill" in PROVIDED["sample"] else ("prefill",),
        )
    except ValueError as error:
        raise InputError(f"rewards: {clip(error, 200)}") from error


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


def _loaded(config: GRPOConfig, rows: Sequence[dict[str, Any]]) -> list[Reward]:
    entries = config.rewards.functions
    if not entries:
        raise InputError("rewards is empty (want at least one function: `rewards: [{function: module:name}]`)")
    columns = {name for row in rows for name in row}
    return load_rewards([entry.function for entry in entries], [entry.weight for entry in entries], columns)


def _tokenizer(config: GRPOConfig) -> Any:
    if not config.model.name_or_path:
        return None
    from grpo.model.load import load_tokenizer

    return load_tokenizer(config.model)


def prefill_of(tokenizer: Any, prompt: Any) -> str:
    """What the chat template writes of the completion itself: from `<think>` on, "" when it opens none."""
    if tokenizer is None or isinstance(prompt, str) or not getattr(tokenizer, "chat_template", None):
        return ""
    messages = list(prompt)
    bare = tokenizer.apply_chat_template(messages, tokenize=False)
    ready = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    header = ready.removeprefix(bare)
    place = header.find("<think>")
    return "" if place < 0 else header[place:]


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
