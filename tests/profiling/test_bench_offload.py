"""Overlap of host copies with kernels, from a trace made by hand; the program at toy size."""

import json

import pytest
import torch

from profiling.bench_offload import main, overlap


def event(kind, start, end, name="k"):
    return {"cat": kind, "ts": start, "dur": end - start, "name": name}


def test_a_trace_by_hand():
    events = [
        event("kernel", 0, 4000),
        event("kernel", 3000, 5000),  # together 5 ms
        event("kernel", 7000, 9000),
        event("gpu_memcpy", 4000, 8000, "Memcpy HtoD (Pinned -> Device)"),  # 1 + 1 ms beside
        event("gpu_memcpy", 100, 200, "Memcpy DtoD (Device -> Device)"),
        event("cpu_op", 0, 9000),
    ]
    assert overlap(events) == {"host_copies": 4.0, "beside_kernels": 2.0, "kernels": 7.0, "no_kernel": 2.0}
    assert overlap([])["host_copies"] == 0.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing only where it is")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="no CUDA device"):
        main([])


def test_at_toy_size_both_methods_have_the_same_gradients(tmp_path):
    out = tmp_path / "offload.json"
    main(["--toy", "--device", "cpu", "--seconds", "0.1", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["largest_gradient_difference"] == 0.0
    assert found["time_ratio"] == pytest.approx(
        found["offload"]["median_ms"] / found["recompute"]["median_ms"], rel=1e-3
    )
