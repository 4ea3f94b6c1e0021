"""Offloading against recomputing, in one run: time, memory, the same gradients, and copies that hide behind kernels.

    python -m profiling.bench_offload --case llama-8b-lora      # one bin of bench_update's case, on a GPU
    python -m profiling.bench_offload --toy --device cpu        # checks the program: on a CPU nothing is copied

Both train a model of their own with the same weights, timed in turn. From a profiler's trace of one offloaded call:
milliseconds of copies to and from host memory, of those beside a kernel, and the time the device computed or did
nothing (`--trace FILE` keeps it for chrome://tracing or Perfetto). Writes profiling/results/<device>/offload.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grpo.bench_models import CASES, TOY, Case, build
from grpo.bench_step import Data, ours
from grpo.model.policy import Policy
from profiling.measure import GIB, device_slug, environment, measure, write_json

HERE = Path(__file__).parent
METHODS = ("recompute", "offload")


def overlap(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds from the events of a chrome trace (`ts`, `dur` in µs; categories kernel and gpu_memcpy)."""
    kernels = _joined([(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel"])
    copies = [
        (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "gpu_memcpy" and "Pinned" in e.get("name", "")
    ]
    beside = sum(max(0.0, min(end, stop) - max(start, begin)) for start, end in copies for begin, stop in kernels)
    busy = sum(stop - begin for begin, stop in kernels)
    span = kernels[-1][1] - kernels[0][0] if kernels else 0.0
    milliseconds = {
        "host_copies": sum(end - start for start, end in copies),
        "beside_kernels": beside,
        "kernels": busy,
        "no_kernel": span - busy,
    }
    return {name: round(value / 1e3, 3) for name, value in milliseconds.items()}


def _joined(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for begin, stop in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((begin, stop))
    return found


def rows(case: Case, device: torch.device, seconds: float, trace: Path | None) -> dict[str, Any]:
    """Both methods' figures, how far their gradients are apart, and the overlap of the second."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policies = [Policy(build(case, device, dtype), activation_checkpointing=method) for method in METHODS]
    with torch.no_grad():  # the same weights are drawn twice; a B of zero would hide A's gradient
        for left, right in zip(*(policy.trainable().values() for policy in policies), strict=True):
            right.copy_(left.add_(torch.randn_like(left) * 0.01))
    data = Data.make(case, device)
    calls = [ours(policy, data) for policy in policies]
    times = measure(calls, device, seconds=seconds)
    for policy in policies:
        policy.module.zero_grad(set_to_none=True)
    for call in calls:
        call()
    gradients = [[p.grad for p in policy.trainable().values() if p.grad is not None] for policy in policies]
    difference = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
    found: dict[str, Any] = {method: time.as_json() for method, time in zip(METHODS, times, strict=True)}
    found["time_ratio"] = round(times[1].median_ms / times[0].median_ms, 4)
    found["largest_gradient_difference"] = difference
    host = policies[1].checkpointer.host if policies[1].checkpointer is not None else None
    if host is not None:
        rows_of_a_bin = max(batch.input_ids.numel() for batch in data.batches)
        width = policies[1].head.weight.shape[1] * policies[1].head.weight.element_size()
        payload = (len(policies[1].layers) - 1) * rows_of_a_bin * width
        found |= {"pinned_gib": host.arena.capacity / GIB, "pinned_over_payload": host.arena.capacity / payload}
    return found | ({"milliseconds": traced(calls[1], trace)} if device.type == "cuda" else {})


def traced(run: Callable[[], None], keep: Path | None) -> dict[str, float]:
    """The overlap of one call. Needs CUDA."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = keep or Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        return overlap(json.loads(path.read_text())["traceEvents"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="a tiny shape, for checking this program")
    parser.add_argument("--case", default="llama-8b-lora", choices=[case.name for case in CASES])
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing, both methods together")
    parser.add_argument("--trace", type=Path, help="keep the trace here")
    parser.add_argument("--out", type=Path, help="default: profiling/results/<device>/offload.json")
    parser.add_argument("--commit", help="recorded in the JSON where the checkout has no git")
    given = parser.parse_args(arguments)
    if not (given.toy or torch.device(given.device).type == "cuda"):
        raise SystemExit("profiling.bench_offload: no CUDA device (want a GPU, or --toy: a CPU copies nothing)")
    device = torch.device(given.device)
    case = TOY[0] if given.toy else next(case for case in CASES if case.name == given.case)
    found = rows(case, device, given.seconds, given.trace)
    out = given.out or HERE / "results" / device_slug(given.device) / "offload.json"
    write_json(out, {"environment": environment(given.device, given.commit), "case": case.name, **found})
    print(f"{case.name}: offload takes {found['time_ratio']:.3f} × the time of recompute")
    print(json.dumps({name: value for name, value in found.items() if name not in METHODS}))


if __name__ == "__main__":
    main()
