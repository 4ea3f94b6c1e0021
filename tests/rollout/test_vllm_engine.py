"""The vLLM engine on a GPU. Each scenario runs once in a process of its own, since a process can hold one engine only;
the tests then judge its findings. Needs CUDA and the tested vLLM; about 15 s a scenario.
"""

import functools
import importlib.util
import json
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm"),
]
KINDS = ["lora", "own", "full", "four_bit"]
MIB = 2**20


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")

    @functools.cache
    def run(name):
        command = [sys.executable, "-m", "tests.rollout.vllm_scenarios", name, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        assert done.returncode == 0 and lines, done.stderr[-3000:]
        return json.loads(lines[-1])

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_sampler_log_probs_are_those_of_the_distribution_sampled(findings, kind):
    """At temperature 0.7, under top-p and top-k, and greedy: what is left is bfloat16."""
    found = findings(kind)
    for name in ("plain", "cut", "greedy"):
        assert found[name]["tokens"] > 100
        assert found[name]["mean"] < 0.06, (name, found[name])
        assert found[name]["excluded"] <= 0.02 * found[name]["tokens"], (name, found[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_depends_on_its_seed_and_not_on_its_place(findings, kind):
    found = findings(kind)
    assert found["distinct"] == 16
    assert min(found["again"], found["reordered"], found["interrupted"]) > 0.7  # a flip by rounding ends the agreement


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_process_is_moved(findings, kind):
    found = findings(kind)
    assert found["generators_kept"]
    assert found["weights_kept"]


@pytest.mark.parametrize("kind", KINDS)
def test_stale_weights_stop_the_run_and_right_ones_do_not(findings, kind):
    found = findings(kind)
    assert "stale or corrupt weights" in found["stale"]["nothing sent"]
    assert found["stale"]["then right"] == ""
    assert "outside awake()" in found["outside"]
    assert "the engine was built for" in found["too_long"]


@pytest.mark.parametrize("kind", KINDS)
def test_cycles_leak_nothing_and_sleep_frees_the_cache(findings, kind):
    found = findings(kind)
    assert found["leak_mib"] <= 50
    assert "kv_cache" not in found["asleep"]
    assert found["awake"]["kv_cache"] >= 256 * MIB
    assert ("weights" in found["asleep"]) == (kind == "lora")


def test_all_frozen_weights_are_the_engines(findings):
    assert findings("lora")["aliased"] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_through_it(findings, kind):
    trained = findings(kind)["trains"]
    assert trained["steps"] == 3
    assert trained["grad_norm"] > 0
    assert 0.9 < trained["sampling/ess"] <= 1
    assert trained["sampling/sampling_logp_difference/mean"] < 0.06


def test_a_cache_that_does_not_fit_is_refused_in_a_line(findings):
    assert "did not start with a KV cache of 500.00 GiB" in findings("refusals")["too large"]
