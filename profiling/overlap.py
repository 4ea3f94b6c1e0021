"""How much of the copies to and from host memory runs beside computation, read from a profiler's trace.

    python -m profiling.overlap --case llama-8b-lora       # one bin of bench_update's case, offloaded, on a GPU

Prints and writes profiling/results/<device>/overlap.json: milliseconds of host copies, of those beside a kernel, and
the time the device computed or did nothing. `--trace FILE` keeps the trace for chrome://tracing or Perfetto.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from grpo.bench_models import CASES, build
from grpo.bench_step import Data, ours
from grpo.model.policy import Policy
from profiling.measure import device_slug, environment, write_json

HERE = Path(__file__).parent


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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="llama-8b-lora", choices=[case.name for case in CASES])
    parser.add_argument("--trace", type=Path, help="keep the trace here")
    parser.add_argument("--out", type=Path, help="default: profiling/results/<device>/overlap.json")
    parser.add_argument("--commit", help="recorded in the JSON where the checkout has no git")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("profiling.overlap: no CUDA device (want a GPU: on a CPU there is nothing to copy)")
    from torch.profiler import ProfilerActivity, profile

    device = torch.device("cuda")
    case = next(case for case in CASES if case.name == given.case)
    model = build(case, device, torch.bfloat16)
    run = ours(Policy(model, activation_checkpointing="offload"), Data.make(case, device))
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = given.trace or Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        found = overlap(json.loads(path.read_text())["traceEvents"])
    out = given.out or HERE / "results" / device_slug(device) / "overlap.json"
    result = {"environment": environment(device, given.commit), "case": case.name, "milliseconds": found}
    write_json(out, result)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
