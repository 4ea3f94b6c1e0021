"""Every way in which an engine's answer can break the protocol, and what each finish reason becomes."""

import math

import pytest

from grpo.errors import RunError
from grpo.rollout.completions import checked, to_completions
from grpo.rollout.engine import Sampling
from tests.tiny import tokenizer

STOP, OTHER_STOP = 1, 9


def sampling(**changes):
    values = dict(num_generations=2, max_completion_length=4, temperature=0.7, top_p=0.9, top_k=5, min_p=0.0)
    return Sampling(**{**values, "stop_token_ids": (STOP, OTHER_STOP), "seed": 5, **changes})


@pytest.mark.parametrize(
    ("ids", "reason", "becomes"),
    [
        ([5, 6, STOP], "stop", "stop"),
        ([5, OTHER_STOP], "stop", "stop"),
        ([5, 6, 7, 8], "length", "length"),
        ([5, 6], "length", "length"),  # the server's window may be shorter
        ([5], "abort", "abort"),
        ([], "abort", "abort"),
        ([5], "error", "error"),
        ([5], None, "error"),
        ([], None, "error"),
        ([], "stop", "error"),
    ],
)
def test_finish_reasons(ids, reason, becomes):
    token_ids, logprobs, found = checked((ids, [-0.5] * len(ids), reason), sampling())
    assert (token_ids, logprobs, found) == (ids, [-0.5] * len(ids), becomes)


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (([5, 6], [-1.0], "length"), "2 tokens but 1 log-probs"),
        (([5], [-1.0, -1.0], "length"), "1 tokens but 2 log-probs"),
        (([5, 6, 7, 8, 5], [-1.0] * 5, "length"), r"5 tokens \(asked for at most 4\)"),
        (([5, 6.0], [-1.0] * 2, "length"), "6.0 is no token id"),
        (([True], [-1.0], "length"), "True is no token id"),
        (([-1], [-1.0], "length"), "-1 is no token id"),
        ((["5"], [-1.0], "length"), "'5' is no token id"),
        (([5, 6], [-1.0] * 2, "stop"), r'"stop" after token 6 \(want one of the stop tokens \[1, 9\]\)'),
        (([5, STOP, 6], [-1.0] * 3, "length"), "1 tokens behind the stop token 1"),
        (([5, STOP, 6, STOP], [-1.0] * 4, "stop"), "2 tokens behind the stop token 1"),
        (([5], [-1.0], "repetition"), "finish reason 'repetition'"),
        (([5], [-1.0], "Stop"), "finish reason 'Stop'"),
        (([5], [3.5], "length"), r"3.5 is no log-prob \(does the engine report logits\?\)"),
        (([5], ["-1"], "length"), "'-1' is no log-prob"),
        (([5], [False], "length"), "False is no log-prob"),
    ],
)
def test_a_broken_answer_is_refused_in_one_line(answer, line):
    with pytest.raises(RunError, match=line) as caught:
        checked(answer, sampling())
    assert "\n" not in str(caught.value)


def test_missing_logprobs_are_nan_and_others_stay_as_they_are():
    _, found, _ = checked(([5, 6, 7, 8], [-9999.0, None, -8999.5, 0.0005], "length"), sampling())
    assert [math.isnan(value) for value in found] == [True, True, False, False]
    assert found[2:] == [-8999.5, 0.0005]
    _, found, _ = checked(([5, 6, 7], [math.nan, -math.inf, -9000], "length"), sampling())
    assert math.isnan(found[0])
    assert found[1] == -math.inf
    assert math.isnan(found[2])


def test_texts_are_decoded_once_in_order_without_the_eos():
    coder = tokenizer()
    calls = []

    class Spy:
        def batch_decode(self, rows, skip_special_tokens):
            calls.append(rows)
            return coder.batch_decode(rows, skip_special_tokens=skip_special_tokens)

    words = [coder.encode(text, add_special_tokens=False) for text in ("12", "7+")]
    stop = coder.eos_token_id
    asked = sampling(stop_token_ids=(stop,), max_completion_length=8)
    answers = [([*ids, stop], [-0.1] * (len(ids) + 1), "stop") for ids in words]
    found = to_completions([*answers, ([], [], "abort")], asked, Spy())
    assert [completion.text for completion in found] == ["12", "7+", ""]
    assert [completion.token_ids for completion in found] == [[*words[0], stop], [*words[1], stop], []]
    assert len(calls) == 1
    assert to_completions([], asked, Spy()) == []


def test_the_line_says_which_completion():
    with pytest.raises(RunError, match="completion 1 of 2: 1 tokens but 0 log-probs"):
        to_completions([([5], [-1.0], "length"), ([5], [], "length")], sampling(), tokenizer())
