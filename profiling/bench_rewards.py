"""What calling a reward function costs, beside the function itself: inline, in a worker process, after a kill.

    python -m profiling.bench_rewards [--completions 512] [--output FILE]

Prints JSON: milliseconds per completion of `score` with one function that does nothing, for the sample and the batch
form; of `rewards.worker`: a warm call, a cold start, the first answer after a kill with and without a spare; and of the
worker that a run puts a reward function into.
Left out: GPU rewards, and functions that do something.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.batch import Completion, Prompt, Rollouts
from grpo.scoring import RewardSpec, close_pools, load_rewards, score
from profiling.measure import environment
from rewards.worker import Pool, WorkerTimeout

GROUP = 8
TEXT = "so the answer is 42. " * 50  # 1,050 characters


def nothing(completion: str, answer: str) -> float:
    """The sample form."""
    return 1.0


def hangs_at_will(completion: str, hang: bool) -> float:
    """Never ends where the row says so."""
    while hang:
        pass
    return 1.0


def nothing_batch(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The batch form, which is given everything."""
    return [1.0] * len(completions)


def rollouts_of(count: int) -> Rollouts:
    """`count` completions of about 1,000 characters and 256 tokens in groups of 8."""
    prompts = [Prompt(p, [1] * 64, {"prompt": TEXT, "answer": "42"}) for p in range(count // GROUP)]
    completion = Completion(list(range(256)), [-1.0] * 256, "stop", TEXT)
    return Rollouts(prompts, [[completion] * GROUP for _ in prompts], 0)


def median_ms(action: Callable[[], Any], repeats: int, per: int = 1) -> float:
    """Median milliseconds of `action`, divided by `per`."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(seconds) / per, 5)


def bench_score(count: int) -> dict[str, float]:
    """Milliseconds per completion of a whole `score`."""
    rollouts, found = rollouts_of(count), {}
    here = "profiling.bench_rewards:"
    for name, spec in {
        "inline sample": RewardSpec(nothing),
        "inline batch": RewardSpec(nothing_batch),
        "process sample, 1 worker": RewardSpec(here + "nothing", where="process", max_concurrency=1),
        "process sample, 4 workers": RewardSpec(here + "nothing", where="process"),
        "process batch": RewardSpec(here + "nothing_batch", where="process"),
    }.items():
        rewards = load_rewards([spec], None, ["prompt", "answer"])
        score(rollouts, rewards, step=1, max_steps=1)
        found[name] = median_ms(lambda r=rewards: score(rollouts, r, step=1, max_steps=1), 5, count)  # type: ignore[misc]
        close_pools(rewards)
    return found


def bench_worker() -> dict[str, float]:
    """Milliseconds of what happens to a pool of one worker."""
    start = time.perf_counter()
    with Pool("time:sleep", timeout=0.3) as pool:
        pool.wait_ready()
        found = {"cold start": round(1e3 * (time.perf_counter() - start), 3)}
        found["warm call"] = median_ms(lambda: pool.call([0]), 2000)
    for spare in (True, False):
        with Pool("time:sleep", timeout=0.3, spare=spare) as pool:
            pool.wait_ready()
            time.sleep(0.5)  # the spare, too, is warm
            answers = [_after_kill(pool) for _ in range(5)]
            found[f"next answer after a kill, {'with' if spare else 'without'} spare"] = round(max(answers), 3)
    return found


def bench_reward_worker() -> dict[str, float]:
    """Milliseconds of a run's own reward worker: one completion judged warm, and the first after one that hung."""
    spec = RewardSpec("profiling.bench_rewards:hangs_at_will", where="process", max_concurrency=1, timeout_s=0.5)
    rewards = load_rewards([spec], None, ["prompt", "hang"])
    completion = Completion([1, 2], [-1.0, -1.0], "stop", TEXT)

    def judge(hang: bool) -> float:
        rollouts = Rollouts([Prompt(0, [1], {"prompt": TEXT, "hang": hang})], [[completion]], 0)
        start = time.perf_counter()
        (value,) = score(rollouts, rewards, step=1, max_steps=1, on_error="none").rewards[0]
        assert value == (None if hang else 1.0)
        return 1e3 * (time.perf_counter() - start)

    judge(False)
    found = {"one completion, warm": round(statistics.median(judge(False) for _ in range(200)), 3)}
    after = []
    for _ in range(5):
        judge(True)
        after.append(judge(False))
        time.sleep(0.3)
    close_pools(rewards)
    return found | {"one completion, after a kill (the worst of five)": round(max(after), 3)}


def _after_kill(pool: Pool) -> float:
    try:
        pool.call([60])
    except WorkerTimeout:
        start = time.perf_counter()
        pool.call([0])
        milliseconds = 1e3 * (time.perf_counter() - start)
        time.sleep(0.3)
        return milliseconds
    raise AssertionError("a hang was not killed")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--completions", type=int, default=512)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result = {
        "environment": environment("cpu"),
        "cores": os.cpu_count(),
        "completions": options.completions,
        "score, ms per completion": bench_score(options.completions),
        "rewards.worker, ms": bench_worker(),
        "a run's reward worker, ms": bench_reward_worker(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
