"""Refilling groups without variance, and KL in the reward, against doing it by hand."""

import math

import pyarrow.parquet
import pytest
import torch

from grpo.algorithm import group_advantages
from grpo.batch import Completion, Prompt, Rollouts, ScoredRollouts
from grpo.scoring import merge_scored, select_groups
from tests.trainer.test_update import make_trainer


def odd_answers_only(completion, answer):
    """No variance in groups whose answer has an even number of digits."""
    return float(len(completion) % 3) if len(answer) % 2 else 1.0


def test_refill_samples_others_and_logs_everything(tmp_path):
    trainer = make_trainer(
        tmp_path, rewards=odd_answers_only, zero_variance="refill", prompts_per_step=3, max_steps=1, max_refill_rounds=4
    )
    (row,) = list(trainer.steps())
    sampled = 3 + int(row["groups/refilled"])
    assert row["groups/refilled"] > 0 and trainer.data.consumed == sampled
    assert row["step_tokens"] == trainer.num_tokens
    table = pyarrow.parquet.read_table(tmp_path / "run" / "rollouts" / "step_000001.parquet").to_pylist()
    groups = {}
    for one in table:
        groups.setdefault(one["prompt_id"], []).append(one["reward"])
    assert len(groups) == 3
    varied = sum(len(set(rewards)) > 1 for rewards in groups.values())
    constant_share = row["frac_reward_zero_std"]
    assert varied == min(3, round(sampled * (1 - constant_share)))


def test_refill_is_bounded(tmp_path):
    trainer = make_trainer(
        tmp_path,
        rewards=lambda completion, answer: 1.0,
        zero_variance="refill",
        prompts_per_step=2,
        max_steps=1,
        max_refill_rounds=2,
    )
    (row,) = list(trainer.steps())
    assert trainer.data.consumed == 2 + 2 * 2
    assert row["reward"] == 1.0 and row["frac_reward_zero_std"] == 1.0


def test_the_overlong_penalty_is_a_part_of_its_own(tmp_path):
    trainer = make_trainer(tmp_path, rewards=lambda completion: 1.0, max_steps=1, soft_overlong_cache=4)
    (row,) = list(trainer.steps())
    table = pyarrow.parquet.read_table(tmp_path / "run" / "rollouts" / "step_000001.parquet").to_pylist()
    for one in table:
        n = one["num_tokens"]
        penalty = 0.0 if n <= 2 else (2 - n) / 4
        assert one["reward/soft_overlong"] == penalty and one["reward"] == 1.0 + penalty
    assert row["reward"] == pytest.approx(sum(one["reward"] for one in table) / len(table))
    assert row["rewards/soft_overlong/mean"] == pytest.approx(row["reward"] - 1.0)
    assert any(one["advantage"] for one in table)  # length is now what teaches


@pytest.mark.parametrize(
    ("every", "iterations", "wanted"), [(1, 1, [1, 2, 3, 4, 5, 6]), (2, 1, [1, 2, 4, 6]), (3, 2, [1, 3, 5]), (0, 1, [])]
)
def test_which_steps_leave_their_rollouts(tmp_path, every, iterations, wanted):
    make_trainer(tmp_path, max_steps=6, rollouts_every_steps=every, num_iterations=iterations).train()
    files = sorted((tmp_path / "run" / "rollouts").glob("*")) if every else []
    assert [int(path.stem.removeprefix("step_")) for path in files] == wanted


def scored_of(rewards, prompt_ids):
    completions = [[Completion([1], [-0.1], "stop", str(value)) for value in group] for group in rewards]
    prompts = [Prompt(p, [1], {"prompt": "x"}) for p in prompt_ids]
    flat = [v for group in rewards for v in group if v is not None]
    metrics = {"reward": sum(flat) / len(flat), "rewards/f/error_frac": prompt_ids[0] / 10}
    return ScoredRollouts(Rollouts(prompts, completions, 3), rewards, {"f": rewards}, {"f": 2.0}, {}, metrics)


def test_merge_and_select_by_hand():
    whole = merge_scored([scored_of([[1.0, 2.0], [3.0, None]], [0, 1]), scored_of([[10.0, 20.0]], [7])])
    values = [1.0, 2.0, 3.0, 10.0, 20.0]
    mean = sum(values) / 5
    assert whole.metrics["reward"] == pytest.approx(mean)
    assert whole.metrics["reward_std"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 4))
    assert whole.metrics["rewards/f/error_frac"] == pytest.approx((2 * 0.0 + 1 * 0.7) / 3)
    picked = select_groups(whole, [0, 2])
    assert [p.id for p in picked.rollouts.prompts] == [0, 7]
    assert picked.rewards == [[1.0, 2.0], [10.0, 20.0]] and picked.metrics == whole.metrics


@pytest.mark.parametrize("recipe", ["dapo", "reinforce_pp"])
def test_kl_in_the_reward_by_hand(tmp_path, recipe):
    beta = 0.3
    trainer = make_trainer(
        tmp_path, dtype=torch.float64, recipe=recipe, beta=beta, kl="k1", kl_in="reward", max_tokens_per_batch=40
    )
    with torch.no_grad():
        for parameter in trainer.policy.trainable().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trainer.folder.open(resume=False)
    scored = trainer._sample_and_score(trainer.data.take(4))
    k1 = trainer._k1_of_reward(scored)
    trainer.folder.close()
    model, reference = trainer.policy.causal_lm.eval(), trainer.policy._reference.eval()

    def logprobs(net, prompt, completion):
        tokens = [*prompt.token_ids, *completion.token_ids]
        with torch.no_grad():
            values = net(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
        start = len(prompt.token_ids)
        return torch.stack([values[t - 1, tokens[t]] for t in range(start, len(tokens))])

    wanted = {}
    for p, (prompt, group) in enumerate(zip(scored.rollouts.prompts, scored.rollouts.completions, strict=True)):
        for g, completion in enumerate(group):
            wanted[p * 4 + g] = logprobs(model, prompt, completion) - logprobs(reference, prompt, completion)
    assert k1.keys() == wanted.keys()
    assert all(torch.allclose(k1[row].double(), wanted[row], atol=1e-5) for row in wanted)
    assert max(float(values.abs().max()) for values in wanted.values()) > 0.01

    if recipe == "dapo":
        penalised = [
            [value - beta * float(wanted[p * 4 + g].sum()) for g, value in enumerate(group)]
            for p, group in enumerate(scored.rewards)
        ]
        by_hand = group_advantages(ScoredRollouts(scored.rollouts, penalised, {}), recipe=recipe, scale_rewards="none")
        got = trainer._advantages(scored, k1)
        assert [v for group in got for v in group] == pytest.approx([v for group in by_hand for v in group], abs=1e-5)
        return
    trainer.folder.open(resume=False)
    trainer.data.consumed = 0
    buffer = trainer._collect()
    trainer.folder.close()
    returns = {
        row: [scored.rewards[row // 4][row % 4] - beta * float(values[t:].sum()) for t in range(len(values))]
        for row, values in wanted.items()
    }
    flat = torch.tensor([value for values in returns.values() for value in values], dtype=torch.float64)
    for batch in buffer.batches:
        bounds = batch.completion_cu_seqlens.tolist()
        for place, row in enumerate(batch.row_ids.tolist()):
            got = batch.advantages[batch.scored_index[bounds[place] : bounds[place + 1]]].double()
            by_hand = (torch.tensor(returns[row], dtype=torch.float64) - flat.mean()) / (flat.std() + 1e-8)
            assert torch.allclose(got, by_hand, atol=1e-5)
