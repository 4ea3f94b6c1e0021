"""Rewards from rollouts: what functions are given, what they may return, faults, totals, metrics, isolation."""

import asyncio
import functools
import gc
import itertools
import math
import os
import random
import signal
import statistics
import sys
import time
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo.batch import Completion, Prompt, Rollouts
from grpo.scoring import (
    FaultBudget,
    RewardError,
    RewardSpec,
    RewardWarning,
    load_rewards,
    merge_scored,
    reward_states,
    score,
    select_groups,
)
from rewards import Score


def make_rollouts(texts, prompts=None, finish=None, examples=None, ids=None):
    """Rollouts of `texts` [P][G]; prompt ids 41, 42, …; `finish` {(p, g): reason}."""
    prompts = prompts or [f"question {p}" for p in range(len(texts))]
    examples = examples or [{"answer": f"a{p}"} for p in range(len(texts))]
    return Rollouts(
        [
            Prompt((ids or range(41, 41 + len(texts)))[p], [1, 2], {**examples[p], "prompt": prompts[p]})
            for p in range(len(texts))
        ],
        [
            [Completion([p, g], [-1.0, -1.0], (finish or {}).get((p, g), "stop"), text) for g, text in enumerate(group)]
            for p, group in enumerate(texts)
        ],
        policy_version=7,
    )


TWO_BY_FOUR = [["a", "bb", "ccc", "dddd"], ["e", "f", "gg", "h"]]


def run(functions, rollouts=None, weights=None, columns=("prompt", "answer"), **kwargs):
    functions = functions if isinstance(functions, list) else [functions]
    rewards = load_rewards(functions, weights, columns)
    kwargs = {"step": 3, "max_steps": 10, **kwargs}
    return score(rollouts or make_rollouts(TWO_BY_FOUR), rewards, **kwargs)


def fault_of(function, rollouts=None, **kwargs):
    with pytest.raises(RewardError) as caught:
        run(function, rollouts, **kwargs)
    line = str(caught.value)
    assert "\n" not in line
    assert caught.value.exit_code == 1
    return line


def flatten(groups):
    return list(itertools.chain.from_iterable(groups))


def without_latencies(metrics):
    return {name: value for name, value in metrics.items() if not name.endswith(("/p50_s", "/p99_s"))}


def returns(value):
    """A batch function that returns `value` (called, when it is a function of the number of completions)."""

    def fn(completions):
        return value(len(completions)) if callable(value) else value

    return fn


def length(completion):
    return len(completion)


# --- what functions are given --------------------------------------------------------------------------------


def test_batch_form_is_given_what_trl_gives():
    seen = {}

    def fn(**kwargs):
        seen.update(kwargs)
        return [0.0] * len(kwargs["completions"])

    def f(prompts, completions, **kwargs):
        return fn(prompts=prompts, completions=completions, **kwargs)

    run(f, make_rollouts([["x", "y"], ["z", "w"]], finish={(1, 0): "length"}), epoch=1.5)
    assert seen["prompts"] == ["question 0", "question 0", "question 1", "question 1"]
    assert seen["completions"] == ["x", "y", "z", "w"]
    assert seen["completion_ids"] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert seen["answer"] == ["a0", "a0", "a1", "a1"]
    assert seen["truncated"] == [False, False, True, False]
    state = seen["trainer_state"]
    assert (state.global_step, state.max_steps, state.epoch) == (2, 10, 1.5)  # two steps are done while step 3 is made
    with pytest.raises(AttributeError):
        state.global_step = 9
    assert set(seen) == {
        *("prompts", "completions", "completion_ids", "answer", "truncated"),
        *("trainer_state", "log_extra", "log_metric"),
    }


def test_chat_prompts_are_messages_in_the_batch_form_and_text_in_the_sample_form():
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    seen = []

    def batch(prompts, completions):
        seen.append((prompts, completions))
        return [0.0, 0.0]

    def sample(prompt, completion, messages):
        seen.append((prompt, completion, messages))
        return 0.0

    run([batch, sample], make_rollouts([["x", "y"]], prompts=[chat]))
    assistant = {"role": "assistant", "content": "x"}
    assert seen[0] == ([chat, chat], [[assistant], [{"role": "assistant", "content": "y"}]])
    assert seen[1] == (chat, "x", [*chat, assistant])


def test_messages_of_a_text_prompt_are_a_conversation():
    seen = []

    def sample(completion, messages):
        seen.append(messages)
        return 0.0

    run(sample, make_rollouts([["x"]], prompts=["hi"]))
    assert seen == [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]]


def test_sample_form_is_called_once_per_completion_in_order():
    def fn(completion, answer, completion_ids, truncated, prompt):
        return 100 * completion_ids[0] + 10 * completion_ids[1] + len(completion) + (0.5 if truncated else 0)

    scored = run(fn, make_rollouts(TWO_BY_FOUR, finish={(0, 1): "length"}))
    assert scored.rewards == [[1.0, 12.5, 23.0, 34.0], [101.0, 111.0, 122.0, 131.0]]
    assert scored.parts == {"fn": scored.rewards}
    assert scored.weights == {"fn": 1.0}
    assert scored.rollouts.policy_version == 7


def test_missing_cells_are_none_and_missing_columns_take_the_default():
    seen = []

    def needs(completion, answer):
        seen.append(answer)
        return 0.0

    def optional(completion, answer="default"):
        seen.append(answer)
        return 0.0

    rollouts = make_rollouts([["x"], ["y"]], examples=[{"answer": "a0"}, {}])
    run(needs, rollouts)
    run(optional, rollouts)
    assert seen == ["a0", None, "a0", "default"]


def test_only_what_is_named_is_passed():
    def strict(completions, answer):  # would fail on any other keyword
        return [float(a == "a0") for a in answer]

    assert run(strict).rewards == [[1.0] * 4, [0.0] * 4]


def test_partials_objects_and_bound_methods_are_called():
    class Judge:
        scale = 2.0

        def __call__(self, completion):
            return self.scale * len(completion)

        def method(self, completions):
            return [self.scale] * len(completions)

    def scaled(completion, factor):
        return factor * len(completion)

    scored = run([Judge(), Judge().method, functools.partial(scaled, factor=3)])
    assert scored.parts["Judge"][0] == [2.0, 4.0, 6.0, 8.0]
    assert scored.parts["method"][1] == [2.0] * 4
    assert scored.parts["scaled"][0] == [3.0, 6.0, 9.0, 12.0]


def test_mutating_arguments_harms_nobody():
    chat = [{"role": "user", "content": "hello"}]
    rollouts = make_rollouts([["x", "y"]], prompts=[chat], examples=[{"answer": ["a", {"b": 1}]}])

    def vandal(prompts, completions, completion_ids, answer):
        prompts[0][0]["content"] = "gone"
        prompts[1].clear()
        completions.clear()
        completion_ids[0].clear()
        answer[0][1]["b"] = 2
        return [0.0, 0.0]

    def vandal_sample(prompt, completion, completion_ids, answer):
        assert (prompt, completion_ids, answer) == ([{"role": "user", "content": "hello"}], [0, 0], ["a", {"b": 1}])
        prompt.clear(), completion_ids.append(3), answer[1].clear()
        return float(completion == "x")

    def witness(prompts, completions, completion_ids, answer):
        assert prompts[0] == chat and prompts[1] == chat and len(completions) == 2
        assert completion_ids == [[0, 0], [0, 1]] and answer == [["a", {"b": 1}]] * 2
        assert answer[0] is not answer[1] and prompts[0] is not prompts[1]
        return [1.0, 1.0]

    first = run(vandal, rollouts)
    with pytest.raises(RewardError):
        run(vandal_sample, rollouts)  # the second completion has other ids: the assertion inside is live
    second = run([vandal, witness], rollouts)
    assert second.parts["witness"] == [[1.0, 1.0]]
    assert first.rollouts is rollouts and rollouts.prompts[0].example["prompt"] == chat
    assert rollouts.completions[0][0].token_ids == [0, 0]


# --- what they may return ------------------------------------------------------------------------------------

ONE_TO_EIGHT = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]


@pytest.mark.parametrize(
    "value",
    [
        lambda n: list(range(1, n + 1)),
        lambda n: tuple(float(i) for i in range(1, n + 1)),
        lambda n: np.arange(1, n + 1),
        lambda n: np.arange(1, n + 1, dtype=np.float32),
        lambda n: [np.float16(i) for i in range(1, n + 1)],
        lambda n: [np.int8(i) for i in range(1, n + 1)],
        lambda n: torch.arange(1, n + 1),
        lambda n: torch.arange(1.0, n + 1, dtype=torch.bfloat16),
        lambda n: torch.arange(1.0, n + 1, requires_grad=True) * 1.0,
        lambda n: [torch.tensor(float(i), requires_grad=True) for i in range(1, n + 1)],
        lambda n: [np.array(i) for i in range(1, n + 1)],
        lambda n: [Score(i, note=i) for i in range(1, n + 1)],
        lambda n: np.array([i for i in range(1, n + 1)], dtype=object),
    ],
)
def test_accepted_types(value):
    scored = run(returns(value))
    assert scored.rewards == ONE_TO_EIGHT
    assert all(type(number) is float for group in scored.rewards for number in group)


def test_bools_and_numpy_bools_are_numbers():
    assert run(returns(lambda n: [True] * (n - 1) + [np.False_])).rewards == [[1.0] * 4, [1.0, 1.0, 1.0, 0.0]]


class BadFloat(float):
    def __float__(self):
        raise ValueError("no float today")


class NotANumber:
    def __float__(self):
        return 1.0


class BadRepr:
    def __repr__(self):
        raise RuntimeError("no repr")


ELEMENTS = [  # a hostile element, what the message says of it
    (math.nan, "returned nan (want a finite number; None means not applicable)"),
    (math.inf, "returned inf"),
    (-math.inf, "returned -inf"),
    (1e39, "returned 1e+39 (want at most 1e+06 in size)"),
    (-1e30, "returned -1e+30"),
    (1_000_001, "returned an int of 20 bits"),
    (10**400, "returned an int of 1329 bits"),
    (10**5000, "returned an int of"),
    (np.float64("nan"), "returned nan"),
    (np.float16("inf"), "returned inf"),
    (torch.tensor(math.nan), "returned nan"),
    ("0.5", "returned str '0.5' (want a number or None)"),
    (b"1", "returned bytes b'1'"),
    ({"score": 1.0}, "returned dict {'score': 1.0}"),
    ([1.0], "returned list [1.0]"),
    ((1.0,), "returned tuple (1.0,)"),
    (torch.tensor([1.0]), "returned Tensor tensor([1.])"),
    (np.array([1.0, 2.0]), "returned ndarray"),
    (np.ma.masked, "returned MaskedConstant"),
    (1 + 0j, "returned complex"),
    (np.complex64(1), "returned complex64"),
    (torch.tensor(1 + 0j), "returned complex"),
    (np.timedelta64(3, "s"), "returned timedelta64"),
    (Decimal("1"), "returned Decimal"),
    (Fraction(1, 2), "returned Fraction"),
    (NotANumber(), "returned NotANumber"),
    (BadRepr(), "returned BadRepr BadRepr that cannot be shown"),
    (BadFloat(1.0), "raised ValueError: no float today"),
    (Score(math.nan), "returned nan"),
    (Score("1"), "returned str '1'"),
    (lambda: 1.0, "returned function"),
]


@pytest.mark.parametrize(("element", "text"), ELEMENTS, ids=[text[:40] for _, text in ELEMENTS])
def test_hostile_elements_end_in_their_line_or_leave_the_others_alone(element, text):
    """REWARDS.md section 13: with raise the line names function, value and row; with none only that row is invalid."""

    def fn(completions):
        values = [i / 7 for i in range(len(completions))]
        values[6] = element
        return values

    line = fault_of(fn)
    assert line.startswith(f'rewards[0] "fn": {text}') and line.endswith("(step 3, prompt 42, generation 2)")

    scored = run([fn, length], weights=[0.3, 0.1], on_error="none")
    clean = run([returns(lambda n: [i / 7 for i in range(n)]), length], weights=[0.3, 0.1])
    assert scored.rewards[1][2] is None and scored.parts["fn"][1][2] is None
    assert scored.parts["length"] == clean.parts["length"]  # parts are kept, the total is not the sum of the rest
    flat, flat_clean = flatten(scored.rewards), flatten(clean.rewards)
    assert [a for i, a in enumerate(flat) if i != 6] == [a for i, a in enumerate(flat_clean) if i != 6]  # bitwise
    assert scored.metrics["rewards/fn/error_frac"] == 1 / 8 and scored.metrics["rewards/fn/none_frac"] == 0.0
    assert scored.metrics["rewards/invalid_frac"] == 1 / 8 and scored.metrics["rewards/length/error_frac"] == 0.0
    assert text in scored.columns["fault"][1][2] and scored.columns["fault"][0] == [None] * 4

    def sample(completion, completion_ids):
        return element if completion_ids == [1, 2] else 0.0

    assert text in fault_of(sample)


def generator(n):
    return (1.0 for _ in range(n))


CALLS = [  # a hostile return value, what the message says of it
    (None, "returned None (want a list, tuple, 1-D array or 1-D tensor of 8 numbers or None)"),
    (1.0, "returned float 1.0"),
    ([], "returned 0 values for 8 completions"),
    ([1.0] * 7, "returned 7 values for 8 completions"),
    ([1.0] * 9, "returned 9 values for 8 completions"),
    ([1.0], "returned 1 values for 8 completions"),
    (torch.ones(1), "returned 1 values for 8 completions"),
    (torch.tensor(1.0), "returned Tensor of shape ()"),
    (torch.ones(8, 1), "returned Tensor of shape (8, 1)"),
    (torch.ones(2, 4), "returned Tensor of shape (2, 4)"),
    (np.ones((8, 1)), "returned ndarray of shape (8, 1)"),
    (np.ma.masked_array(np.ones(8), mask=[0] * 7 + [1]), "returned MaskedArray"),
    ("11111111", "returned str '11111111'"),
    (b"11111111", "returned bytes"),
    (["1"] * 8, "returned str '1' (want a number or None)"),
    (np.array(["1"] * 8), "returned str_"),
    ({i: 1.0 for i in range(8)}, "returned dict"),
    ({1, 2, 3, 4, 5, 6, 7, 8}, "returned set"),
    (generator, "returned generator (want"),
    (lambda n: map(float, range(n)), "returned map"),
    ([[1.0]] * 8, "returned list [1.0]"),
    (1 + 1j, "returned complex"),
    (Score(1.0), "returned Score"),
]


@pytest.mark.parametrize(("value", "text"), CALLS, ids=[text[:40] for _, text in CALLS])
def test_hostile_return_values_are_a_fault_on_the_call(value, text):
    line = fault_of(returns(value))
    assert line.startswith(f'rewards[0] "fn": {text}') and "(step 3, prompt" in line
    scored = run([returns(value), length], on_error="none")
    assert scored.rewards == [[None] * 4] * 2
    assert scored.metrics["rewards/fn/error_frac"] == 1.0 and scored.metrics["rewards/invalid_frac"] == 1.0


def test_the_line_of_the_contract():
    one_prompt = make_rollouts([list("abcdefgh")])
    rewards = load_rewards([length, returns([1.0] * 7)], None, ["prompt"])
    with pytest.raises(RewardError) as caught:
        score(one_prompt, rewards, step=3, max_steps=10)
    assert str(caught.value) == 'rewards[1] "fn": returned 7 values for 8 completions (step 3, prompt 41)'

    def boom(completion):
        if completion == "c":
            raise ValueError("boom")
        return 0.0

    assert fault_of(boom, one_prompt) == 'rewards[0] "boom": raised ValueError: boom (step 3, prompt 41, generation 2)'
    many = fault_of(returns(None), make_rollouts([["x", "y"]] * 5))
    assert many.endswith("(step 3, prompts 41, 42, 43, …)")


def raiser(error):
    def fn(completions):
        raise error

    return fn


class BadStrError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("boom\n  second line"), "raised ValueError: boom second line"),
        (SystemExit(0), "raised SystemExit: 0"),
        (GeneratorExit(), "raised GeneratorExit"),
        (asyncio.CancelledError(), "raised CancelledError"),
        (RecursionError("deep"), "raised RecursionError: deep"),
        (MemoryError(), "raised MemoryError"),
        (StopIteration(3), "raised StopIteration: 3"),
        (AssertionError("x" * 500), "raised AssertionError: xxx"),
        (ValueError("\x1b[2Jgone"), "raised ValueError: �[2Jgone"),
        (BadStrError(), "raised BadStrError that cannot be shown"),
        (RewardError("mine"), "raised RewardError: mine"),
    ],
)
def test_exceptions_are_faults_with_their_text(error, text):
    line = fault_of(raiser(error))
    assert line.startswith(f'rewards[0] "fn": {text}') and len(line) < 300
    with pytest.raises(RewardError) as caught:
        run(raiser(error))
    assert caught.value.__cause__ is error  # for --debug
    assert run([raiser(error), length], on_error="none").rewards == [[None] * 4] * 2


def test_sys_exit_and_real_recursion():
    def leaves(completion):
        sys.exit(0)

    def endless(completion):
        return endless(completion)

    assert "raised SystemExit: 0" in fault_of(leaves)
    assert "raised RecursionError" in fault_of(endless)


@pytest.mark.parametrize("on_error", ["raise", "none"])
def test_keyboard_interrupt_passes(on_error):
    def stops(completion):
        raise KeyboardInterrupt

    async def stops_later(completion):
        await asyncio.sleep(0)
        raise KeyboardInterrupt

    before = random.getstate()
    for function in (stops, stops_later):
        with pytest.raises(KeyboardInterrupt):
            run(function, on_error=on_error)
    assert random.getstate() == before


def test_reading_the_result_may_fail():
    class Rows(list):
        def __iter__(self):
            raise ValueError("no reading")

    assert "raised ValueError: no reading (step 3, prompts 41, 42)" in fault_of(returns(Rows([1.0] * 8)))


# --- None, faults and totals ---------------------------------------------------------------------------------


def test_totals_are_the_weighted_sum_over_what_applies():
    table = {"a": [0.1, 0.2, None, None], "b": [1.0, None, 3.0, None], "c": [7.0, 7.0, None, 7.0]}

    def column(name):
        def fn(completions):
            return table[name]

        fn.__name__ = name
        return fn

    weights = {"a": 0.7, "b": -1.3, "c": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scored = run([column(name) for name in table], make_rollouts([list("wxyz")]), weights=list(weights.values()))
    expected = []
    for i in range(4):  # a function of weight 0 is a metric: alone it makes no reward
        terms = [weights[name] * table[name][i] for name in ("a", "b") if table[name][i] is not None]
        expected.append(math.fsum(terms) if terms else None)
    assert scored.rewards == [expected] and expected[3] is None
    assert scored.parts == {name: [values] for name, values in table.items()}
    assert scored.metrics["rewards/a/none_frac"] == 0.5 and scored.metrics["rewards/c/none_frac"] == 0.25
    assert scored.metrics["rewards/unscored_frac"] == 0.25 and scored.metrics["rewards/invalid_frac"] == 0.0


def test_totals_are_float64():
    scored = run([returns([0.1] * 8), length], weights=[1.0, 1e-9])
    assert scored.rewards[0] == [math.fsum([0.1, 1e-9 * n]) for n in (1, 2, 3, 4)]


def test_none_is_never_a_fault_and_a_fault_never_none():
    def some(completion):
        return None if completion in ("bb", "e", "f", "gg", "h") else 1.0

    with pytest.warns(RewardWarning) as caught:
        scored = run(some)
    assert scored.rewards == [[1.0, None, 1.0, 1.0], [None] * 4]
    assert "fault" not in scored.columns and scored.metrics["rewards/some/error_frac"] == 0.0
    assert scored.metrics["rewards/none_mixed_frac"] == 0.0  # those without any reward are not compared
    assert [str(w.message) for w in caught] == [
        "rewards: no function applies to prompt 41 (all returned None); such completions leave the loss"
    ]


def test_mixed_groups_are_counted_and_warned_of_once_a_run():
    def some(completion):
        return None if completion == "bb" else 1.0

    rewards = load_rewards([some, length], None, ["prompt"])
    with pytest.warns(RewardWarning) as caught:
        scored = score(make_rollouts(TWO_BY_FOUR), rewards, step=3, max_steps=10)
        score(make_rollouts(TWO_BY_FOUR), rewards, step=4, max_steps=10)
    assert scored.metrics["rewards/none_mixed_frac"] == 0.5
    (warning,) = caught
    assert str(warning.message).startswith('rewards[0] "some": None for some completions of prompt 41')


def test_what_the_engine_did_not_finish_is_shown_to_nobody():
    seen = []

    def batch(completions, answer):
        seen.extend(completions)
        assert len(answer) == len(completions)
        return [float(len(text)) for text in completions]

    rollouts = make_rollouts(TWO_BY_FOUR, finish={(0, 1): "abort", (1, 3): "error", (1, 0): "length"})
    scored = run([batch, length], rollouts)
    assert seen == ["a", "ccc", "dddd", "e", "f", "gg"]
    assert scored.rewards == [[2.0, None, 6.0, 8.0], [2.0, 2.0, 4.0, None]]
    assert scored.parts["length"] == [[1.0, None, 3.0, 4.0], [1.0, 1.0, 2.0, None]]
    assert scored.metrics["rewards/invalid_frac"] == 2 / 8 and scored.metrics["rewards/batch/none_frac"] == 0.0


def test_nothing_finished_calls_nothing():
    rollouts = make_rollouts([["a", "b"]], finish={(0, 0): "abort", (0, 1): "abort"})
    scored = run([raiser(ValueError()), length], rollouts)
    assert scored.rewards == [[None, None]] and scored.parts == {"fn": [[None, None]], "length": [[None, None]]}
    assert scored.metrics["rewards/invalid_frac"] == 1.0 and "reward" not in scored.metrics


# --- logging -------------------------------------------------------------------------------------------------


def test_log_metric_and_log_extra():
    def batch(completions, log_metric, log_extra):
        log_metric("depth", 1)
        log_metric("depth", torch.tensor(2.0))
        log_extra("upper", [text.upper() for text in completions])
        return [0.0] * len(completions)

    def sample(completion, log_metric, log_extra):
        log_metric("size", len(completion))
        if completion.startswith("d"):
            log_extra("why", "starts with d")
        return 0.0

    scored = run([batch, sample])
    assert scored.metrics["rewards/batch/metric/depth"] == 1.5
    assert scored.metrics["rewards/sample/metric/size"] == statistics.fmean([1, 2, 3, 4, 1, 1, 2, 1])
    assert scored.columns["batch/upper"] == [[t.upper() for t in group] for group in TWO_BY_FOUR]
    assert scored.columns["sample/why"] == [[None, None, None, "starts with d"], [None] * 4]


def test_notes_of_a_score():
    def judge(completion):
        return Score(
            1.0, size=len(completion), verdict="long" if len(completion) > 2 else None, good=len(completion) > 2
        )

    scored = run(judge)
    assert scored.rewards == [[1.0] * 4] * 2
    assert scored.metrics["rewards/judge/metric/size"] == 15 / 8 and scored.metrics["rewards/judge/metric/good"] == 0.25
    assert scored.columns["judge/verdict"] == [[None, None, "long", "long"], [None] * 4]


def test_metric_names_are_capped_over_the_run_and_rubbish_is_counted():
    def flood(completions, log_metric, log_extra, trainer_state):
        for i in range(100_000 // 100):
            log_metric(f"m{trainer_state.global_step}_{i}", 1.0)
        for i in range(70):
            log_extra(f"c{i}", completions)
        log_metric("m0_0", math.nan)
        log_metric("m0_0", 10**400)
        return [0.0] * len(completions)

    rewards = load_rewards([flood], None, ["prompt"])
    first = score(make_rollouts(TWO_BY_FOUR), rewards, step=1, max_steps=10)
    names = [name for name in first.metrics if name.startswith("rewards/flood/metric/")]
    assert len(names) == 64 and names[0] == "rewards/flood/metric/m0_0" and first.metrics[names[0]] == 1.0
    assert first.metrics["rewards/flood/dropped_metrics"] == 1000 - 64 + 6 + 2
    assert len(first.columns) == 64
    second = score(make_rollouts(TWO_BY_FOUR), rewards, step=2, max_steps=10)
    assert not [name for name in second.metrics if name.startswith("rewards/flood/metric/")]
    assert len(reward_states(rewards)["flood"]["metric_names"]) == 64


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda metric, extra: metric("x", "1"), "raised TypeError: log_metric('x', …): the value is str '1'"),
        (lambda metric, extra: metric("x", None), "raised TypeError: log_metric('x', …): the value is None"),
        (lambda metric, extra: metric(3, 1.0), "raised TypeError: 3 is no name to log under"),
        (lambda metric, extra: metric("a\nb", 1.0), "raised TypeError: 'a\\nb' is no name"),
        (lambda metric, extra: metric("x" * 101, 1.0), "raised TypeError"),
        (lambda metric, extra: extra("x", [1]), "raised ValueError: log_extra('x', …): 1 values for 8 completions"),
    ],
)
def test_senseless_logging_fails_where_it_is_called(call, text):
    def fn(completions, log_metric, log_extra):
        call(log_metric, log_extra)
        return [0.0] * len(completions)

    assert text in fault_of(fn)


def test_equal_columns_of_two_functions_do_not_collide():
    def one(completion, log_extra):
        log_extra("note", 1)
        return 0.0

    def two(completion, log_extra):
        log_extra("note", 2)
        return 0.0

    columns = run([one, two]).columns
    assert columns["one/note"] == [[1] * 4] * 2 and columns["two/note"] == [[2] * 4] * 2


# --- metrics -------------------------------------------------------------------------------------------------


def test_metrics_against_the_statistics_module():
    values = [[0.25, 1.0, None, 0.5], [2.0, 2.0, 2.0, 2.0], [None, None, 3.0, None], [None] * 4]

    def part(completions):
        return flatten(values)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scored = run([part, length], make_rollouts([["a", "bb", "ccc", "dddd"]] * 4), weights=[1.0, 0.5])
    numbers = [v for group in values for v in group if v is not None]
    totals = [0.5 * (g + 1) + (v or 0.0) for group in values for g, v in enumerate(group)]
    expected = {
        "reward": statistics.fmean(totals),
        "reward_std": statistics.stdev(totals),
        "rewards/part/mean": statistics.fmean(numbers),
        "rewards/part/std": statistics.stdev(numbers),
        "rewards/part/in_group_std": statistics.fmean([statistics.stdev([0.25, 1.0, 0.5]), 0.0]),
        "rewards/part/none_frac": 8 / 16,
        "rewards/part/error_frac": 0.0,
        "rewards/part/timeout_frac": 0.0,
        "rewards/length/mean": 2.5,
        "rewards/length/std": statistics.stdev([1, 2, 3, 4] * 4),
        "rewards/length/in_group_std": statistics.stdev([1, 2, 3, 4]),
        "rewards/length/none_frac": 0.0,
        "rewards/length/error_frac": 0.0,
        "rewards/length/timeout_frac": 0.0,
        "rewards/none_mixed_frac": 2 / 4,
        "rewards/invalid_frac": 0.0,
        "rewards/unscored_frac": 0.0,
    }
    assert without_latencies(scored.metrics) == pytest.approx(expected, abs=1e-12)
    assert scored.metrics["rewards/part/p50_s"] == scored.metrics["rewards/part/p99_s"]  # one call
    assert 0 < scored.metrics["rewards/length/p50_s"] <= scored.metrics["rewards/length/p99_s"] < 1


def test_equal_rewards_have_a_std_of_exactly_zero():
    """The mean of six 0.1 is not 0.1."""
    metrics = run(returns([0.1] * 6), make_rollouts([list("abc")] * 2)).metrics
    assert metrics["reward_std"] == metrics["rewards/fn/std"] == metrics["rewards/fn/in_group_std"] == 0.0


def test_wide_batch_without_spread_in_the_groups():
    """A large std over the batch says nothing when it is zero inside every group (trl#3857)."""
    metrics = run(returns([0.0] * 4 + [10.0] * 4)).metrics
    assert metrics["rewards/fn/std"] > 5 and metrics["rewards/fn/in_group_std"] == 0.0


def test_statistics_over_too_little_are_left_out():
    metrics = run(length, make_rollouts([["abc"]])).metrics
    assert metrics["reward"] == 3.0 and metrics["rewards/length/mean"] == 3.0
    assert not {"reward_std", "rewards/length/std", "rewards/length/in_group_std"} & set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())


# --- isolation -----------------------------------------------------------------------------------------------


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_reseeding_and_drawing_disturb_nothing():
    def reseeds(completion):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        return random.random() + np.random.rand() + float(torch.rand(()))

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    undisturbed = draws(), draws()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    first = draws()
    run(reseeds)
    with pytest.raises(RewardError):
        run([reseeds, raiser(ValueError())])
    assert (first, draws()) == undisturbed


def noise(completion):
    return sum(draws())


def test_draws_are_new_for_each_completion_step_and_seed_and_the_same_on_a_rerun():
    def flat(**kwargs):
        random.seed(random.SystemRandom().random()), np.random.seed(None), torch.seed()  # whatever was drawn before
        return flatten(run(noise, **kwargs).rewards)

    base = flat(step=3, seed=1)
    assert len(set(base)) == 8
    assert flat(step=3, seed=1) == base
    assert not set(flat(step=4, seed=1)) & set(base) and not set(flat(step=3, seed=2)) & set(base)


def test_draws_do_not_depend_on_the_other_functions_or_completions():
    alone = run(noise, make_rollouts([["x", "y"]], ids=[50])).rewards[0]
    other = run([raiser(ValueError()), noise], make_rollouts([["a", "b"], ["x", "y"]], ids=[9, 50]), on_error="none")
    assert other.parts["noise"][1] == alone


def test_generators_of_used_gpus_are_put_back(monkeypatch):
    state = ["cuda state"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(state))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: state.__setitem__(slice(None), states))

    def reseeds(completion):
        state[0] = "disturbed"
        return 0.0

    run(reseeds)
    assert state == ["cuda state"]


def test_working_directory_is_put_back_and_the_environment_warned_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET_A", "old-secret")
    (tmp_path / "sub").mkdir()

    def moves(completion):
        os.chdir(tmp_path / "sub")
        os.environ["SECRET_A"] = "new-secret"
        return 0.0

    rewards = load_rewards([moves], None, ["prompt"])
    with pytest.warns(RewardWarning) as caught:
        for step in (1, 2):
            score(make_rollouts(TWO_BY_FOUR), rewards, step=step, max_steps=10)
            assert Path.cwd() == tmp_path
            monkeypatch.setenv("SECRET_A", "old-secret")
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert "changed the working directory to" in texts[0] and "SECRET_A" in texts[1]
    assert "secret" not in texts[1].replace("SECRET_A", "")


def test_removed_working_directory_does_not_end_the_run(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(tmp_path)

    def removes(completion):
        if gone.exists():
            os.chdir(gone)
            gone.rmdir()
        return 0.0

    with pytest.warns(RewardWarning, match="changed the working directory to None"):
        run(removes)
    assert Path.cwd() == tmp_path


def test_kept_references_do_no_harm():
    kept = []

    def keeps(completions, log_metric, log_extra):
        kept.append((completions, log_metric, log_extra))
        return [0.0] * len(completions)

    scored = run(keeps)
    kept[0][0].clear()
    kept[0][1]("late", 1.0)
    kept[0][2]("late", ["x"] * 8)
    assert "keeps/late" not in scored.columns and "rewards/keeps/metric/late" not in scored.metrics
    assert [c.text for c in scored.rollouts.completions[0]] == TWO_BY_FOUR[0]


# --- async functions -----------------------------------------------------------------------------------------


def test_async_functions_run_together():
    async def batch(completions):
        await asyncio.sleep(0.2)
        return [1.0] * len(completions)

    async def sample(completion, answer):
        await asyncio.sleep(0.2)
        return float(len(completion))

    start = time.monotonic()
    scored = run([batch, sample, length])
    assert time.monotonic() - start < 1.0  # one after another: 1.8 s
    assert scored.parts["batch"] == [[1.0] * 4] * 2 and scored.parts["sample"] == scored.parts["length"]


def test_async_partials_objects_and_wrapped_functions():
    async def fn(completion, factor):
        return factor * len(completion)

    class Judge:
        async def __call__(self, completion):
            return 3.0

    def wrapped(completion):  # a plain function that hands on a coroutine
        return fn(completion, 2.0)

    scored = run([functools.partial(fn, factor=2.0), Judge(), wrapped])
    assert scored.parts["fn"] == scored.parts["wrapped"] == [[2.0, 4.0, 6.0, 8.0], [2.0, 2.0, 4.0, 2.0]]
    assert scored.parts["Judge"] == [[3.0] * 4] * 2


def test_async_faults_are_those_of_their_own_completion():
    async def fails(completion):
        await asyncio.sleep(0)
        if completion == "bb":
            raise ValueError("boom")
        if completion == "ccc":
            sys.exit(0)
        if completion == "dddd":
            raise asyncio.CancelledError
        return math.nan if completion == "f" else 1.0

    assert fault_of(fails) == 'rewards[0] "fails": raised ValueError: boom (step 3, prompt 41, generation 1)'
    scored = run(fails, on_error="none")
    assert scored.rewards == [[1.0, None, None, None], [1.0, None, 1.0, 1.0]]
    assert "SystemExit: 0" in scored.columns["fault"][0][2] and "CancelledError" in scored.columns["fault"][0][3]


def test_async_task_that_tears_the_loop_down_is_a_fault():
    async def dies():
        sys.exit(0)

    async def starts_it(completion):
        task = asyncio.ensure_future(dies())
        await asyncio.sleep(0.01)
        await task
        return 1.0

    assert "raised SystemExit: 0" in fault_of(starts_it)
    assert run([starts_it, length], on_error="none").rewards == [[None] * 4] * 2


def test_coroutines_are_closed_when_another_function_ends_the_step(recwarn):
    async def never_awaited(completion):
        return 1.0

    fault_of([never_awaited, raiser(ValueError("boom"))])
    gc.collect()
    assert not [w for w in recwarn if "never awaited" in str(w.message)]


def test_async_functions_in_a_notebook_whose_loop_is_running():
    async def fn(completion):
        await asyncio.sleep(0)
        return float(len(completion))

    async def cell():
        return run(fn).rewards

    assert asyncio.run(cell()) == [[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 2.0, 1.0]]


def test_ctrl_c_while_async_functions_run():
    async def presses(completion):
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(5)
        return 1.0

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run(presses, make_rollouts([["a"]]))
        assert time.monotonic() - start < 2
    finally:
        signal.signal(signal.SIGINT, before)


# --- limits of calls in this process -------------------------------------------------------------------------


def test_async_calls_are_cancelled_at_their_limit_and_the_others_answer():
    ended = []

    async def judge(completion):
        try:
            await asyncio.sleep(60 if completion == "bb" else 0.01)
        finally:
            ended.append(completion)
        return float(len(completion))

    spec = RewardSpec(judge, timeout_s=0.2)
    scored = run([spec, length], on_error="none")
    assert scored.parts["judge"] == [[1.0, None, 3.0, 4.0], [1.0, 1.0, 2.0, 1.0]]
    assert scored.rewards[0] == [2.0, None, 6.0, 8.0]
    assert scored.columns["fault"][0][1] == 'rewards[0] "judge": gave no answer within 0.2 s (cancelled)'
    assert scored.metrics["rewards/judge/timeout_frac"] == scored.metrics["rewards/judge/error_frac"] == 1 / 8
    assert 0.01 <= scored.metrics["rewards/judge/p50_s"] < 0.2 <= scored.metrics["rewards/judge/p99_s"]
    assert len(ended) == 8
    with pytest.raises(RewardError, match=r"0\.2 s \(cancelled\) \(step 3, prompt 41, generation 1\)"):
        run(spec)


def test_timeout_error_of_the_function_itself_is_no_timeout():
    async def judge(completion):
        raise TimeoutError("upstream")

    scored = run([RewardSpec(judge, timeout_s=5), length], on_error="none")
    assert scored.metrics["rewards/judge/error_frac"] == 1.0 and scored.metrics["rewards/judge/timeout_frac"] == 0.0
    assert "raised TimeoutError: upstream" in scored.columns["fault"][0][0]


def test_value_after_the_limit_is_none():
    async def stubborn(completion):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return 1.0

    assert run([RewardSpec(stubborn, timeout_s=0.05), length], on_error="none").rewards == [[None] * 4] * 2


@pytest.mark.parametrize(("limit", "most"), [(None, 8), (3, 3), (1, 1)])
def test_async_calls_at_a_time(limit, most):
    running, seen = 0, []

    async def judge(completion):
        nonlocal running
        running += 1
        seen.append(running)
        await asyncio.sleep(0.01)
        running -= 1
        return 1.0

    run(RewardSpec(judge, max_concurrency=limit, timeout_s=0.5))  # waiting for a turn is not in the limit
    assert max(seen) == most and len(seen) == 8


def test_on_error_of_one_function_goes_before_that_of_the_run():
    def fails(completion):
        raise ValueError("boom")

    assert run([RewardSpec(fails, on_error="none"), length]).rewards == [[None] * 4] * 2
    with pytest.raises(RewardError, match="boom"):
        run([RewardSpec(fails, on_error="raise"), length], on_error="none")


def test_a_function_on_the_gpu_keeps_no_gradients():
    def judge(completion):
        return float(torch.is_grad_enabled())

    assert flatten(run(RewardSpec(judge, where="gpu")).rewards) == [0.0] * 8
    assert flatten(run(judge).rewards) == [1.0] * 8


def test_watchdog_names_an_inline_call_that_does_not_return(monkeypatch):
    from grpo.reward_isolation import Watchdog

    monkeypatch.setattr(Watchdog, "interval", 0.1)

    def slow(completion):
        time.sleep(0.35 if completion == "ccc" else 0.001)
        return 1.0

    with pytest.warns(RewardWarning) as caught:
        run(slow)
    assert len(caught) == 3
    assert str(caught[0].message).startswith('rewards[0] "slow": still running after 0 s (')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(lambda completion: time.sleep(0.03) or 1.0)  # 0.24 s in all, but no call is long


# --- several batches, too many faults ------------------------------------------------------------------------


def test_merged_batches_are_what_one_call_would_have_given():
    def fn(completion, log_metric, log_extra):
        log_metric("size", len(completion))
        log_extra("text", completion)
        return None if completion == "x" else float(len(completion))

    first, second = [["a", "bb"], ["ccc", "dddd"]], [["x", "eeeee"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = run([fn, length], make_rollouts(first + second))
        merged = merge_scored(
            [run([fn, length], make_rollouts(first)), run([fn, length], make_rollouts(second, ids=[43]))]
        )
    assert merged.rewards == whole.rewards and merged.parts == whole.parts and merged.columns == whole.columns
    assert [p.id for p in merged.rollouts.prompts] == [41, 42, 43]
    assert without_latencies(merged.metrics) == pytest.approx(without_latencies(whole.metrics), abs=1e-12)
    assert merged.metrics.keys() == whole.metrics.keys()


def test_merging_keeps_columns_that_only_one_batch_has():
    good = run(length, make_rollouts([["a", "b"]]))

    def length_(completion):
        raise ValueError("boom")

    length_.__name__ = "length"
    bad = run(length_, make_rollouts([["c", "d"]]), on_error="none")
    merged = merge_scored([good, bad])
    assert merged.columns["fault"][0] == [None, None] and all(merged.columns["fault"][1])
    assert merged.metrics["rewards/invalid_frac"] == 0.5 and merged.metrics["reward"] == 1.0


def test_selected_groups_keep_their_rows_together():
    def fn(completion, log_extra):
        log_extra("text", completion)
        return float(len(completion))

    scored = run(fn, make_rollouts([["a", "bb"], ["ccc", "dddd"], ["eeeee", "f"]]))
    picked = select_groups(scored, [2, 0])
    assert [prompt.id for prompt in picked.rollouts.prompts] == [43, 41]
    assert picked.rewards == picked.parts["fn"] == [[5.0, 1.0], [1.0, 2.0]]
    assert picked.columns["fn/text"] == [[c.text for c in group] for group in picked.rollouts.completions]
    assert picked.metrics == scored.metrics


def scored_with(num_faults, num_completions=64, group=8):
    def fn(completions):
        return [math.nan] * num_faults + [1.0] * (num_completions - num_faults)

    return run(fn, make_rollouts([["x"] * group for _ in range(num_completions // group)]), on_error="none")


def test_fault_budget_counts_the_last_512_completions():
    budget = FaultBudget()
    budget.check(scored_with(25))
    for _ in range(7):
        budget.check(scored_with(0))
    budget.check(scored_with(25))  # the first 25 have left the window
    with pytest.raises(RewardError) as caught:
        budget.check(scored_with(1))
    assert str(caught.value) == (
        "rewards: 26 of the last 512 completions are invalid (want at most 5% of 512); the last: "
        'rewards[0] "fn": returned nan (want a finite number; None means not applicable) (prompt 41, generation 0)'
    )


def test_fault_budget_of_steps_without_a_group():
    def one_left(completions):
        return [None] * (len(completions) - 1) + [1.0]

    budget = FaultBudget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        barren = run(one_left)
    for _ in range(9):
        budget.check(barren)
    budget.check(scored_with(0))
    for _ in range(9):
        budget.check(barren)
    with pytest.raises(RewardError, match="10 steps in a row had no group with two valid rewards"):
        budget.check(barren)


def test_completions_to_which_nothing_applies_are_no_faults():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        none = run(lambda completions: [None] * 60 + [1.0] * 4, make_rollouts([["x"] * 8] * 8))
    budget = FaultBudget()
    for _ in range(20):
        budget.check(none)


def test_fault_budget_counts_what_the_engine_did_not_finish():
    budget = FaultBudget()
    aborted = make_rollouts([["x"] * 8] * 4, finish={(p, g): "error" for p in range(4) for g in range(7)})
    with pytest.raises(RewardError, match="28 of the last 32 .* the engine ended it with 'error'"):
        budget.check(run(length, aborted))


def test_fault_budget_state_goes_round():
    budget, twin = FaultBudget(), FaultBudget()
    budget.check(scored_with(20))
    twin.load_state_dict(budget.state_dict())
    for each in (budget, twin):
        with pytest.raises(RewardError) as caught:
            each.check(scored_with(6))
        assert "26 of the last 128" in str(caught.value)
    assert twin.state_dict() == budget.state_dict()


# --- cost ----------------------------------------------------------------------------------------------------


def test_a_call_costs_less_than_a_millisecond():
    def judge(completion, answer, prompt, completion_ids, **kwargs):
        return 0.0

    rollouts = make_rollouts([["some answer"] * 8] * 64, prompts=[[{"role": "user", "content": "question"}]] * 64)
    rewards = load_rewards([judge], None, ["prompt", "answer"])
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        score(rollouts, rewards, step=1, max_steps=10)
        best = min(best, (time.process_time() - start) / 512)
    assert best < 1e-3
