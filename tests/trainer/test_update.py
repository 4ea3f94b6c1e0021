"""The update: any split of an optimizer step into bins is the same step, and a bad step is no step."""

import copy
import json

import pytest
import torch

from grpo import GRPOConfig, GRPOTrainer, RunError
from grpo.batch import RolloutBuffer
from grpo.packing import pack
from grpo.scoring import RewardSpec, load_rewards, range_of_totals
from tests.tiny import tiny_model, tokenizer
from tests.tolerances import SPLIT, relative_error

ROWS = [{"prompt": f"sort {digits}", "answer": digits} for digits in ("31", "4142", "27", "995", "8", "70613")]


def length_reward(completion, answer):
    """Something that differs inside a group and is not a constant."""
    return sum(map(ord, completion)) % 7 / 7 + 0.1 * len(completion)


def make_trainer(tmp_path, model=None, rewards=length_reward, dtype=torch.float32, **changes):
    text = tokenizer()
    values = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 4,
        "prompts_per_step": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "activation_checkpointing": "none",
        "save_steps": 0,
        **changes,
    }
    model = model or tiny_model(vocab_size=len(text), dtype=dtype)
    return GRPOTrainer(model, rewards, GRPOConfig(**values), ROWS, processing_class=text)


def gradients_of(trainer, buffer):
    """Gradients of the whole step, caught before clipping and stepping."""
    caught = {}

    def stop(*_):
        caught.update({name: p.grad.clone() for name, p in trainer.policy.trainable().items() if p.grad is not None})

    handle = trainer.optimizer.register_step_pre_hook(stop)
    from grpo.trainer.update import update

    weights = copy.deepcopy(trainer.policy.module.state_dict())
    result, after = update(
        trainer.policy, trainer.optimizer, trainer.schedule, trainer.config, trainer.loss_knobs, buffer
    )
    trainer.policy.module.load_state_dict(weights)
    trainer.optimizer.state.clear()
    handle.remove()
    return caught, result, after


def rollouts_and_advantages(trainer):
    trainer.folder.open(resume=False)
    try:
        scored = trainer._sample_and_score(trainer.data.take(trainer.config.prompts_per_step))
        advantages = trainer._advantages(scored, None)
    finally:
        trainer.folder.close()
    return scored, advantages


@pytest.mark.parametrize("recipe", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_every_split_and_order_is_the_same_step(tmp_path, recipe, beta):
    trainer = make_trainer(tmp_path, dtype=torch.float64, recipe=recipe, beta=beta, max_grad_norm=1e9)
    scored, advantages = rollouts_and_advantages(trainer)
    results = []
    for capacity in (1, 37, 10_000):
        batches, totals = pack(scored, advantages, capacity, skip_zero_advantage=beta == 0)
        if beta:
            from grpo.trainer.update import add_reference_logprobs

            batches = add_reference_logprobs(trainer.policy, batches, 1.0)
        for order in (batches, batches[::-1]):
            results.append(gradients_of(trainer, RolloutBuffer(order, totals, {}))[:2])
    assert len(results[0][1].logprobs) > 4 and len(results[-1][1].logprobs) == 1
    wanted, first = results[0]
    for got, result in results[1:]:
        assert result.metrics["loss"] == pytest.approx(
            first.metrics["loss"], rel=SPLIT["float64"], abs=SPLIT["float64"]
        )
        assert max(relative_error(got[name], wanted[name]) for name in wanted) < 1e-9  # float32 advantages, fp64 sums
        assert result.metrics["entropy"] == pytest.approx(first.metrics["entropy"], rel=1e-9)


@pytest.mark.parametrize("recipe", ["dapo", "grpo", "dr_grpo"])
def test_gradient_of_the_whole_step_against_full_logits(tmp_path, recipe):
    """One graph over full float64 log-softmax, one row at a time, with the loop's loss; no packing, no kernel."""
    model = tiny_model(vocab_size=len(tokenizer()), dtype=torch.float64)
    trainer = make_trainer(tmp_path, model=model, recipe=recipe, max_grad_norm=1e9)
    scored, advantages = rollouts_and_advantages(trainer)
    batches, totals = pack(scored, advantages, 40, skip_zero_advantage=True)
    got, result, _ = gradients_of(trainer, RolloutBuffer(batches, totals, {}))

    rows, row_advantages = [], []
    for prompt, group, group_advantage in zip(
        scored.rollouts.prompts, scored.rollouts.completions, advantages, strict=True
    ):
        for completion, advantage in zip(group, group_advantage, strict=True):
            tokens = [*prompt.token_ids, *completion.token_ids]
            logprobs = model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
            start = len(prompt.token_ids)
            rows.append([logprobs[t - 1, tokens[t]] for t in range(start, len(tokens))])
            row_advantages.append(float(torch.tensor(advantage, dtype=torch.float32)))
    num_tokens = sum(len(row) for row in rows)
    terms = []
    for row, advantage in zip(rows, row_advantages, strict=True):
        weight = {
            "dapo": 1 / num_tokens,
            "grpo": 1 / (len(row) * len(rows)),
            "dr_grpo": 1 / (len(rows) * trainer.config.rollout.max_completion_length),
        }[recipe]
        terms += [-weight * torch.exp(value - value.detach()) * advantage for value in row]
    loss = torch.stack(terms).sum()
    model.zero_grad()
    loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    assert result.metrics["loss"] == pytest.approx(float(loss), abs=1e-9)
    assert max(relative_error(got[name], wanted[name]) for name in wanted) < 1e-6


def test_the_first_ratio_is_exactly_one_and_the_second_is_not(tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=2, max_steps=2)
    trainer.policy.module.train()
    seen = []
    from grpo.trainer import update as update_module

    original = update_module.policy_loss

    def watch(recipe, logprobs, *args, old_logprobs=None, **kwargs):
        seen.append(None if old_logprobs is None else (logprobs.detach() - old_logprobs).abs().max().item())
        return original(recipe, logprobs, *args, old_logprobs=old_logprobs, **kwargs)

    update_module.policy_loss = watch
    try:
        rows = list(trainer.steps())
    finally:
        update_module.policy_loss = original
    assert seen[0] is None  # old := sg(log-prob) of the same pass: the ratio is 1 bit for bit
    assert seen[-1] > 1e-4
    assert rows[0]["reward"] == rows[1]["reward"]  # the same rollouts, used twice


def test_kl_is_exactly_zero_before_the_first_update(tmp_path):
    """Policy and reference go through one scorer in the same bins: equal weights give equal bits."""
    for name, adapter in (("full", None), ("lora", {"r": 4})):
        trainer = make_trainer(tmp_path / name, beta=0.1, adapter=adapter, max_tokens_per_batch=37)
        rows = list(trainer.steps())
        assert rows[0]["kl"] == 0.0 and rows[1]["kl"] > 0.0


def test_skipping_zero_variance_groups_keeps_the_gradient(tmp_path):
    def some_constant(completion, answer):
        return 0.1 if len(answer) % 2 else length_reward(completion, answer)

    trainer = make_trainer(tmp_path, rewards=some_constant, prompts_per_step=6)
    scored, advantages = rollouts_and_advantages(trainer)
    assert any(all(a == 0 for a in group) for group in advantages)
    results = []
    for skip in (True, False):
        batches, totals = pack(scored, advantages, 60, skip_zero_advantage=skip)
        results.append(
            (gradients_of(trainer, RolloutBuffer(batches, totals, {}))[0], sum(b.input_ids.numel() for b in batches))
        )
    (skipped, few), (kept, many) = results
    assert few < many
    assert max(relative_error(skipped[name], kept[name]) for name in kept) < SPLIT["float32"]


@pytest.mark.parametrize("mode", ["skip", "keep", "drop"])
def test_a_step_with_nothing_to_learn_moves_no_bit(tmp_path, mode):
    trainer = make_trainer(tmp_path, rewards=lambda completion, answer: 1 / 3, zero_variance=mode, weight_decay=0.1)
    before = copy.deepcopy(trainer.policy.module.state_dict())
    rows = list(trainer.steps())
    after = trainer.policy.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [row["frac_reward_zero_std"] for row in rows] == [1.0] * 4
    assert trainer.schedule.position == 4
    assert not trainer.optimizer.state


def test_ten_such_steps_end_the_run_with_the_cause(tmp_path):
    trainer = make_trainer(tmp_path, rewards=lambda completion, answer: 0.0, max_steps=20)
    with pytest.raises(RunError, match="10 steps in a row had nothing to learn from"):
        trainer.train()
    assert (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_is_skipped_and_kept_for_a_look(tmp_path, where):
    trainer = make_trainer(tmp_path)
    steps = trainer.steps()
    next(steps)
    weights = copy.deepcopy(trainer.policy.module.state_dict())
    optimizer = {name: t.clone() for name, t in _optimizer_tensors(trainer).items()}
    position = trainer.schedule.position
    parameter = next(iter(trainer.policy.trainable().values()))
    if where == "gradient":
        handle = parameter.register_hook(lambda grad: grad * float("nan"))
    else:
        handle = trainer.policy.causal_lm.model.norm.register_forward_hook(
            lambda module, args, output: output * (float("nan") if module.training else 1.0)
        )
    row = next(steps)
    handle.remove()
    assert row["step"] == 2 and row["nonfinite"] >= 1
    assert row["grad_norm"] is None
    after = trainer.policy.module.state_dict()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    assert all(torch.equal(value, _optimizer_tensors(trainer)[name]) for name, value in optimizer.items())
    assert trainer.schedule.position == position
    assert (tmp_path / "run" / "faults" / "step_000002.safetensors").is_file()
    assert next(steps)["nonfinite" if False else "grad_norm"] is not None  # and the run goes on
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and len([json.loads(line) for line in text.splitlines()]) == 3


@pytest.mark.parametrize(
    ("phase", "knob"), [("rollout", "rollout.max_sequences"), ("update", "update.max_tokens_per_batch")]
)
def test_running_out_of_memory_names_the_knob_and_saves(tmp_path, phase, knob):
    trainer = make_trainer(tmp_path)
    steps = trainer.steps()
    next(steps)

    def out_of_memory(module, arguments):
        if module.training == (phase == "update"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    trainer.policy.causal_lm.model.register_forward_pre_hook(out_of_memory)
    with pytest.raises(RunError, match=rf"out of GPU memory in phase {phase} \(lower {knob}"):
        next(steps)
    assert (tmp_path / "run" / "checkpoints" / "step_000001").is_dir()


def test_three_non_finite_steps_end_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    for parameter in trainer.policy.trainable().values():
        parameter.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(RunError, match="3 steps in a row were not finite"):
        trainer.train()


def _optimizer_tensors(trainer):
    from grpo.optim import optimizer_state

    return optimizer_state(trainer.optimizer, trainer.policy.trainable())


def half(completion):
    return 0.5


@pytest.mark.parametrize(
    ("low_high", "weight", "cause"),
    [
        (None, 1.0, "all_right"),  # the highest that was seen
        ((0.0, 1.0), 1.0, "other"),
        ((0.0, 0.5), 1.0, "all_right"),
        ((0.0, 0.5), -1.0, "all_wrong"),
        ((0.5, 1.0), 2.0, "all_wrong"),
    ],
)
def test_a_declared_range_says_what_right_and_wrong_are(tmp_path, low_high, weight, cause):
    """Every completion gets 0.5."""
    spec = RewardSpec(half, range=low_high, weight=weight)
    trainer = make_trainer(tmp_path, rewards=[spec, RewardSpec(length_reward, weight=0.0)])
    row = next(iter(trainer.steps()))
    judged = 4 - row["groups/all_truncated"]  # which comes first
    assert judged > 0
    wanted = {name: judged if name == cause else 0 for name in ("all_right", "all_wrong")}
    assert {name: row[f"groups/{name}"] for name in wanted} == wanted
    assert row["frac_reward_zero_std"] == 1


def test_the_range_of_totals():
    def spec(**values):
        return RewardSpec(half, **values)

    def found(*specs, soft_overlong=False):
        return range_of_totals(load_rewards(specs, None, []), soft_overlong)

    assert found(spec(range=(0, 1))) == (0, 1)
    assert found(spec(range=(0, 1), name="a"), spec(range=(-1, 3), weight=-2.0, name="b")) == (-6, 3)
    assert found(spec(range=(0, 1), name="a"), spec(weight=0.0, name="b"), soft_overlong=True) == (-1, 1)
    assert found(spec(range=(0, 1), name="a"), spec(name="b")) is None


def test_a_model_on_the_cpu_is_billed_by_the_process(tmp_path):
    assert make_trainer(tmp_path).ledger.meter.host_only
