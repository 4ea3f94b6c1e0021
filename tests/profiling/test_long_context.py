"""long_context at toy size, and its table and picture of made-up searches."""

import json

import pytest
import torch

from profiling import long_context
from profiling.long_context import main, plot, table
from profiling.measure import write_tables


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("long") / "cpu" / "long_context.json"
    main(["--toy", "--device", "cpu", "--only", "ours, offload, tiled MLP", "--only", "TRL", "--out", str(out),
          "--method", "lora", "--rank", "4"])  # fmt: skip
    return out


def test_a_toy_run_says_what_was_measured(results):
    (entry,) = json.loads(results.read_text())["searches"]
    assert (entry["shape"], entry["training"], entry["rank"], entry["card_gb"]) == ("toy", "lora", 4, None)
    assert entry["environment"]["torch"] == torch.__version__ and len(entry["environment"]["commit"]) == 40
    ours, trl = entry["methods"]
    assert [row["tokens"] for row in ours["rows"]] == [128, 256]
    for row in ours["rows"]:
        rate = ours["gemm_tflops"] * 1e12
        assert row["mfu"] > 0 and row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"], rel=0.01)
        assert row["mfu"] * rate * row["seconds"] > 6e6  # model FLOPs of 128 tokens at 50,000 weights, 4 each: 2.6e7
    assert entry["gradient_errors"]["ours, offload, tiled MLP"] < 2e-6
    assert trl["method"] == "TRL" and ("skipped" in trl or len(trl["rows"]) == 2)


def test_another_run_is_added_and_the_same_replaces(results):
    for _ in range(2):
        main(["--toy", "--device", "cpu", "--only", "ours, recompute", "--no-errors", "--method", "full", "--tokens", "64",
              "--update", "--out", str(results)])  # fmt: skip
    assert [entry["training"] for entry in json.loads(results.read_text())["searches"]] == ["lora", "full"]


def made_up():
    rows = [
        {"tokens": t, "completion": t - 256, "seconds": t / 1e4, "tokens_per_s": 1e4, "mfu": 0.5, "peak_gib": 5 + t / 5000,
         "reserved_gib": 6 + t / 5000, "pinned_gib": 1.25, "wall_s": 1.0} for t in (8192, 16_384, 81_920)
    ]  # fmt: skip
    rows.append({"tokens": 84_480, "completion": 84_224, "failed": "CUDA out of memory", "wall_s": 2.0})
    found = {"method": "ours, offload", "rows": rows, "longest": 81_920, "fails_at": 84_480, "limited_by": "memory"}
    none = {"method": "b", "rows": rows[3:], "longest": None, "fails_at": 84_480, "limited_by": "memory"}
    env = {"device": "GPU", "torch": "2.11", "commit": "0" * 40, "date": "today", "command": "python -m x"}
    return {"shape": "llama-3.1-8b", "training": "qlora", "rank": 16, "card_gb": 24.0, "allocator": "a:True",
            "environment": env, "gradient_errors": {"ours, offload": 0.02, "stock layers, no savings": 0.03},
            "methods": [found, none, {"method": "TRL", "rows": [], "skipped": "No module"}]}  # fmt: skip


def test_the_table_of_a_search():
    text = table({"searches": [made_up()]})
    assert "**llama-3.1-8b, qlora rank 16, 24 GB, a:True**\n" in text
    assert "- ours, offload; b; TRL: GPU, torch 2.11" in text and "`python -m x`" in text
    assert (
        "| ours, offload | 81,664 | 84,224 | memory | 8.19 | 10,000 | 50.0% | 21.38 | 22.38 | 1.25 | 2.0e-02 |" in text
    )
    assert "| b | none | 84,224 | memory |" in text
    assert "| TRL | – (No module) |" in text
    assert "| stock layers, no savings |" in text and "| 3.0e-02 |" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {12}


def test_the_readme_has_what_the_json_says(tmp_path):
    (tmp_path / "results" / "gpu").mkdir(parents=True)
    (tmp_path / "results" / "gpu" / "long_context.json").write_text(json.dumps({"searches": [made_up()]}))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- long_context: begin -->\nold\n<!-- long_context: end -->\nafter\n")
    write_tables("long_context", long_context.table, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("-->\nafter\n") and "old" not in text and "81,664" in text


def test_methods_measured_by_several_commands_stand_together():
    first, second, other = made_up(), made_up(), made_up() | {"card_gb": 80.0}
    second["methods"] = [{**second["methods"][0], "longest": 1}]
    kept = long_context.remaining([first, other], second)
    assert [[m["method"] for m in entry["methods"]] for entry in kept] == [["b", "TRL"], ["ours, offload", "b", "TRL"]]
    assert long_context.remaining([second], second) == []
    (one, eighty) = long_context.merged([*kept, second])
    assert [m["method"] for m in one["methods"]] == ["b", "TRL", "ours, offload"] and one["methods"][2]["longest"] == 1
    assert eighty["card_gb"] == 80.0 and len(eighty["methods"]) == 3
    assert len(first["methods"]) == 3  # left as it was
    assert [line.partition(":")[0] for line in one["origins"]] == ["- b; TRL", "- ours, offload"]
    first["gradient_errors"], second["gradient_errors"] = {"b": 1.0, "TRL": 2.0}, {"TRL": 3.0}
    assert long_context.merged([first, second])[0]["gradient_errors"] == {"b": 1.0, "TRL": 3.0}


def test_the_picture_shows_every_length(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    plot({"searches": [made_up()]}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    memory, speed = drawn[0].axes
    lines = {tuple(line.get_xdata()): list(line.get_ydata()) for line in memory.lines}
    assert lines[8192, 16_384, 81_920] == [row["peak_gib"] for row in made_up()["methods"][0]["rows"][:3]]
    assert lines[(84_480,)] == [24e9 / 2**30]  # a failure, on the card's line
    assert list(speed.lines[0].get_ydata()) == [1e4] * 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--shape", "llama-9b", "--tokens", "64"], "'llama-9b' is no known shape"),
        (["--shape", "toy"], "nothing to search on cpu"),
        (["--gpu", "24XB"], "'24XB' is no size of memory"),
        (["--gpu", "24GB", "--shape", "toy"], "a card of 24 GB on cpu"),
    ],
)
def test_bad_input_is_one_line(arguments, line):
    with pytest.raises(SystemExit, match=line):
        main(["--device", "cpu", *arguments])
