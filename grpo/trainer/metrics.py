"""What a run leaves behind: the run folder, its metrics rows and rollout files, and trackers beside them.

    config.yaml  environment.json  metrics.jsonl  rollouts/step_000123.parquet  checkpoints/…  report.html  run.lock

The local files are the truth; a tracker is an addition whose failure is said once and never ends the run.
Left out: what the numbers mean. The names are the field's (README has the glossary).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import secrets
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.batch import Rollouts, ScoredRollouts
from grpo.errors import InputError, clip
from grpo.trainer.checkpoint import RunLock, clean_leftovers

_VERSIONED = ("leangrpo", "torch", "triton", "transformers", "peft", "datasets", "bitsandbytes", "numpy", "vllm")


class RunFolder:
    """The folder of one run, held under its lock while open.

    Args:
        path: `output_dir`.
        config_yaml: the resolved configuration.
        say: prints one line.

    Raises:
        InputError: on `open`, when another process holds the folder, or it holds a run and `resume` is false.
    """

    def __init__(self, path: str | Path, config_yaml: str, say: Callable[[str], None]) -> None:
        self.path = Path(path)
        self.run_id = secrets.token_hex(8)
        self._config_yaml = config_yaml
        self._say = say
        self._lock: RunLock | None = None
        self._owned = False  # whether the run in the folder is this object's own
        self._trackers: list[Any] = []

    @property
    def metrics_file(self) -> Path:
        """metrics.jsonl."""
        return self.path / "metrics.jsonl"

    def holds_run(self) -> bool:
        """Whether steps or checkpoints of a run are in the folder."""
        checkpoints = self.path / "checkpoints"
        has_checkpoint = checkpoints.is_dir() and any(checkpoints.iterdir())
        return has_checkpoint or (self.metrics_file.is_file() and self.metrics_file.stat().st_size > 0)

    def open(self, resume: bool, trackers: Sequence[str] = ()) -> None:
        """Take the lock, refuse a foreign run unless `resume`, start the trackers."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(self.path, self.run_id)
        lock.__enter__()
        self._lock = lock
        if self.holds_run() and not (resume or self._owned):
            self.close()
            raise InputError(
                f"{self.path}: holds a run (want --resume or resume_from_checkpoint=True to go on with it, "
                "or another output_dir)"
            )
        self._owned = True
        clean_leftovers(self.path)
        self._trackers = [tracker for name in trackers if (tracker := self._start_tracker(name)) is not None]

    def write_facts(self) -> None:
        """config.yaml and environment.json; after a resume was found to fit, so that a refused one changes nothing."""
        (self.path / "config.yaml").write_text(self._config_yaml, encoding="utf-8")
        environment = json.dumps(environment_facts() | {"run_id": self.run_id}, indent=2)
        (self.path / "environment.json").write_text(environment + "\n", encoding="utf-8")

    def close(self) -> None:
        """Finish the trackers and release the lock."""
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock = None

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl, which a checkpoint remembers."""
        return self.metrics_file.stat().st_size if self.metrics_file.exists() else 0

    def rewind(self, metrics_bytes: int, step: int) -> None:
        """Drop what was written after the checkpoint at `step`, so that no step appears twice."""
        if self.metrics_file.exists():
            with self.metrics_file.open("r+b") as file:
                file.truncate(metrics_bytes)
        for path in (self.path / "rollouts").glob("step_*.parquet"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    def append(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write one metrics row. A non-finite number is written as null and counted in `nonfinite`."""
        bad = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        clean = {key: None if key in bad else value for key, value in row.items()}
        if bad:
            clean["nonfinite"] = len(bad)
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean, allow_nan=False) + "\n")
        for tracker in list(self._trackers):
            self._track(tracker, clean)
        return clean

    def write_rollouts(self, step: int, scored: ScoredRollouts, advantages: Sequence[Sequence[float | None]]) -> Path:
        """One Parquet file with a row per completion: prompt, completion, every reward, advantage, finish reason."""
        import pyarrow
        import pyarrow.parquet

        folder = self.path / "rollouts"
        folder.mkdir(exist_ok=True)
        path = folder / f"step_{step:06d}.parquet"
        table = pyarrow.Table.from_pylist(rollout_rows(step, scored, advantages))
        pyarrow.parquet.write_table(table, path)
        return path

    def write_fault(self, step: int, tensors: Mapping[str, Any]) -> Path:
        """The batch of a non-finite step, as safetensors, for a look afterwards."""
        from safetensors.torch import save_file

        folder = self.path / "faults"
        folder.mkdir(exist_ok=True)
        path = folder / f"step_{step:06d}.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        return path

    def _start_tracker(self, name: str) -> Any:
        import wandb

        try:
            return wandb.init(project="leangrpo", name=self.path.name, dir=str(self.path))
        except (wandb.errors.Error, OSError) as error:
            self._say(f"tracker {name} did not start, the run goes on without it: {clip(error)}")
            return None

    def _track(self, tracker: Any, row: Mapping[str, Any]) -> None:
        import wandb

        try:
            tracker.log({key: value for key, value in row.items() if value is not None}, step=row["step"])
        except (wandb.errors.Error, OSError) as error:
            self._say(f"tracker stopped, the run goes on without it: {clip(error)}")
            self._trackers.remove(tracker)


def environment_facts() -> dict[str, Any]:
    """Versions, GPU, driver and commit of this process, as JSON values."""
    import torch

    versions: dict[str, str | None] = {}
    for name in _VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "gpus": gpus,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpus else None,
        "cuda": torch.version.cuda,
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "threads": torch.get_num_threads(),
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def rollout_rows(
    step: int, scored: ScoredRollouts, advantages: Sequence[Sequence[float | None]]
) -> list[dict[str, Any]]:
    """One flat row per completion."""
    rows = []
    for p, (prompt, completions) in enumerate(zip(scored.rollouts.prompts, scored.rollouts.completions, strict=True)):
        text = prompt.example["prompt"]
        for g, completion in enumerate(completions):
            row = {
                "step": step,
                "prompt_id": prompt.id,
                "generation": g,
                "prompt": text if isinstance(text, str) else json.dumps(text, ensure_ascii=False),
                "completion": completion.text,
                "finish_reason": completion.finish_reason,
                "num_tokens": len(completion.token_ids),
                "reward": scored.rewards[p][g],
                "advantage": advantages[p][g],
            }
            row |= {f"reward/{name}": values[p][g] for name, values in scored.parts.items()}
            row |= {f"column/{name}": _scalar(values[p][g]) for name, values in scored.columns.items()}
            rows.append(row)
    return rows


def _scalar(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def completion_metrics(rollouts: Rollouts, prefix: str = "") -> dict[str, float]:
    """`completions/…` lengths in tokens and the share cut off at the limit."""
    completions = [completion for group in rollouts.completions for completion in group]
    lengths = [len(completion.token_ids) for completion in completions]
    ended = [len(completion.token_ids) for completion in completions if completion.finish_reason == "stop"]
    metrics = {
        f"completions/{kind}length": pick(values) if values else 0.0
        for kind_name, values in (("", lengths), ("terminated_", ended))
        for pick_name, pick in (("mean", statistics.fmean), ("min", min), ("max", max))
        for kind in (f"{pick_name}_{kind_name}",)
    }
    cut = sum(completion.finish_reason == "length" for completion in completions)
    metrics["completions/clipped_ratio"] = cut / len(completions) if completions else 0.0
    return {prefix + name: float(value) for name, value in metrics.items()}
