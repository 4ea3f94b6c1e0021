"""The article's arithmetic, recomputed by hand, and the table that the JSON gives."""

import json
import math
import shutil

import pytest

from profiling import article
from profiling.article import CASE, HERE, figures, main, measured, table


def test_formulas_give_the_published_figures():
    found = {figure.name: figure for figure in figures()}
    number = {name: float(figure.arithmetic.split(";")[0].rsplit(" ", 1)[1]) for name, figure in found.items()
              if name != "saved by offloading"}  # fmt: skip
    assert number["logits, standard"] == round(2 * 2 * 8 * 20_480 * 128_256 / 2**30, 2) == 78.28
    assert number["weights"] == 14.96  # 8,030,261,248 weights
    assert number["KV cache"] == round(2 * 2 * 32 * 1024 * 20_480 / 2**30, 2) == 2.5
    for name in ("logits, standard", "logits, chunked", "KV cache", "**total, lean**", "**total, standard**"):
        assert number[name] == pytest.approx(found[name].published, abs=0.05), name
    for name in ("training memory, lean", "training memory, standard"):
        assert number[name] == pytest.approx(found[name].published, rel=2.5e-3)
    assert "are 40.0" in found["saved by offloading"].arithmetic
    assert {name for name, figure in found.items() if "**sum**" in figure.nature} == {
        "**total, lean**", "**total, standard**"}  # fmt: skip


def test_figures_come_from_the_results_of_other_programs(tmp_path):
    """On the stored H100 results of those, whatever they hold at the moment; an article.json would stand in their place."""
    folder = tmp_path
    for name in ("logprobs.json", "update.json"):
        shutil.copy(HERE / "results" / "nvidia-h100-80gb-hbm3" / name, folder)
    found = measured(folder)
    shapes = json.loads((folder / "logprobs.json").read_text())["shapes"]
    (row,) = [r for s in shapes if s["N"] == 163_840 for r in s["rows"] if r["name"] == "ours, triton, chunk_mb=512"]
    beside = row["forward_backward"]["peak_gib"] - 163_840 * 4096 * 2 / 2**30
    assert found["head"]["beside_gradient_gib"] == pytest.approx(beside)
    rows = json.loads((folder / "update.json").read_text())["cases"]["llama-8b-lora-group"]["rows"]
    peak = next(r for r in rows if r["method"] == "ours, offload")["peak_gib"]
    text = table(found)
    assert f"| {beside:.2f} beside the [N, H] gradient" in text and f"| {peak:.1f} (lora) |" in text
    assert f"| lora | ours, offload | forward + backward | {peak:.2f} |" in text


def test_its_own_results_go_first_and_failures_are_shown(tmp_path):
    env = {"device": "GPU", "torch": "2.11", "commit": "0" * 40, "date": "today", "command": "python -m x"}
    step = {"rows": 8, "tokens": 20_480, "method": "ours, offload", "reserved_gib": 11.0, "pinned_gib": 4.84375}
    steps = [{**step, "training": "lora", "failed": "CUDA out of memory"},
             {**step, "training": "qlora", "peak_gib": 10.25, "seconds": 21.0}]  # fmt: skip
    data = {"environment": env, "head": {"beside_gradient_gib": 0.5}, "steps": steps}
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "article.json").write_text(json.dumps(data))
    (tmp_path / "gpu" / "logprobs.json").write_text("not read")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- article: begin -->\n<!-- article: end -->\n")
    article.write_table(readme, tmp_path)
    text = readme.read_text()
    assert "| 0.50 beside" in text and "| 10.2 (qlora) |" in text
    assert "| lora | ours, offload | whole step | does not fit |" in text
    assert "| qlora | ours, offload | whole step | 10.25 | 11.00 | 4.84 | 21.0 |" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} <= {6, 8}


def test_the_toy_runs_and_is_not_taken_for_the_case(tmp_path, capsys):
    out = tmp_path / "article.json"
    main(["--toy", "--device", "cpu", "--out", str(out)])
    data = json.loads(out.read_text())
    assert data["head"]["N"] == 128 and data["head"]["beside_gradient_gib"] is None
    assert [(step["training"], step["rows"], step["tokens"]) for step in data["steps"]] == [
        ("lora", 2, 64), ("qlora", 2, 64)]  # fmt: skip
    assert all(math.isfinite(step["gradient_norm"]) for step in data["steps"])
    assert f"Over {CASE.rows}" not in capsys.readouterr().out


@pytest.mark.skipif(article.torch.cuda.is_available(), reason="says what is missing only where it is")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="no CUDA device"):
        main([])
