"""What the ledger costs: the same training step with the real ledger and with one that does nothing, in turn.

    python -m profiling.bench_ledger [--device cuda] [--steps 200]

A step is one "update" phase around forward and backward of each bin, then the optimizer: 4 × bins + 4 borders.
The model is a stack of linear layers: no library's own cost hides the ledger's. A step ends when the device is done.
Left out: the rest of a GRPO step (two borders a phase, whatever their number of bins).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo.ledger import Ledger
from profiling.measure import device_slug, environment

CASES = {  # bins, tokens of a bin, width, layers: on CUDA 0.4B weights, and a step too small to be worth a GPU
    "cuda": ((4, 16384, 4096, 24), (4, 4096, 2048, 24)),
    "cpu": ((4, 512, 256, 4), (4, 128, 128, 2)),
}
Phase = Callable[[str], AbstractContextManager[Any]]


def silent(name: str) -> AbstractContextManager[None]:
    """The ledger that does nothing."""
    return nullcontext()


class Step:
    """One optimizer step of a toy model in `bins` bins."""

    def __init__(self, device: torch.device, bins: int, tokens: int, width: int, layers: int) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        stack = [part for _ in range(layers) for part in (nn.Linear(width, width, bias=False), nn.GELU())]
        self.model = nn.Sequential(*stack).to(device, dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.batches = [torch.randn(tokens, width, device=device, dtype=dtype) for _ in range(bins)]
        self.device = device

    def __call__(self, phase: Phase) -> float:
        """Seconds of the step."""
        start = time.perf_counter()
        with phase("update"):
            for batch in self.batches:
                with phase("forward"):
                    loss = self.model(batch).square().mean()
                with phase("backward"):
                    loss.backward()
            with phase("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def compare(step: Step, steps: int) -> dict[str, list[float]]:
    """Seconds of `steps` steps of each kind, after a tenth as many to warm up. Who goes first changes every turn."""
    ledger = Ledger()
    kinds: list[tuple[str, Phase]] = [("with", ledger.phase), ("without", silent)]
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for turn in range(-steps // 10, steps):
        for name, phase in kinds if turn % 2 else kinds[::-1]:
            spent = step(phase)
            if turn >= 0:
                seconds[name].append(spent)
        ledger.take()
    return seconds


def alone_us(repeats: int = 2000) -> float:
    """Microseconds of the host for one phase inside another with nothing in it: the median of five rounds."""
    ledger, rounds = Ledger(), []
    for _ in range(5):
        with ledger.phase("update"):
            start = time.perf_counter()
            for _ in range(repeats):
                with ledger.phase("forward"):
                    pass
            rounds.append((time.perf_counter() - start) / repeats * 1e6)
        ledger.take()
    return statistics.median(rounds)


def result(seconds: dict[str, list[float]], phases: int) -> dict[str, float]:
    """Medians in ms, and what the ledger adds: the median of the differences turn by turn."""
    added = statistics.median(a - b for a, b in zip(seconds["with"], seconds["without"], strict=True))
    without = statistics.median(seconds["without"])
    return {
        "step_ms": round(without * 1e3, 4),
        "step_with_ledger_ms": round(statistics.median(seconds["with"]) * 1e3, 4),
        "added_us_per_step": round(added * 1e6, 2),
        "added_us_per_phase": round(added * 1e6 / phases, 2),
        "added_percent": round(100 * added / without, 4),
    }


def table(entry: dict[str, Any]) -> str:
    """The figures, one a line, and a column a case."""
    rows = entry["rows"]
    lines = [f"{key:<22}" + "".join(f"{row[key]:>14g}" for row in rows) for key in rows[0]]
    return "\n".join([f"{entry['environment']['device']}: {entry['alone_us_per_phase']} us for a phase alone", *lines])


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="of this checkout, where git is not at hand")
    parser.add_argument("--toy", action="store_true", help="two tiny cases, for checking this program")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write results/<device>/ledger.json."""
    args = _arguments(arguments)
    device = torch.device(args.device)
    rows = []
    for shape in ((2, 8, 16, 2), (1, 4, 8, 1)) if args.toy else CASES[device.type]:
        case = dict(zip(("bins", "tokens", "width", "layers"), shape, strict=True))
        seconds = compare(Step(device, **case), args.steps)
        rows.append(case | {"steps": args.steps} | result(seconds, phases=2 + 2 * case["bins"]))
    entry = {
        "environment": environment(device, args.commit),
        "memory": Ledger().memory_source,
        "alone_us_per_phase": round(alone_us(), 2),
        "rows": rows,
    }
    print(table(entry))
    path = args.out / device_slug(device) / "ledger.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
