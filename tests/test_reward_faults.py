"""Hostile reward functions, in this process and in workers: each costs the completion it was judging, and nothing else."""

import functools
import gc
import math
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from grpo import GRPOConfig, GRPOTrainer
from grpo.batch import RolloutBuffer
from grpo.errors import InputError
from grpo.packing import pack
from grpo.scoring import RewardError, RewardSpec, close_pools, load_rewards, placement_lines, score
from tests import hostile_rewards as hostiles
from tests.rewards.test_worker import num_fds, survivors
from tests.test_scoring import TWO_BY_FOUR, flatten, make_rollouts, without_latencies
from tests.tiny import tiny_model, tokenizer
from tests.trainer.test_update import ROWS, gradients_of, length_reward, make_trainer, rollouts_and_advantages

HERE = "tests.hostile_rewards:"
COLUMNS = ["prompt", "answer"]


def length(completion):
    return len(completion)


def in_process(name, timeout=20.0, **options):
    return RewardSpec(HERE + name, where="process", timeout_s=timeout, **options)


def loaded(*specs):
    return load_rewards(list(specs), None, COLUMNS)


def judged(rewards, texts=TWO_BY_FOUR, on_error="none", **options):
    return score(make_rollouts(texts), rewards, step=3, max_steps=10, on_error=on_error, **options)


@pytest.fixture(scope="module")
def workers():
    """Both functions in processes with a short limit; afterwards nothing of them is left."""
    gc.collect()
    fds = num_fds()
    rewards = loaded(in_process("hostile", 1.5, max_concurrency=1), length)
    batch = loaded(in_process("hostile_batch", 5.0), length)
    seen = set()
    yield {"hostile": rewards, "hostile_batch": batch, "pids": seen}
    for each in (rewards, batch):
        seen |= set(each[0].pools[0].pids)
        close_pools(each)
    assert survivors(*seen) == []
    gc.collect()  # trainers of other tests hold two files of /proc each until they go
    assert num_fds() == fds


@pytest.fixture(scope="module")
def inline():
    return {"hostile": loaded(hostiles.hostile, length), "hostile_batch": loaded(hostiles.hostile_batch, length)}


def check_sample(rewards, name, words):
    """One bad completion of eight: it has no reward, the others have theirs, and "raise" ends in one line."""
    texts = [["a", f"!{name}", "ccc", "dddd"], TWO_BY_FOUR[1]]
    scored = judged(rewards, texts)
    assert scored.parts["hostile"] == [[1.0, None, 3.0, 4.0], [1.0, 1.0, 2.0, 1.0]]
    assert scored.rewards == [[2.0, None, 6.0, 8.0], [2.0, 2.0, 4.0, 2.0]]
    assert words in scored.columns["fault"][0][1]
    assert [fault for fault in flatten(scored.columns["fault"]) if fault] == [scored.columns["fault"][0][1]]
    assert scored.metrics["rewards/hostile/error_frac"] == scored.metrics["rewards/invalid_frac"] == 1 / 8
    assert scored.metrics["rewards/hostile/timeout_frac"] == ("its worker was killed" in words) / 8
    with pytest.raises(RewardError) as caught:
        judged(rewards, texts, "raise")
    line = str(caught.value)
    assert line.startswith('rewards[0] "') and words in line and "\n" not in line
    assert line.endswith("(step 3, prompt 41, generation 1)")


@pytest.mark.parametrize("name", hostiles.ACTS)
def test_hostile_function_in_this_process(inline, name):
    check_sample(inline["hostile"], name, hostiles.ACTS[name][1])


@pytest.mark.parametrize("name", hostiles.ACTS | hostiles.PROCESS_ACTS)
def test_hostile_function_in_a_worker(workers, name):
    before = workers["hostile"][0].pools[0].pids
    check_sample(workers["hostile"], name, (hostiles.ACTS | hostiles.PROCESS_ACTS)[name][1])
    after = workers["hostile"][0].pools[0].pids
    assert survivors(*(set(before) - set(after))) == []
    workers["pids"] |= set(before) | set(after)


@pytest.mark.parametrize("where", ["inline", "workers"])
@pytest.mark.parametrize("name", hostiles.BATCH_ACTS)
def test_hostile_batch_function(request, where, name):
    rewards = request.getfixturevalue(where)["hostile_batch"]
    texts = [[f"!{name}", "bb", "ccc", "dddd"]]
    scored = judged(rewards, texts)
    assert scored.rewards == [[None] * 4] and scored.parts["length"] == [[float(len(name) + 1), 2.0, 3.0, 4.0]]
    assert all(hostiles.BATCH_ACTS[name][1] in fault for fault in scored.columns["fault"][0])
    with pytest.raises(RewardError, match=r"\(step 3, prompt 41.*\)$"):
        judged(rewards, texts, "raise")
    assert judged(rewards).rewards[0] == [2.0, 4.0, 6.0, 8.0]


# --- a worker answers as an inline call does ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["talks", "talks_batch", "scores"])
def test_worker_is_given_and_gives_back_the_same(name):
    function = getattr(hostiles, name)
    there, here = loaded(in_process(name)), loaded(function)
    options = {"epoch": 1.5, "seed": 7}
    got, want = judged(there, on_error="raise", **options), judged(here, on_error="raise", **options)
    close_pools(there)
    assert (got.rewards, got.parts, got.columns) == (want.rewards, want.parts, want.columns)
    assert got.columns and without_latencies(got.metrics) == without_latencies(want.metrics)


def test_async_function_in_a_worker_is_killed_at_its_limit():
    rewards = loaded(in_process("later", 0.4), length)
    assert judged(rewards, [["!late", "bb"]]).parts["later"] == [[None, 2.0]]
    close_pools(rewards)


def test_metric_names_of_a_worker_are_capped():
    rewards = loaded(in_process("floods_metrics"))
    scored = judged(rewards, [["a", "b"]])
    close_pools(rewards)
    assert len(rewards[0].metric_names) == 64
    assert scored.metrics["rewards/floods_metrics/dropped_metrics"] == 2 * (100_000 - 64)


def test_arguments_that_are_no_json_cost_their_completions_only():
    rewards = load_rewards([in_process("talks")], None, COLUMNS)
    rollouts = make_rollouts(TWO_BY_FOUR, examples=[{"answer": b"x"}, {"answer": "b"}])
    scored = score(rollouts, rewards, step=1, max_steps=2, on_error="none")
    close_pools(rewards)
    assert scored.rewards[0] == [None] * 4 and all(isinstance(value, float) for value in scored.rewards[1])
    assert "cannot be given its arguments in a process: Object of type bytes" in scored.columns["fault"][0][0]


def test_pools_start_again_after_closing():
    rewards = loaded(in_process("hostile"))
    close_pools(rewards)
    assert rewards[0].pools == []
    assert judged(rewards).rewards[0] == [1.0, 2.0, 3.0, 4.0]
    close_pools(rewards)


def test_file_beside_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "near.py").write_text("FACTOR = 3.0")
    (tmp_path / "mine.py").write_text("import near\ndef triple(completion): return near.FACTOR * len(completion)")
    monkeypatch.chdir(tmp_path)
    rewards = loaded(RewardSpec("mine.py:triple", where="process", name="x3"))
    monkeypatch.chdir("/")
    assert judged(rewards).parts == {"x3": [[3.0, 6.0, 9.0, 12.0], [3.0, 3.0, 6.0, 3.0]]}
    close_pools(rewards)


# --- where functions may run ----------------------------------------------------------------------------------


class Stateful:
    def __call__(self, completion): ...
    def state_dict(self): ...
    def load_state_dict(self, state): ...


async def judge(completion): ...


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (RewardSpec(lambda completion: 1.0, where="process"), "want a function that a worker can import"),
        (RewardSpec(functools.partial(length), where="process"), "want a function that a worker can import"),
        (RewardSpec(hostiles.Adjustable(), where="process"), "want a function that a worker can import"),
        (RewardSpec(Stateful(), where="process"), "would keep its state_dict to itself"),
        (RewardSpec(judge, where="inline"), "where is inline (want async or process"),
        (RewardSpec(judge, where="gpu"), "where is gpu (want async or process"),
        (RewardSpec(length, where="async"), "where is async (want inline or process"),
        (RewardSpec(length, where="thread"), "where is 'thread' (want inline, process, async or gpu)"),
        (RewardSpec(length, timeout_s=5), "timeout_s is 5 (want none: what runs inline cannot be ended early)"),
        (RewardSpec(length, where="gpu", timeout_s=5), "what runs gpu cannot be ended early"),
        (RewardSpec(length, max_concurrency=2), "max_concurrency is 2 (want none"),
        (RewardSpec(HERE + "hostile", where="process", timeout_s=0), "timeout_s is 0 (want more than 0)"),
        (RewardSpec(HERE + "hostile", where="process", timeout_s=math.nan), "timeout_s is nan (want more than 0)"),
        (RewardSpec(HERE + "hostile_batch", where="process", max_concurrency=2), "it judges all in one call"),
        (RewardSpec(length, name="a/b"), "name is 'a/b' (want"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(spec, words):
    with pytest.raises(InputError) as caught:
        loaded(spec)
    [line] = caught.value.lines
    assert line.startswith("rewards[0] ") and words in line


def test_weights_stand_in_one_place():
    with pytest.raises(InputError, match="is a RewardSpec"):
        load_rewards([RewardSpec(length)], [1.0], COLUMNS)


def test_worker_that_cannot_start_is_told_before_training(tmp_path):
    (tmp_path / "forks.py").write_text(
        "import multiprocessing, os\n"
        "if os.environ.get('CUDA_VISIBLE_DEVICES') == '':\n    raise RuntimeError('not here')\n"
        "def f(completion): return 1.0"
    )
    fds = num_fds()
    with pytest.raises(InputError, match=r"no worker process starts: .*import failed: RuntimeError: not here"):
        loaded(RewardSpec(f"{tmp_path}/forks.py:f", where="process"), in_process("hostile"))
    assert num_fds() == fds


def test_limits_by_default_and_in_the_line_at_start():
    rewards = load_rewards(
        [RewardSpec(hostiles.slow, where="process"), in_process("talks_batch", 5), judge, length, lambda completion: 1.0],
        None, COLUMNS, timeout=3.0,
    )  # fmt: skip
    close_pools(rewards)
    assert [reward.timeout for reward in rewards] == [3.0, 5, 3.0, None, None]
    assert [reward.where for reward in rewards] == ["process", "process", "async", "inline", "inline"]
    assert placement_lines(rewards) == [
        "rewards in this process, without a time limit: length, <lambda> (a worker could not import it)",
        "rewards in one event loop: judge (3 s a call, all at a time)",
        "rewards in worker processes: slow (3 s a call, 4 at a time), talks_batch (5 s a call, 1 at a time)",
    ]


def test_the_configuration_says_the_same():
    from grpo.config import GRPOConfig

    entry = {"function": HERE + "slow", "where": "process", "timeout_s": 2, "max_concurrency": 3, "on_error": "none"}
    config = GRPOConfig(rewards={"functions": [entry, HERE + "hostile"], "timeout": 4})
    specs = [RewardSpec(**each.model_dump()) for each in config.rewards.functions]
    first, second = rewards = load_rewards(specs, None, COLUMNS, config.rewards.timeout)
    close_pools(rewards)
    assert (first.where, first.timeout, first.max_concurrency, first.on_error) == ("process", 2.0, 3, "none")
    assert (second.where, second.timeout, second.on_error) == ("inline", None, None)


# --- runs -----------------------------------------------------------------------------------------------------


def test_run_with_a_slow_a_failing_and_a_hanging_reward_finishes_and_reports_each(tmp_path):
    rewards = [length_reward, in_process("slow"), in_process("failing"), in_process("hanging", 1.0)]
    trainer = make_trainer(tmp_path, rewards=rewards, on_error="none", max_steps=2)
    pids = [pid for reward in trainer.rewards if reward.pools for pid in reward.pools[0].pids]
    assert len(pids) == 3 * 5
    rows = list(trainer.steps())
    assert [row["step"] for row in rows] == [1, 2] and all(math.isfinite(row["loss"]) for row in rows)

    files = sorted((tmp_path / "run" / "rollouts").iterdir())
    table = [one for path in files for one in pyarrow.parquet.read_table(path).to_pylist()]
    assert len(table) == 32
    for name, answer, late in (("failing", "31", False), ("hanging", "995", True)):
        share = sum(f"sort {answer}" in one["prompt"] for one in table) / 32
        assert share in (4 / 32, 8 / 32)
        assert sum(row[f"rewards/{name}/error_frac"] for row in rows) / 2 == share
        assert sum(row[f"rewards/{name}/timeout_frac"] for row in rows) / 2 == (share if late else 0)
    for one in table:
        assert (one["reward"] is None) == any(f"sort {answer}" in one["prompt"] for answer in ("31", "995"))
        assert (one.get("column/fault") is None) == (one["reward"] is not None)  # absent when a step has no fault
    assert all(0.02 <= row["rewards/slow/p50_s"] < 1 and row["rewards/slow/error_frac"] == 0 for row in rows)
    assert max(row["rewards/hanging/p99_s"] for row in rows) >= 1.0
    assert {"mean", "std", "in_group_std", "none_frac", "error_frac", "timeout_frac", "p50_s", "p99_s"} <= {
        name.rpartition("/")[2] for name in rows[0] if name.startswith("rewards/slow/")
    }
    assert survivors(*pids) == []  # ended with the run


def test_where_a_reward_runs_comes_from_the_configuration(tmp_path):
    config = {
        "functions": [
            {"function": HERE + "hanging", "where": "process", "name": "late", "on_error": "none"},
            {"function": HERE + "scores", "weight": 0.5},
        ],
        "timeout": 1.0,
    }
    text = tokenizer()
    values = dict(prompts_per_step=4, num_generations=2, max_completion_length=6, max_steps=1)
    trainer = GRPOTrainer(
        tiny_model(vocab_size=len(text)),
        args=GRPOConfig(output_dir=str(tmp_path / "run"), rewards=config, **values),
        train_dataset=ROWS,
        processing_class=text,
    )
    pids = [pid for reward in trainer.rewards if reward.pools for pid in reward.pools[0].pids]
    assert pids
    (row,) = trainer.steps()
    assert "rewards/late/timeout_frac" in row
    assert [reward.weight for reward in trainer.rewards] == [1.0, 0.5]
    assert survivors(*pids) == []


@pytest.mark.parametrize("where", ["inline", "process"])
def test_clean_completions_have_bitwise_the_gradients_of_a_run_that_masks_the_faulty_ones(tmp_path, where):
    """Faults against "no function applies", which leaves loss and baseline by definition."""

    def masked(completion, answer):
        return None if answer == "31" else length_reward(completion, answer)

    def paid(completion, answer):
        return None if answer == "31" else 1.0

    failing = in_process("failing") if where == "process" else hostiles.failing
    results = []
    for folder, rewards in (("a", [length_reward, failing]), ("b", [masked, paid])):
        trainer = make_trainer(tmp_path / folder, rewards=rewards, prompts_per_step=6, on_error="none")
        scored, advantages = rollouts_and_advantages(trainer)
        batches, totals = pack(scored, advantages, 10_000, skip_zero_advantage=True)
        results.append((scored, gradients_of(trainer, RolloutBuffer(batches, totals, {}))[0]))
        close_pools(trainer.rewards)
    (faulty, got), (clean, wanted) = results
    assert faulty.rewards == clean.rewards and sum(value is None for value in flatten(faulty.rewards)) == 4
    assert wanted.keys() == got.keys() and any(gradient.abs().max() > 0 for gradient in wanted.values())
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_importing_the_workers_side_is_light():
    """A worker needs neither torch nor the trainer."""
    rewards = loaded(in_process("hostile"))
    [pid, *_] = rewards[0].pools[0].pids
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    close_pools(rewards)


def test_the_sandbox_of_a_code_reward_is_named_at_the_start():
    from rewards.code import code_tests

    rewards = load_rewards([code_tests(tier="process"), length], None, ["prompt", "tests"])
    lines = placement_lines(rewards)
    (line,) = [line for line in lines if "does not protect against" in line]
    assert "tier process" in line
