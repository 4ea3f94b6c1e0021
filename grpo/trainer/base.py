"""What a GRPO run and a supervised run share: the step loop, the run folder, checkpoints, resume, interrupts.

A step is a transaction: whatever ends it early (an interrupt, a reward that raises) leaves the trainer as it was at the
last step boundary, so that it can be saved there, or train again. Left out: what a step does (loop.py, sft.py).
"""

from __future__ import annotations

import gc
import hashlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from grpo.batch import TokenBatch
from grpo.config import RunConfig
from grpo.data import PromptStream
from grpo.errors import InputError, RunError, clip
from grpo.ledger import Ledger
from grpo.model.policy import Policy
from grpo.optim import Schedule, make_optimizer
from grpo.packing import smaller_bins
from grpo.plan_report import compare_line, plan_lines
from grpo.planner import plan_of_run
from grpo.seeds import generators, restore_generators
from grpo.trainer.checkpoint import SaveError, newest_checkpoint, save_checkpoint
from grpo.trainer.console import Console, ProgressView
from grpo.trainer.metrics import RunFolder
from grpo.trainer.report import write_report
from grpo.trainer.state import (
    Item,
    capture,
    config_differences,
    loaded_versions,
    restore,
)
from grpo.trainer.update import StepResult

MAX_NONFINITE_IN_A_ROW = 3
MAX_HALVINGS = 3  # of the bins, in one step that does not fit
COMPARED_AT = 2  # the step whose memory is held against the plan: optimizer state is there from the first on
Result = TypeVar("Result")
# Knobs that change what is written or shown, never the trajectory: free to differ on resume.
_FREE_ON_RESUME = ("output_dir", "logging.", "checkpoint.", "evaluation.", "rollout.max_sequences")
_MEMORY_KNOBS = {
    "rollout": "rollout.max_sequences or rollout.max_completion_length",
    "evaluation": "rollout.max_sequences",
    "update": "update.max_tokens_per_batch, or set update.activation_checkpointing: recompute",
    "reference": "update.max_tokens_per_batch",
}


class BaseTrainer:
    """Common half of the trainers. Subclasses give `_advance`, `items` and, if they have one, `_evaluation`.

    Attributes:
        step: optimizer steps done.
        policy, tokenizer, optimizer, schedule: what is trained, and how.
        data: the stream of prompts with its cursor.
        ledger: seconds and peak memory per phase.
        stop_requested: set it to end the run at the next step boundary, saved.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        tokenizer: Any,
        data: PromptStream,
        console: Console,
        ledger: Ledger | None = None,
    ) -> None:
        self.config = config
        self.policy = policy
        self.tokenizer = tokenizer
        self.data = data
        self.console = console
        self.optimizer = make_optimizer(policy.trainable(), config.optimizer)
        self.schedule = Schedule(config.optimizer, config.max_steps)
        self.ledger = Ledger() if ledger is None else ledger
        self.ledger.meter.host_only = policy.device.type == "cpu"
        self.folder = RunFolder(config.output_dir, config.to_yaml(), self.say)
        self.view: ProgressView | None = None
        self.step = 0
        self.num_tokens = 0
        self.nonfinite_in_a_row = 0
        # tokens_per_bin: less once the device ran out of memory. plan: None without CUDA.
        model = policy.causal_lm
        four_bit = bool(getattr(model, "is_loaded_in_4bit", False))
        self.tokens_per_bin, self.plan = plan_of_run(
            config, model.config, policy.device, adapted=policy.adapted, four_bit=four_bit
        )
        self.stop_requested = False
        self.first_row: dict[str, float] = {}  # measured before the first step, written into its row
        self._interrupted = False
        self._phase = ""
        self._set_seeds()

    # --- what subclasses give --------------------------------------------------------------------------------

    def _advance(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics (without step, times and evaluation)."""
        raise AssertionError("a subclass gives this")

    def items(self) -> list[Item]:
        """The state of this trainer, generators last."""
        raise AssertionError("a subclass gives this")

    def _evaluation(self) -> dict[str, float]:
        """Held-out metrics with the prefix `eval_`, or nothing."""
        return {}

    # --- running ---------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: bool = False,
        allow_changes: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Run to `max_steps` and return the last metrics row.

        Args:
            resume_from_checkpoint: go on from the newest whole checkpoint in `output_dir`.
            allow_changes: configuration keys that may differ from the checkpoint's.

        Raises:
            InputError: the folder holds another run, or the checkpoint does not fit.
            RunError: a reward raised, three steps in a row were not finite, …; the folder is saved.
        """
        last: dict[str, Any] = {}
        for row in self.steps(resume_from_checkpoint, allow_changes):
            last = row
        return last

    def steps(
        self, resume_from_checkpoint: bool = False, allow_changes: Sequence[str] = ()
    ) -> Iterator[dict[str, Any]]:
        """Train step by step: yields each metrics row after it is on disk. Goes on where an earlier loop ended."""
        self.folder.open(resume_from_checkpoint, self.config.logging.trackers)
        try:
            if resume_from_checkpoint:
                self.resume(allow_changes)
            self.folder.write_facts()
            yield from self._loop()
        finally:
            self.release()
            self.folder.close()

    def notes(self) -> Sequence[str]:
        """Lines for the start of a run."""
        bins = self.config.update.max_tokens_per_batch
        chosen = [f"update.max_tokens_per_batch: auto is {self.tokens_per_bin:,} tokens"] if bins == "auto" else []
        return [*(plan_lines(self.plan) if self.plan else []), *chosen, *self.policy.notes()]

    def release(self) -> None:
        """End what must not outlive a run (worker processes)."""

    def _loop(self) -> Iterator[dict[str, Any]]:
        for line in (*self.notes(), *getattr(self.config, "translations", ())):
            self.say(line)
        with ProgressView(Path(self.config.output_dir).name, self.config.max_steps, stream=self.console.stream) as view:
            self.view = view
            try:
                if self.step == 0 and not self.first_row:
                    self.first_row = {f"initial_{name}": value for name, value in self._evaluation().items()}
                while self.step < self.config.max_steps and not self.stop_requested:
                    row = self._guarded_step()
                    view.update(row)
                    if self.step == COMPARED_AT and self.plan and (line := compare_line(self.plan, row)):
                        self.say(line)
                    if self._due(self.config.checkpoint.every_steps):
                        self.save()
                    yield row
                    if self._interrupted:
                        self._interrupted = False
                        raise KeyboardInterrupt
                self.save()
            except (RunError, InputError):
                self.save()
                raise
            except torch.OutOfMemoryError as error:
                knobs = _MEMORY_KNOBS.get(self._phase, "update.max_tokens_per_batch or rollout.max_sequences")
                self.save()
                raise RunError(f"out of GPU memory in phase {self._phase} (lower {knobs}): {clip(error)}") from error
            finally:
                self.view = None

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0 and self.step < self.config.max_steps

    def _guarded_step(self) -> dict[str, Any]:
        """One step, its evaluation when due, and its row on disk."""
        start = time.monotonic()
        with self._interrupt_at_the_bound():
            row = {"step": self.step + 1, **self._transaction()}
            if self.step == 1:
                row |= self.first_row
            row["num_tokens"] = self.num_tokens
            row["step_time"] = time.monotonic() - start
            row["tokens_per_second"] = row.get("step_tokens", 0.0) / max(row["step_time"], 1e-9)
            try:
                if self._due(self.config.evaluation.every_steps) or self.step == self.config.max_steps:
                    row |= self._evaluation()
            finally:  # the step is done, whatever an evaluation's reward did
                row = self.folder.append(row | self.ledger.take())
        return row

    def _transaction(self) -> dict[str, Any]:
        """`_advance`; on any exception everything but the weights, which move last, is put back."""
        items = [item for item in self.items() if item.name not in ("weights", "optimizer", "generators")]
        before = [item.capture(self) for item in items]
        random_state = generators()
        try:
            return self._advance()
        except BaseException:
            for item, value in zip(items, before, strict=True):
                item.restore(self, value)
            restore_generators(random_state)
            self.optimizer.zero_grad(set_to_none=True)
            self.ledger.take()
            raise

    def _within_memory(self, batches: list[TokenBatch], run: Callable[[list[TokenBatch]], Result]) -> Result:
        """`run(batches)`; out of GPU memory the whole optimizer step is done again in bins of half the size.

        Divisors are counts of the step, so the update is the same up to rounding. The smaller size holds for the rest
        of the run. After `MAX_HALVINGS`, or when the largest bin is one document, the error goes on.
        """
        random_state = generators()
        for turn in range(MAX_HALVINGS + 1):
            try:
                return run(batches)
            except torch.OutOfMemoryError:
                largest = max(batches, key=lambda batch: sum(batch.segments.lengths), default=None)
                if turn == MAX_HALVINGS or largest is None or len(largest.row_ids) == 1:
                    raise
            # Outside the handler, which holds the frames and with them the graph.
            self.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
            restore_generators(random_state)
            self.tokens_per_bin = min(self.tokens_per_bin, sum(largest.segments.lengths)) // 2
            batches = smaller_bins(batches, self.tokens_per_bin)
            self.say(
                f"step {self.step + 1}: out of GPU memory in the update, done again: bins of at most "
                f"{self.tokens_per_bin} tokens from now on (update.max_tokens_per_batch is "
                f"{self.config.update.max_tokens_per_batch})"
            )
        raise AssertionError("the last turn returns or raises")

    def _count(self, result: StepResult, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Close an optimizer step: the counters, and the rule for a non-finite one."""
        self.step += 1
        self.nonfinite_in_a_row = 0 if result.finite else self.nonfinite_in_a_row + 1
        if not result.finite:
            path = self.folder.write_fault(self.step, tensors)
            self.say(f"step {self.step}: loss or gradient is not finite, step skipped, batch written to {path}")
            if self.nonfinite_in_a_row >= MAX_NONFINITE_IN_A_ROW:
                raise RunError(
                    f"{MAX_NONFINITE_IN_A_ROW} steps in a row were not finite (their batches: {path.parent})"
                )
        return dict(result.metrics)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A named part of the step: on the ledger, and on the screen."""
        if name != "save":
            self._phase = name
        if self.view is not None:
            self.view.phase(name)
        with self.ledger.phase(name):
            yield

    def say(self, line: str) -> None:
        """One line for the person watching."""
        if self.view is not None:
            self.view.note(line)
        else:
            self.console.say(line)

    @contextmanager
    def _interrupt_at_the_bound(self) -> Iterator[None]:
        """Ctrl-C inside a step is delivered at its end; a second one at once. Outside a step nothing is installed."""
        if (
            threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        ):
            yield
            return

        def on_interrupt(number: int, frame: FrameType | None) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        self._interrupted = False  # a second Ctrl-C, or an error, may have ended the step before
        signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    # --- saving ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Commit a checkpoint and the report. A failing disk is said in one line; the last good checkpoint stays."""
        with self.phase("save"):
            checkpoint = capture(self)
            checkpoint.state["metrics_bytes"] = self.folder.metrics_bytes()
            checkpoint.state["run"] = self._identity()
            try:
                save_checkpoint(
                    self.folder.path,
                    checkpoint,
                    run_id=self.folder.run_id,
                    config_hash=_hash(self.config.model_dump(mode="json")),
                    keep=self.config.checkpoint.keep,
                )
            except SaveError as error:
                self.say(f"warning: {clip(error, 300)}; the run goes on, the last whole checkpoint stays")
            try:
                write_report(self.folder.path)
            except OSError as error:
                self.say(f"warning: report.html was not written: {clip(error, 200)}")

    def resume(self, allow_changes: Sequence[str] = ()) -> None:
        """Load the newest checkpoint that verifies. Without one the run starts at step 0, and says so."""
        checkpoint = newest_checkpoint(self.folder.path, report=self.say)
        if checkpoint is None:
            self.say(f"{self.folder.path}: no checkpoint to resume from, starting at step 0")
            self.folder.rewind(0, 0)
            return
        self._check_identity(checkpoint.state["run"], allow_changes)
        restore(self, checkpoint)
        self.folder.run_id = checkpoint.state["run"]["run_id"]
        self.folder.rewind(checkpoint.state["metrics_bytes"], self.step)
        self.say(f"resumed at step {self.step} of {self.config.max_steps}")

    def save_model(self, path: str | Path) -> Path:
        """Write the model (or the adapter) and the tokenizer in Hugging Face's format."""
        target = Path(path)
        self.policy.module.save_pretrained(target)  # type: ignore[operator]
        self.tokenizer.save_pretrained(target)
        return target

    def _identity(self) -> dict[str, Any]:
        return {
            "run_id": self.folder.run_id,
            "config": self.config.model_dump(mode="json"),
            "versions": loaded_versions(),
            "frozen_base": self._base_fingerprint(),
        }

    def _check_identity(self, saved: dict[str, Any], allow_changes: Sequence[str]) -> None:
        differences = [
            line
            for line in config_differences(saved["config"], self.config.model_dump(mode="json"))
            if not line.startswith(_FREE_ON_RESUME) and line.split(" ")[0] not in allow_changes
        ]
        if saved["frozen_base"] != self._base_fingerprint():
            differences.append("the frozen base weights differ from those of the run")
        if differences:
            raise InputError(
                *[
                    f"{self.folder.path}: {line} (want the run's own value, or --allow-change KEY)"
                    for line in differences
                ]
            )
        for line in config_differences(saved["versions"], loaded_versions()):
            self.say(f"note: {line} since the checkpoint; bits may differ")

    def _base_fingerprint(self) -> str:
        """A hash of a few elements of every frozen weight: cheap at 8B, and it notices another model."""
        digest = hashlib.sha256()
        for name, parameter in self.policy.module.named_parameters():
            if not parameter.requires_grad:
                flat = parameter.detach().reshape(-1)
                sample = flat[:: max(1, flat.numel() // 16)][:16].to("cpu", torch.float64)
                digest.update(f"{name}{list(parameter.shape)}{parameter.dtype}{sample.tolist()}".encode())
        return digest.hexdigest()

    def _set_seeds(self) -> None:
        import random

        import numpy as np

        torch.manual_seed(self.config.seed)
        random.seed(self.config.seed)
        np.random.seed(self.config.seed)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def default_console() -> Console:
    """The console of a trainer that was given none."""
    return Console(sys.stdout)
