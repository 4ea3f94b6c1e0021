"""The step benchmark at toy size, on `hf`; how memory outside the KV cache is told from the cache."""

import json

import pytest

from profiling.bench_rollout import TOY
from profiling.bench_step import MemoryWatch, hash_reward, main, without_overlap


def test_the_json_and_the_table(tmp_path, capsys):
    out = tmp_path / "step.json"
    main(["--toy", "--device", "cpu", "--steps", "1", "--rows", "2", "--out", str(out)])
    sides = json.loads(out.read_text())["sides"]
    ours = sides["ours"]
    assert ours["engine"] == "hf" and len(ours["step_seconds"]) == 2
    assert ours["tokens_per_s"] == pytest.approx(TOY.tokens / ours["step_seconds"][1])
    assert 0 < ours["phases"]["rollout"] + ours["phases"]["update"] <= ours["median_seconds"]
    assert sides["trl"]["skipped"]
    assert "| trl | skipped: " in capsys.readouterr().out


class Llm:
    """Uses 100 bytes more while its cache is mapped; `during` is called half-way."""

    used, during = 10, staticmethod(lambda: None)

    def wake_up(self, tags=None):
        self.used += 100 if tags is None or "kv_cache" in tags else 5
        self.during()

    def sleep(self, level=1):
        self.during()
        self.used = 10


def test_the_cache_is_not_counted_and_changes_are_not_sampled():
    llm, watch = Llm(), MemoryWatch(50)
    watch.follow(llm, lambda: 100)
    watch.sample(lambda: llm.used)
    llm.wake_up(["weights"])
    watch.sample(lambda: llm.used)
    assert watch.peak == {True: 0, False: 15}
    llm.during = lambda: watch.sample(lambda: 10_000)  # half-way through a change
    llm.wake_up(tags=["kv_cache"])
    watch.sample(lambda: llm.used + 7)
    assert watch.peak == {True: 22, False: 15}
    llm.sleep(level=2)
    watch.sample(lambda: 12)
    assert watch.peak == {True: 22, False: 15}
    assert watch.row()["peak_outside_kv_gib"] == 22 / 2**30


def test_rewards_differ():
    assert len({hash_reward(f"t{i}") for i in range(8)}) > 1 and hash_reward("t3") == hash_reward("t3")


def test_phases_of_trl_add_up_to_its_step():
    timed = {"sync": 0.5, "generate": 8.0, "log-probs": 2.5, "rollout and scoring": 11.25, "loss forward": 2.75}
    found = without_overlap(timed, 20.5)
    assert sum(found.values()) == 20.5
    assert (found["scoring and rest"], found["backward and rest"]) == (0.25, 6.5)
