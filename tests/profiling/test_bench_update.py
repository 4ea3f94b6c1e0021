"""The update's benchmark at toy size: it runs, its errors are small, its JSON makes the table."""

import json
from dataclasses import replace

import peft
import pytest
import torch

from grpo import bench_try
from profiling.bench_update import TOY, build, gradient_errors, main, table


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "update.json"
    main(["--toy", "--device", "cpu", "--seconds", "0.01", "--case", "toy-lora", "--only", "ours, offload",
          "--only", "ours, offload, tiled MLP", "--only", "TRL", "--out", str(out)])  # fmt: skip
    return out


def test_rows_errors_and_origin(results):
    entry = json.loads(results.read_text())["cases"]["toy-lora"]
    rows = {row["method"]: row for row in entry["rows"]}
    assert set(rows) == {"ours, offload", "ours, offload, tiled MLP", "TRL"}
    ours = rows["ours, offload"]
    assert ours["tokens_per_s"] == pytest.approx(600 / ours["forward_backward"]["median_ms"] * 1e3, rel=1e-3)
    assert all(error < 1e-5 for error in entry["gradient_errors"].values())
    assert entry["environment"]["torch"] == torch.__version__
    assert entry["environment"]["peft"] == peft.__version__ and "trl" in entry["environment"]


def test_the_table_says_what_the_json_says(results):
    data = json.loads(results.read_text())
    text = table(data)
    row = data["cases"]["toy-lora"]["rows"][0]
    seconds = row["forward_backward"]["median_ms"] / 1e3
    assert f"| toy-lora | ours, offload | {seconds:.3f} | {row['tokens_per_s']:,.0f} |" in text
    assert "| toy-lora | ours, offload |" in text
    assert "stock layers, no savings" in text


def test_updating_keeps_other_cases(results):
    main(["--toy", "--device", "cpu", "--seconds", "0.01", "--case", "toy-group", "--only", "ours, offload",
          "--no-errors", "--update", "--out", str(results)])  # fmt: skip
    assert set(json.loads(results.read_text())["cases"]) == {"toy-lora", "toy-group"}


def test_a_wrong_gradient_is_seen(monkeypatch):
    original = bench_try.Policy

    def broken(model, **options):
        policy = original(model, **options)
        if options.get("tiled_mlp"):
            with torch.no_grad():
                next(iter(policy.trainable().values())).mul_(1.2)
        return policy

    monkeypatch.setattr(bench_try, "Policy", broken)
    errors = gradient_errors(TOY[0], torch.device("cpu"))
    assert errors["ours, offload, tiled MLP"] > 1e-3 > errors["ours, offload"]


def test_quantised_models_are_built_in_place():
    pytest.importorskip("bitsandbytes")
    case = replace(TOY[0], four_bit=True)
    model = build(case, torch.device("cpu"), torch.bfloat16)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "Linear4bit" in kinds
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16
