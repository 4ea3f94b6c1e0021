import itertools
import math

import pytest

from grpo.batch import Completion, Prompt, Rollouts
from grpo.evaluate import evaluate_rollouts, pass_at_k
from grpo.scoring import load_rewards


def test_pass_at_k_by_drawing_every_subset():
    for n, c in itertools.product(range(1, 7), range(7)):
        if c > n:
            continue
        right = [index < c for index in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_k_beyond_the_samples_is_refused():
    with pytest.raises(ValueError, match="k is 5"):
        pass_at_k(4, 1, 5)


def test_rewards_see_where_the_run_stands():
    seen = []

    def reward(completion, trainer_state):
        seen.append((trainer_state.global_step, trainer_state.max_steps))
        return 1.0

    rollouts = Rollouts([Prompt(0, [1], {"prompt": "x"})], [[Completion([4], [-1.0], "stop", "a")]], 0)
    evaluate_rollouts(rollouts, load_rewards([reward], None, {"prompt"}), 1.0, step=7, max_steps=9)
    assert seen == [(7, 9)]


def test_summary_of_rollouts_by_hand():
    texts = [["a", "aa", "b", "c"], ["b", "b", "c", "c"], ["a", "a", "a", "broken"]]

    def reward(completion):
        if completion == "broken":
            raise ValueError
        return {"a": 1.0, "aa": 1.0, "b": 0.5}.get(completion, 0.0)

    rollouts = Rollouts(
        [Prompt(p, [1], {"prompt": "x"}) for p in range(3)],
        [
            [
                Completion([4] * (g + 1), [-1.0] * (g + 1), "stop" if g else "length", text)
                for g, text in enumerate(group)
            ]
            for group in texts
        ],
        0,
    )
    metrics, scored = evaluate_rollouts(rollouts, load_rewards([reward], None, {"prompt"}), pass_threshold=1.0)
    assert metrics["accuracy"] == metrics["mean@1"] == pytest.approx((2 / 4 + 0 + 3 / 4) / 3)
    assert metrics["pass@2"] == pytest.approx(((1 - 1 / 6) + 0 + 1) / 3)
    assert metrics["pass@4"] == pytest.approx(2 / 3)
    assert metrics["reward"] == pytest.approx((1 + 1 + 0.5 + 0.5 + 0.5 + 3) / 11)
    assert metrics["invalid_frac"] == pytest.approx(1 / 12)
    assert metrics["completions/mean_length"] == 2.5
    assert metrics["completions/clipped_ratio"] == 0.25
    assert scored.rewards[2][3] is None and not math.isnan(metrics["reward"])
