"""The two packing benchmarks at toy size: the right figures, and sides that do the same work."""

import json
import random

import pytest
import torch
from torch import nn

from grpo.bench_models import quantise, random_model
from grpo.config import SFTConfig
from grpo.demo import make_tokenizer
from grpo.sft import _examples
from profiling import bench_packing, bench_sft

CPU = torch.device("cpu")


def test_lengths_are_the_mix():
    lengths = bench_packing.mixed_lengths(20_000, seed=1)
    assert lengths == bench_packing.mixed_lengths(20_000, seed=1) != bench_packing.mixed_lengths(20_000, seed=2)
    assert min(lengths) == 32 and max(lengths) == 1024
    assert sum(length <= 256 for length in lengths) / len(lengths) == pytest.approx(0.6, abs=0.02)


def test_padded_utilization_by_hand():
    assert bench_packing.padded_utilization([2, 4, 1, 3, 5], 2) == pytest.approx(15 / (8 + 6 + 5))


def test_packing_at_toy_size(tmp_path, capsys):
    out = tmp_path / "packing.json"
    bench_packing.main(["--toy", "--device", "cpu", "--seconds", "0.05", "--out", str(out)])
    data = json.loads(out.read_text())
    assert data["environment"]["torch"] == torch.__version__
    assert [entry["name"] for entry in data["methods"]] == list(bench_packing.METHODS)
    padded, *packed = data["methods"]
    for entry in packed:
        assert entry["loss"] == pytest.approx(padded["loss"], rel=1e-5)
        assert entry["gradient_error"] < 1e-5
        assert entry["utilization"] > 0.94 > padded["utilization"]
    for entry in data["methods"]:
        speed = data["case"]["tokens"] / entry["forward_backward"]["median_ms"] * 1e3
        assert entry["tokens_per_second"] == pytest.approx(speed, rel=1e-3)
    assert capsys.readouterr().out.rstrip().endswith(bench_packing.table(data))


def test_the_comparison_sees_other_gradients():
    case = bench_packing.Case("toy-qwen3", 6, 64, 3, 128, CPU)
    method = bench_packing.make_method("padded", case)
    method.run()
    wanted = method.gradients()
    method.run()  # starts from zero again
    assert bench_packing.gradient_error(method.gradients(), wanted) < 1e-6
    other = {name: gradient * 1.01 for name, gradient in wanted.items()}
    assert bench_packing.gradient_error(other, wanted) == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(ValueError, match="other parameters"):
        bench_packing.gradient_error({}, wanted)
    assert all(gradient.abs().sum() > 0 for gradient in wanted.values())


def test_the_default_case_meets_its_target():
    """Lengths alone: no model is needed for the share of real tokens in bins."""
    from grpo.packing import Document, pack_documents, packing_metrics

    documents = [Document(row, [2], [3] * (n - 1)) for row, n in enumerate(bench_packing.mixed_lengths(256, 0))]
    assert packing_metrics(pack_documents(documents, 8192))["packing/utilization"] > 0.94


def toy(load_in_4bit):
    return bench_sft.Case("toy-llama", load_in_4bit, 64, 8, 4, 256, 2, 1, CPU)


def test_both_trainers_get_the_same_examples():
    case = toy(False)
    rows = bench_sft.encoded(case, make_tokenizer())
    assert [max(3, n) for n in case.lengths] == [len(row["input_ids"]) for row in rows]
    batch = bench_sft.pad_to_longest(rows[:4], pad_token_id=0)
    for place, row in enumerate(rows[:4]):
        length = len(row["input_ids"])
        assert batch["attention_mask"][place].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        assert batch["input_ids"][place, :length].tolist() == row["input_ids"]
        assert batch["labels"][place, :length].tolist() == row["labels"]
        assert (batch["labels"][place, length:] == bench_sft.IGNORED).all()
    config = SFTConfig(max_completion_length=case.longest)
    ours = _examples(config, make_tokenizer(), case.rows(), None, "data.train")
    assert [[*e.token_ids, *e.example["completion_ids"]] for e in ours] == [row["input_ids"] for row in rows]
    assert [[-100] * len(e.token_ids) + e.example["completion_ids"] for e in ours] == [row["labels"] for row in rows]


def test_sft_at_toy_size(tmp_path, capsys):
    out = tmp_path / "sft.json"
    bench_sft.main(["--toy", "--device", "cpu", "--out", str(out)])
    data = json.loads(out.read_text())
    padded, packed, offloaded = data["methods"]
    assert packed["losses"] == pytest.approx(padded["losses"], abs=2e-4)
    assert offloaded["losses"] == packed["losses"]
    assert len(set(padded["losses"])) == 3
    assert packed["utilization"] > 0.9 > padded["utilization"]
    timed = sum(toy(False).lengths[8:])  # less the warm-up step
    for entry in data["methods"]:
        assert entry["tokens_per_second"] * entry["seconds_per_step"] * 2 == pytest.approx(timed)
    assert bench_sft.table(data) in capsys.readouterr().out


def test_the_peak_is_that_of_all_phases_but_loading():
    rows = [
        {"phase/load/peak_gib": 9.0, "phase/update/peak_gib": 2.0, "phase/update/reserved_gib": 3.0},
        {"phase/pack/peak_gib": 4.0, "phase/update/peak_gib": 1.0, "phase/update/reserved_gib": 5.0},
    ]
    assert bench_sft._highest(rows, "peak_gib") == 4.0
    assert bench_sft._highest(rows, "reserved_gib") == 5.0
    assert bench_sft._highest([{"phase/update/peak_gib": 1.0}], "peak_gib") is None  # the process's, without CUDA


def test_sft_over_nf4_weights():
    case = toy(True)
    runs = [bench_sft.line(case, name) for name in bench_sft.METHODS]
    plain = bench_sft.line(toy(False), "packed")["losses"]
    assert runs[1]["losses"] == pytest.approx(runs[0]["losses"], abs=2e-4)
    assert abs(runs[1]["losses"][0] - plain[0]) > 1e-5  # the base really is rounded


def test_quantised_layers():
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    plain = random_model("toy-llama", CPU, torch.float32)
    weights = {name: m.weight.data.clone() for name, m in plain.named_modules() if type(m) is nn.Linear}
    model = quantise(plain)
    found = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert found.keys() == weights.keys() - {"lm_head"}
    assert type(model.lm_head) is nn.Linear
    name = random.Random(0).choice(sorted(found))
    weight = dequantize_4bit(found[name].weight.data, found[name].weight.quant_state)
    assert 1e-3 < float((weight - weights[name]).norm() / weights[name].norm()) < 0.15
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found[name](x), x @ weight.t(), rtol=1e-4, atol=1e-5)
