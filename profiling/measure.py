"""Time and peak memory of callables, hot: warm-up by the clock, CUDA events, median, 20th and 80th percentile.

Left out: CPU memory (the allocator of torch's CPU build keeps no peak).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
GIB = 2**30
# Whose versions a figure may depend on
PACKAGES = (
    "triton",
    "transformers",
    "peft",
    "bitsandbytes",
    "vllm",
    "trl",
    "unsloth",
    "unsloth_zoo",
    "liger_kernel",
    "cut_cross_entropy",
)


@dataclass(frozen=True)
class Measurement:
    """Milliseconds per call, and GiB allocated at the peak of one call beyond what was allocated before it."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    peak_gib: float | None  # None on the CPU

    def as_json(self) -> dict[str, Any]:
        return {key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(self).items()}


def measure(
    functions: Sequence[Callable[[], Any]],
    device: torch.device | str,
    *,
    seconds: float = 1.0,
    min_repeats: int = 3,
    max_repeats: int = 50,
) -> list[Measurement]:
    """Time several functions in turn, A B A B …, so that all see the same clocks and temperature.

    Each is called twice and then in turn for `seconds` / 3 to warm up, then timed for about `seconds` in all. What they
    return is dropped at once. On CUDA calls are queued back to back; the peak is that of one further call.
    """
    device = torch.device(device)
    _warm_up(functions, device, 0.0)
    duration = _warm_up(functions, device, seconds / 3)
    repeats = min(max_repeats, max(min_repeats, int(seconds / max(duration, 1e-9))))
    take_times = _cuda_times if device.type == "cuda" else _wall_times
    found = []
    for function, times in zip(functions, take_times(functions, repeats), strict=True):
        low, middle, high = (_percentile(sorted(times), share) for share in (0.2, 0.5, 0.8))
        found.append(Measurement(middle, low, high, repeats, peak_gib(function) if device.type == "cuda" else None))
    return found


def peak_gib(function: Callable[[], Any]) -> float:
    """GiB allocated on the current CUDA device at the peak of one call, beyond what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def _warm_up(functions: Sequence[Callable[[], Any]], device: torch.device, seconds: float) -> float:
    """Seconds of the last round."""
    start, rounds, duration = time.perf_counter(), 0, 0.0
    while rounds < 1 or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        for function in functions:
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        duration = time.perf_counter() - began
        rounds += 1
    return duration


def _cuda_times(functions: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    def event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    pairs = [[(event(), event()) for _ in range(repeats)] for _ in functions]
    for turn in range(repeats):
        for function, own in zip(functions, pairs, strict=True):
            own[turn][0].record()
            function()
            own[turn][1].record()
    torch.cuda.synchronize()
    return [[before.elapsed_time(after) for before, after in own] for own in pairs]


def _wall_times(functions: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            own.append((time.perf_counter() - start) * 1e3)
    return times


def _percentile(ordered: list[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def device_slug(device: torch.device | str) -> str:
    """Folder name of a device's results: "nvidia-h200", "cpu"."""
    if torch.device(device).type != "cuda":
        return "cpu"
    return "-".join(torch.cuda.get_device_name(device).lower().replace("/", " ").split())


def environment(device: torch.device | str, commit: str | None = None) -> dict[str, Any]:
    """What a figure depends on: device, driver, versions (None: not installed), commit and the command that gave it."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / GIB, 1) if cuda else None,
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        **{package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "commit": commit or _first_line(["git", "rev-parse", "HEAD"]),
        "command": " ".join(["python", "-m", _module(), *_without_paths(sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
    }


def earlier_results(out: Path, env: dict[str, Any]) -> dict[str, Any] | None:
    """For `--update`: what stands in `out`, with this command beside its own; None where there is no such file.

    Raises:
        SystemExit: it comes from another device, other versions or another commit.
    """
    if not out.exists():
        return None
    data: dict[str, Any] = json.loads(out.read_text())
    old = data["environment"]
    for key in ("device", "driver", "torch", "triton", "commit"):
        if old[key] != env[key]:
            raise SystemExit(f"--update: {out} has {key} {old[key]}, now {env[key]}")
    old["command"] += f"; {env['command']}"
    return data


def origin(env: dict[str, Any]) -> str:
    """One line of a README: where a table comes from."""
    return f"{env['device']}, torch {env['torch']}, commit {env['commit'][:12]}, {env['date']}: `{env['command']}`"


def write_between(readme: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name: begin -->` and `<!-- name: end -->` in a Markdown file."""
    begin, end = (f"<!-- {name}: {which} -->" for which in ("begin", "end"))
    before, rest = readme.read_text().split(begin)
    readme.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def with_origin(table: Callable[[Any], str], key: str | None = None) -> Callable[[dict[str, Any]], str]:
    """`table` of a results file (or of what stands there under `key`), below the line that says where it comes from."""
    return lambda data: f"{origin(data['environment'])}\n\n{table(data if key is None else data[key])}"


def write_tables(name: str, table: Callable[[dict[str, Any]], str], folder: Path = HERE) -> None:
    """Put `table` of every results/*/NAME.json of `folder` between the markers of that name in its README.md."""
    found = [table(json.loads(path.read_text())) for path in sorted(folder.glob(f"results/*/{name}.json"))]
    write_between(folder / "README.md", name, "\n\n".join(found))


def write_json(out: Path, data: dict[str, Any]) -> None:
    """A results file, with the folders it needs."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(data, indent=1) + "\n")


def _without_paths(arguments: list[str]) -> list[str]:
    """The arguments less `--out` and `--commit` with their values, which change no figure."""
    kept = []
    skip = False
    for argument in arguments:
        if not skip and argument not in ("--out", "--commit"):
            kept.append(shlex.quote(argument))
        skip = argument in ("--out", "--commit")
    return kept


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else os.path.basename(sys.argv[0])  # noqa: PTH119 a bare name


def _first_line(command: list[str]) -> str | None:
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.splitlines()[0].strip() if out.strip() else None
