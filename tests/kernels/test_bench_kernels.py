"""The benchmark at toy size: right figures, reasons for what is absent, and a table that follows from the JSON."""

import json

import pytest
import torch

from profiling import bench_kernels
from profiling.bench_kernels import Settings
from profiling.kernel_cases import EAGER, Case, Method, Reference, cases, eager
from profiling.measure import device_slug

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, 0.001, 2**16)
KEYS = ["rope-toy", "rmsnorm-toy", "rmsnorm-trainable-toy", "swiglu-toy", "geglu-toy"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "results" / "cpu" / "kernels.json"
    only = [part for name in ("ours", "eager", "Liger") for part in ("--only", name)]
    bench_kernels.main(["--toy", "--device", "cpu", "--seconds", "0.001", "--out", str(out), *only])
    return out


def test_toy_run(results):
    data = json.loads(results.read_text())
    assert data["environment"]["torch"] == torch.__version__ and data["environment"]["transformers"]
    assert [entry["key"] for entry in data["cases"]] == KEYS
    for entry in data["cases"]:
        rows = {row["name"]: row for row in entry["rows"]}
        assert {"ours, torch", "ours, triton", EAGER, "Liger"} <= set(rows)
        assert ("ours, triton, in place" in rows) == ("rmsnorm" not in entry["key"])
        assert "skipped" not in rows["ours, torch"] and "skipped" not in rows[EAGER]
        for row in rows.values():
            assert ("skipped" in row) != ("forward" in row) and row.get("skipped", "?")
            if "skipped" in row:
                continue
            assert row["output_error"] < 1e-6 and row["gradient_error"] < 1e-6
            both = row["forward_backward"]
            assert 0 < both["p20_ms"] <= both["median_ms"] <= both["p80_ms"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is compiled, not interpreted, in a process with CUDA")
def test_the_triton_rows_are_there(results):
    for entry in json.loads(results.read_text())["cases"]:
        assert all("skipped" not in row for row in entry["rows"] if row["name"].startswith("ours"))


def test_share_is_bytes_over_time_over_bandwidth(results):
    for entry in json.loads(results.read_text())["cases"]:
        for row in entry["rows"]:
            if "skipped" in row:
                continue
            wanted = entry["bytes_forward"] / (row["forward"]["median_ms"] * 1e6) / entry["copy_gb_per_s"]
            assert row["forward_share"] == pytest.approx(wanted, rel=0.02, abs=1e-4)


@pytest.mark.parametrize(
    "key, forward, backward",
    [
        ("rope-toy", 2 * 6 * 6 * 16 + 6 * 16, 2 * 6 * 6 * 16 + 6 * 16),  # q and k read and written, half angles
        ("rmsnorm-toy", 2 * 24 * 48 + 24, 3 * 24 * 48 + 24),  # x, y, ρ; dy, x, ρ, dx
        ("swiglu-toy", 3 * 24 * 48, 5 * 24 * 48),
    ],
)
def test_bytes(key, forward, backward):
    case = cases(CPU, toy=True)[key]()
    assert (case.bytes_forward, case.bytes_backward) == (4 * forward, 4 * backward)


def test_the_table_follows_from_the_json(results, tmp_path, capsys):
    folder = results.parent.parent
    text = bench_kernels.table(folder)
    for entry in json.loads(results.read_text())["cases"]:
        assert f"**{entry['name']}**" in text
        rows = {row["name"]: row for row in entry["rows"]}
        eager, ours = (rows[name]["forward_backward"]["median_ms"] for name in (EAGER, "ours, torch"))
        (line,) = [x for x in text.splitlines() if x.startswith("| ours, torch |") and f"| {ours:.4g} (" in x]
        assert f"| {eager / ours:.2f} |" in line
    readme = tmp_path / "README.md"
    readme.write_text("a <!-- kernels: begin -->old<!-- kernels: end --> z")
    bench_kernels.write_table(readme, folder)
    assert readme.read_text() == f"a <!-- kernels: begin -->\n{text}<!-- kernels: end --> z"
    readme.write_text("no markers")
    capsys.readouterr()
    bench_kernels.write_table(readme, folder)
    assert readme.read_text() == "no markers" and capsys.readouterr().out.strip() == text.strip()


@pytest.mark.parametrize("key", KEYS)
def test_the_reference_sees_a_wrong_method(key):
    case = cases(CPU, toy=True)[key]()
    right = Method("right", eager)
    wrong = Method("wrong", lambda case, inputs: tuple(y * 1.01 for y in eager(case, inputs)))
    reference = Reference.of(case)
    errors = reference.errors(*right.both(case, *case.copies()))
    assert max(errors.values()) < 1e-6
    errors = reference.errors(*wrong.both(case, *case.copies()))
    assert min(errors.values()) == pytest.approx(0.01, rel=1e-3)


def test_a_failing_peer_is_a_row():
    def fails(case: Case, inputs):
        raise RuntimeError("kernel does not fit\nlong story")

    case = cases(CPU, toy=True)["swiglu-toy"]()
    entry = bench_kernels.measure_case(case, [Method("peer", fails), Method(EAGER, eager)], SETTINGS)
    assert entry["rows"][0] == {"name": "peer", "skipped": "RuntimeError: kernel does not fit"}
    assert "forward" in entry["rows"][1]
    with pytest.raises(RuntimeError):  # ours never fails quietly
        bench_kernels.measure_case(case, [Method("ours", fails)], SETTINGS)


@pytest.mark.gpu
def test_all_methods_at_toy_size_on_the_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    out = tmp_path / device_slug("cuda") / "kernels.json"
    bench_kernels.main(["--toy", "--device", "cuda", "--seconds", "0.001", "--out", str(out)])
    for entry in json.loads(out.read_text())["cases"]:
        for row in entry["rows"]:
            assert row["name"] == "Liger" or max(row["output_error"], row["gradient_error"]) < 1e-2
