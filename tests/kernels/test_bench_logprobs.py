"""The benchmark at toy size: right figures, reasons for what is absent, and a table that follows from the JSON."""

import json

import pytest
import torch

from profiling import bench_logprobs
from profiling.measure import measure


@pytest.fixture
def results(tmp_path):
    out = tmp_path / "results" / "cpu" / "logprobs.json"
    names = ("ours, torch", "float32", "selective", "TRL", "CCE, no")
    only = [part for name in names for part in ("--only", name)]
    bench_logprobs.main(["--toy", "--device", "cpu", "--seconds", "0.01", "--out", str(out), *only])
    return out


def test_toy_run(results):
    data = json.loads(results.read_text())
    assert data["environment"]["torch"] == torch.__version__
    (shape,) = data["shapes"]
    rows = {line["name"]: line for line in shape["rows"]}
    assert len(rows) == 5
    for name in ("ours, torch, chunk_mb=512", "float32 log_softmax", "bf16 selective log-softmax"):
        line = rows[name]
        assert (
            line["forward_backward"]["p20_ms"]
            <= line["forward_backward"]["median_ms"]
            <= line["forward_backward"]["p80_ms"]
        )
        assert line["max_logprob_error"] < 1e-4 and line["gradient_error"] < 1e-5
        assert line["forward"]["median_ms"] > 0
    for line in rows.values():
        assert ("skipped" in line) != ("forward" in line)
        assert line.get("skipped", "?")
    text = bench_logprobs.table(results.parent.parent)
    assert all(name in text for name in rows)
    assert f"{rows['float32 log_softmax']['forward']['median_ms']:.4g}" in text


def test_the_reference_sees_a_wrong_method():
    case = bench_logprobs.Case.make((64, 16, 100), torch.device("cpu"))
    reference = bench_logprobs.Reference.of(case)
    method = bench_logprobs.Method(
        "wrong", lambda case, hidden: bench_logprobs.float32_log_softmax(case, hidden * 1.01)
    )
    case.hidden.requires_grad_()
    errors = reference.errors(*method.backward(case, case.hidden))
    assert errors["max_logprob_error"] > 1e-3 and errors["gradient_error"] > 1e-3


def test_a_failing_peer_is_a_row():
    def fails(case, hidden):
        raise RuntimeError("kernel does not fit\nlong story")

    case = bench_logprobs.Case.make((64, 16, 100), torch.device("cpu"))
    settings = bench_logprobs.Settings(torch.device("cpu"), 0.001)
    rest = (case, bench_logprobs.Reference.of(case), bench_logprobs.Bound.of(case, settings), settings)
    line = bench_logprobs.row(bench_logprobs.Method("peer", fails), *rest)
    assert line == {"name": "peer", "skipped": "RuntimeError: kernel does not fit"}
    with pytest.raises(RuntimeError):  # ours never fails quietly
        bench_logprobs.row(bench_logprobs.Method("ours", fails), *rest)


def test_readme_follows_from_the_results():
    readme = (bench_logprobs.HERE / "README.md").read_text()
    begin, end = bench_logprobs.MARKERS
    assert readme.split(begin)[1].split(end)[0].strip() == bench_logprobs.table().strip()


def test_update_keeps_other_rows(results):
    before = json.loads(results.read_text())
    bench_logprobs.main(
        ["--toy", "--device", "cpu", "--seconds", "0.01", "--out", str(results), "--update", "--only", "float32"]
    )
    after = json.loads(results.read_text())
    names = [[line["name"] for line in data["shapes"][0]["rows"]] for data in (before, after)]
    assert sorted(names[0]) == sorted(names[1]) and len(after["shapes"]) == 1
    assert before["shapes"][0]["rows"][0] == after["shapes"][0]["rows"][0]


def test_measure_takes_turns_and_orders_percentiles():
    calls = []
    functions = [lambda: calls.append("a"), lambda: calls.append("b")]
    found = measure(functions, "cpu", seconds=0.0, min_repeats=7)
    assert "".join(calls) == "ab" * (1 + 1 + 7)
    for one in found:
        assert one.repeats == 7 and one.peak_gib is None and one.p20_ms <= one.median_ms <= one.p80_ms
