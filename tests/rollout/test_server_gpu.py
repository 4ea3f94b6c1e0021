"""The HTTP engine against a real `vllm serve` on a tiny random model: the same numbers as a plain forward pass.

The server is a child process in its own process group, and the group is ended whatever happens.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from grpo.batch import Prompt
from grpo.config import AdapterConfig
from grpo.model.adapter import add_adapter
from grpo.model.policy import Policy
from grpo.rollout.engine import Sampling
from grpo.rollout.probe import WeightProbe
from grpo.rollout.server_engine import ServerEngine
from tests.tiny import tiny_model, tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm"),
]

START_S = 400
BF16_GAP = 0.06  # mean |Δ log-prob|, nats, of two bfloat16 implementations of the tiny model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    coder = tokenizer()
    model = tiny_model(
        "llama",
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        max_position_embeddings=512,
        initializer_range=0.08,
        dtype=torch.bfloat16,
    )
    assert len(coder) <= 128
    model.save_pretrained(folder)
    coder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory):
    """(URL, path of the log) of a running `vllm serve`."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (
        f"--host 127.0.0.1 --port {port} --enable-lora --max-lora-rank 16 --logprobs-mode processed_logprobs "
        "--dtype bfloat16 --enforce-eager --gpu-memory-utilization 0.15 --max-model-len 512 --max-num-seqs 64"
    )
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_folder), *options.split()]
    env = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}", log
    finally:
        end(process)


def wait_for(url, process, log):
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"vllm serve did not start (exit code {process.poll()}):\n{log.read_text()[-6000:]}")


def end(process):
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(30)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def make_policy(folder):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    module = add_adapter(base, AdapterConfig(r=8, alpha=24, dtype="bfloat16"))
    move(module, 0.05)
    return Policy(module)


def move(module, scale):
    """An adapter that is plainly seen in the log-probs."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(noise.to(parameter.device, parameter.dtype))


def forward_logprobs(policy, prompt, ids, temperature):
    with torch.no_grad(), policy.evaluating():
        logits = policy.causal_lm(input_ids=torch.tensor([prompt + ids], device="cuda")).logits[0].float() / temperature
    start = len(prompt) - 1
    return logits.log_softmax(-1)[start : start + len(ids)].cpu().gather(1, torch.tensor(ids)[:, None])[:, 0]


def gap(policy, rollouts, temperature):
    differences = [
        torch.tensor(c.sampler_logprobs) - forward_logprobs(policy, prompt.token_ids, c.token_ids, temperature)
        for prompt, group in zip(rollouts.prompts, rollouts.completions, strict=True)
        for c in group
    ]
    return float(torch.cat(differences).abs().mean())


def test_a_real_server_samples_with_the_policys_weights_after_each_sync(server, model_folder, tmp_path):
    url, _ = server
    policy = make_policy(model_folder)
    prompts = [Prompt(row, [(7 * row + place) % 50 + 5 for place in range(row + 4)], {}) for row in range(6)]
    lines = []
    probe = WeightProbe([prompt.token_ids for prompt in prompts], lines.append)
    engine = ServerEngine(
        [url], str(model_folder), tmp_path / "adapters", tokenizer(), timeout_s=120, probe=probe, say=lines.append
    )
    asked = Sampling(4, 48, 0.8, 1.0, 0, 0.0, (1,), seed=11)
    try:
        report = engine.load_weights(policy)
        assert report.probe_gap < BF16_GAP
        first = engine.generate(prompts, asked)
        assert gap(policy, first, 0.8) < BF16_GAP
        assert gap(policy, first, 1.0) > 2 * BF16_GAP  # the log-probs belong to temperature 0.8
        assert {len(group) for group in first.completions} == {4}
        for group in first.completions:
            for c in group:
                assert (c.finish_reason == "stop") == (c.token_ids[-1] == 1)
                assert c.finish_reason == "stop" or len(c.token_ids) == 48
        assert len({tuple(c.token_ids) for group in first.completions for c in group}) == 24  # seeds differ

        move(policy.module, 0.1)
        assert gap(policy, first, 0.8) > 3 * BF16_GAP  # the old rollouts are seen to be stale
        report = engine.load_weights(policy)
        assert report.probe_gap < BF16_GAP
        assert report.seconds < 30
        second = engine.generate(prompts, asked)
        assert second.policy_version == 1
        assert gap(policy, second, 0.8) < BF16_GAP
        assert lines == []

        name = engine._adapter.name
        body = f'{{"lora_name": "{name}"}}'.encode()
        header = {"Content-Type": "application/json"}
        urllib.request.urlopen(
            urllib.request.Request(f"{url}/v1/unload_lora_adapter", body, header), timeout=60
        ).close()
        third = engine.generate(prompts, asked)  # as after a restart: loaded again
        assert gap(policy, third, 0.8) < BF16_GAP
        assert len(lines) == 1
        assert "had lost the adapter" in lines[0]
    finally:
        engine.close()
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as reply:
        assert b"leangrpo" not in reply.read()
