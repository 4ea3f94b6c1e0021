"""What the ledger costs: the arithmetic on seconds made by hand, and the program at toy size."""

import json

import pytest

from profiling.bench_ledger import main, result


def test_medians_by_hand():
    seconds = {"with": [2.0, 4.0, 9.0], "without": [1.0, 2.0, 8.0]}
    assert result(seconds, phases=4) == {
        "step_ms": 2000.0,
        "step_with_ledger_ms": 4000.0,
        "added_us_per_step": 1e6,  # the median of 1, 2, 1
        "added_us_per_phase": 0.25e6,
        "added_percent": 50.0,
    }


def test_at_toy_size(tmp_path, capsys):
    main(["--toy", "--device", "cpu", "--steps", "5", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*/ledger.json")
    found = json.loads(path.read_text())
    assert [row["bins"] for row in found["rows"]] == [2, 1]
    for row, phases in zip(found["rows"], (6, 4), strict=True):
        assert row["added_us_per_phase"] == pytest.approx(row["added_us_per_step"] / phases, abs=0.01)
        assert row["added_percent"] == pytest.approx(row["added_us_per_step"] / row["step_ms"] / 10, rel=0.01, abs=0.01)
    assert "us for a phase alone" in capsys.readouterr().out
