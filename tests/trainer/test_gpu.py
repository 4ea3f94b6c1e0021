"""The trainer on a CUDA device: bfloat16 models, the Triton head, generators of the device."""

import json

import pytest
import torch

from grpo import GRPOConfig, GRPOTrainer
from grpo.batch import Prompt
from grpo.model.policy import Policy
from grpo.packing import pack_documents
from grpo.rollout.hf_engine import HFEngine
from tests.model.test_policy import DOCUMENTS, slow_logprobs
from tests.rollout.test_hf_engine import sampling
from tests.tiny import tiny_model, tokenizer
from tests.tolerances import PACKING

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROWS = [{"prompt": f"sort {digits}", "answer": digits} for digits in ("31", "4142", "27", "995", "8", "70613")]


def wide_model(dtype):
    """Wide enough for the Triton head: hidden 256, vocabulary of the demo's tokenizer."""
    return tiny_model(
        vocab_size=len(tokenizer()), dtype=dtype, hidden_size=256, num_attention_heads=8, num_key_value_heads=4,
        head_dim=32, intermediate_size=512, initializer_range=0.05,
    ).cuda()  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_logprobs_against_the_model_in_float64(dtype):
    model = wide_model(dtype).eval()
    policy = Policy(model)
    assert policy.packs
    (batch,) = pack_documents(DOCUMENTS, 100)
    with torch.no_grad():
        got = policy.logprobs(batch.to("cuda"), 0.7).logprobs.cpu().double()
    exact = wide_model(dtype).double().cpu().eval()
    wanted = torch.cat([slow_logprobs(exact, DOCUMENTS[row], 0.7).detach() for row in batch.row_ids.tolist()])
    tolerance = {torch.bfloat16: 5 * PACKING["bfloat16"], torch.float32: 1e-3}[dtype]  # float32 GEMMs may use TF32
    assert (got - wanted).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sampler_logprobs_are_the_policys(dtype):
    engine = HFEngine(Policy(wide_model(dtype)), tokenizer())
    engine.load_weights(engine.policy)
    prompts = [Prompt(row, [5 + row] * n, {"prompt": "x"}) for row, n in enumerate((1, 9, 4))]
    rollouts = engine.generate(prompts, sampling(temperature=0.8))
    again = engine.generate(prompts, sampling(temperature=0.8))
    assert [[c.token_ids for c in g] for g in rollouts.completions] == [
        [c.token_ids for c in g] for g in again.completions
    ]
    from grpo.packing import Document

    documents = [
        Document(p * 3 + g, prompts[p].token_ids, c.token_ids, c.sampler_logprobs)
        for p, group in enumerate(rollouts.completions)
        for g, c in enumerate(group)
    ]
    (batch,) = pack_documents(documents, 1000)
    with engine.policy.evaluating(), torch.no_grad():
        logprobs = engine.policy.logprobs(batch.to("cuda"), 0.8).logprobs.cpu()
    difference = (logprobs - batch.sampler_logprobs[batch.scored_index]).abs()
    assert difference.mean() < {torch.bfloat16: 2e-2, torch.float32: 1e-3}[dtype]


def make(folder, **changes):
    text = tokenizer()
    values = {
        "output_dir": str(folder), "max_steps": 6, "prompts_per_step": 4, "num_generations": 8, "max_completion_length": 8,
        "learning_rate": 1e-3, "adapter": {"r": 8, "dropout": 0.1}, "beta": 0.02, "num_iterations": 2, "save_steps": 1,
    }  # fmt: skip
    return GRPOTrainer(
        wide_model(torch.bfloat16), lambda completion: len(completion) % 5 / 4, GRPOConfig(**{**values, **changes}), ROWS,
        processing_class=text,
    )  # fmt: skip


def test_a_bf16_lora_run_and_its_resume(tmp_path, capsys):
    whole = make(tmp_path / "whole", adapter={"r": 8})
    rows = list(whole.steps())
    assert "log-prob head: triton" in capsys.readouterr().out
    assert rows[0]["kl"] == 0.0  # one scorer, same bins: equal bits
    assert all(row["grad_norm"] > 0 for row in rows) and rows[-1]["kl"] > 0
    assert all(row["phase/update/peak_gib"] > 0 for row in rows)
    first = make(tmp_path / "cut", adapter={"r": 8})
    for row in first.steps():
        if row["step"] == 3:
            break
    second = make(tmp_path / "cut", adapter={"r": 8})
    second.train(resume_from_checkpoint=True)
    # equal state and data are promised on a GPU, not equal bits
    kept = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == [1, 2, 3, 4, 5, 6]
    assert kept[3]["reward"] == pytest.approx(rows[3]["reward"])  # the buffer of step 3, used again
    assert kept[3]["grad_norm"] == pytest.approx(rows[3]["grad_norm"], rel=2e-2)


def test_dropout_draws_from_the_devices_generator_and_resumes(tmp_path):
    first = make(tmp_path / "run")
    for row in first.steps():
        if row["step"] == 3:
            break
    states = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(12345)
    second = make(tmp_path / "run")
    torch.cuda.manual_seed(999)
    second.folder.open(resume=True)
    second.resume()
    second.folder.close()
    assert torch.equal(torch.cuda.get_rng_state(), states)
