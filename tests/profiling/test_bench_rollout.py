"""The rollout benchmark at toy size, on `hf`: counts, log-probs and the JSON hold together."""

import json
from dataclasses import replace

import pytest
import torch

from profiling import bench_rollout
from profiling.bench_rollout import TOY, Bench, main, model_folder, table


def test_the_json_and_the_table(tmp_path, capsys):
    out = tmp_path / "rollout.json"
    main(["--toy", "--device", "cpu", "--out", str(out)])
    data = json.loads(out.read_text())
    row = data["figures"]
    assert data["engine"] == "hf" and data["environment"]["torch"] == torch.__version__
    assert len(row["sync_seconds"]) == TOY.cycles and row["ours_median"] == row["ours_tokens_per_s"][0]
    assert row["max_abs_dlogp"] < 1e-4  # the engine is the policy
    assert capsys.readouterr().out.rstrip().endswith(table(row))


def test_the_budget_ends_it(tmp_path, capsys):
    main(["--toy", "--device", "cpu", "--budget", "0", "--out", str(tmp_path / "a.json")])
    assert json.loads((tmp_path / "a.json").read_text())["skipped"] == ["speed", "mismatch", "cycles"]


def test_a_rollout_that_stops_early_is_refused():
    with model_folder(TOY, torch.device("cpu")) as (folder, tokenizer):
        bench = Bench(TOY, folder, tokenizer, torch.device("cpu"))
        bench.sampling = replace(bench.sampling, stop_token_ids=tuple(range(64)))
        with pytest.raises(RuntimeError, match="nothing may stop early"):
            bench.speed()
    assert not folder.exists()


def test_prompts_have_as_many_tokens_as_words():
    tokenizer = bench_rollout.make_tokenizer(64)
    (ids,) = bench_rollout.prompt_words(TOY, 1, 64)
    assert tokenizer(" ".join(f"t{i}" for i in ids))["input_ids"] == ids
