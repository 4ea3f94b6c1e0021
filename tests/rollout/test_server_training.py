"""GRPO steps whose rollouts come over HTTP: a fake server runs the tiny model with the adapter that it was sent."""

import json

import datasets
import pytest
import torch

from grpo import GRPOConfig, GRPOTrainer
from tests.rollout.fake_vllm_server import FakeServer
from tests.rollout.test_server_engine import served_llama
from tests.tiny import tiny_model, tokenizer

ROWS = [{"prompt": f"sort {n}"} for n in (31, 42, 27, 995, 8, 70)]


def even(completion):
    return float(len(completion) % 2)


def test_three_steps_stay_on_policy_and_leave_nothing_behind(tmp_path):
    text = tokenizer()
    base = tiny_model("llama", vocab_size=len(text))
    base.save_pretrained(tmp_path / "model")
    text.save_pretrained(tmp_path / "model")
    logits, loaded = served_llama(alpha_over_r=2.0, base=base.eval())
    server = FakeServer(logits=logits, model=str(tmp_path / "model"))
    config = GRPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        num_generations=4,
        max_completion_length=5,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        model={"dtype": "float32"},
        adapter={"r": 4, "alpha": 8, "dtype": "float32"},
        rollout={"engine": "server", "servers": [server.url], "server_timeout_s": 20},
    )
    try:
        trainer = GRPOTrainer(
            model=str(tmp_path / "model"),
            reward_funcs=[even],
            args=config,
            train_dataset=datasets.Dataset.from_list(ROWS),
            processing_class=text,
        )
        before = {name: value.clone() for name, value in trainer.policy.trainable().items()}
        trainer.train()
        moved = max(
            float((value - before[name]).detach().abs().max()) for name, value in trainer.policy.trainable().items()
        )
        assert server.adapters == {}  # the run left nothing there
        assert len(trainer.generate(["2"])[0][0].token_ids) >= 1  # and sampling goes on
        trainer.engine.close()
    finally:
        server.stop()
    assert moved > 1e-2
    assert len(loaded) == 4  # one adapter a step and one for `generate`, each read once
    assert len({json.dumps(body["sampling_params"]["seed"]) for body in server.requests[1:] if scored(body)}) == 25
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for name in ("sampling/sampling_logp_difference/max", "sync/probe_gap"):
        assert [row[name] for row in rows] == pytest.approx([0.0] * 3, abs=1e-4)
    assert all(row["sampling/missing"] == 0 for row in rows)
    assert list((tmp_path / "run" / "adapters").iterdir()) == []
    assert server.adapters == {}
    assert torch.isfinite(torch.tensor([row["loss"] for row in rows])).all()


def scored(body):
    """A sample rather than a probe."""
    return "prompt_logprobs" not in body["sampling_params"]
