"""The `grpo` command: demo, train, sft, evaluate, check-rewards, plan, bench.

Exit codes: 0 done, 1 the run failed (the folder is saved), 2 bad input, 75 stopped by a signal (resume it).
Left out: anything a Python caller could want too. Each command is a few lines over the public classes.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from grpo.errors import InputError, RunError

if TYPE_CHECKING:
    from grpo.config import RunConfig
    from grpo.trainer.base import BaseTrainer

STOPPED = 75

ConfigFile = Annotated[Path, tyro.conf.arg(metavar="CONFIG.yaml", help="the run's configuration")]
Overrides = Annotated[
    list[str], tyro.conf.arg(metavar="section.key=value", help="override a knob, e.g. optimizer.learning_rate=1e-6")
]
Debug = Annotated[bool, tyro.conf.arg(help="show the traceback of an error")]
Resume = Annotated[bool, tyro.conf.arg(help="go on from the newest whole checkpoint in output_dir")]
AllowChange = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="KEY", help="on resume: a knob that may differ from the checkpoint's")
]


def train(
    config: tyro.conf.Positional[ConfigFile],
    overrides: tyro.conf.Positional[Overrides],
    /,
    resume: Resume = False,
    allow_change: AllowChange = (),
    dry_run: Annotated[bool, tyro.conf.arg(help="print the resolved configuration and stop")] = False,
    debug: Debug = False,
) -> int:
    """Train a model with GRPO on your reward functions."""
    from grpo.config import GRPOConfig

    resolved = GRPOConfig.from_file(config, overrides)
    return _start(resolved, "grpo.trainer.loop:GRPOTrainer", resume, allow_change, dry_run)


def sft(
    config: tyro.conf.Positional[ConfigFile],
    overrides: tyro.conf.Positional[Overrides],
    /,
    resume: Resume = False,
    allow_change: AllowChange = (),
    dry_run: Annotated[bool, tyro.conf.arg(help="print the resolved configuration and stop")] = False,
    debug: Debug = False,
) -> int:
    """Supervised warm-up on prompt and completion columns, loss on the completion only."""
    from grpo.config import SFTConfig

    resolved = SFTConfig.from_file(config, overrides)
    return _start(resolved, "grpo.sft:SFTTrainer", resume, allow_change, dry_run)


def evaluate(
    config: tyro.conf.Positional[ConfigFile],
    overrides: tyro.conf.Positional[Overrides],
    /,
    model: Annotated[str | None, tyro.conf.arg(help="folder or hub id instead of model.name_or_path")] = None,
    json: Annotated[bool, tyro.conf.arg(help="print one JSON object")] = False,
    debug: Debug = False,
) -> int:
    """Mean reward, mean@1 and pass@k on data.eval; evaluation.num_generations sets the largest k."""
    from grpo.config import GRPOConfig

    if model is not None:
        overrides = [*overrides, f"model.name_or_path={model}"]
    resolved = GRPOConfig.from_file(config, overrides)
    if resolved.data.eval is None:
        raise InputError(f"{config}: data.eval is null (want held-out rows)")
    from grpo.trainer.loop import GRPOTrainer

    _quiet_library_bars()
    trainer = GRPOTrainer(args=resolved)
    metrics = trainer.evaluate()
    if json:
        import json as json_module

        sys.stdout.write(json_module.dumps(metrics) + "\n")
        return 0
    trainer.console.table(
        f"{resolved.model.name_or_path} on {resolved.data.eval} ({len(trainer.eval_prompts)} prompts × "
        f"{resolved.evaluation.num_generations})",
        [(name.removeprefix("eval_"), f"{value:.4f}") for name, value in metrics.items()],
    )
    return 0


def check_rewards(  # noqa: PLR0913 (each is an option of the command)
    config: tyro.conf.Positional[ConfigFile],
    overrides: tyro.conf.Positional[Overrides],
    /,
    samples: Annotated[int, tyro.conf.arg(help="rows of data.train to try the functions on")] = 16,
    difficulty: Annotated[int, tyro.conf.arg(help="prompts to sample from the model; 0 = load no weights")] = 0,
    model: Annotated[str | None, tyro.conf.arg(help="folder or hub id instead of model.name_or_path")] = None,
    skip: Annotated[tuple[str, ...], tyro.conf.arg(help="names of tries, or kinds of findings, to leave out")] = (),
    gold: Annotated[str | None, tyro.conf.arg(help="column of the right answer; default: the first called so")] = None,
    maximum: Annotated[float | None, tyro.conf.arg(help="reward of a right answer; default: the highest seen")] = None,
    presentations: Annotated[
        tuple[str, ...], tyro.conf.arg(help="how a right answer is written: texts with {answer} in them, or NAME=TEXT")
    ] = (),
    timeout: Annotated[float, tyro.conf.arg(help="seconds that one call may take")] = 10.0,
    debug: Debug = False,
) -> int:
    """Try the reward functions on right, wrong and hostile completions before training; exit code 1 on errors."""
    from grpo.check_rewards import CheckOptions, measure_difficulty
    from grpo.check_rewards import check_rewards as check
    from grpo.config import GRPOConfig
    from grpo.trainer.console import Console

    if model is not None:
        overrides = [*overrides, f"model.name_or_path={model}"]
    resolved = GRPOConfig.from_file(config, overrides)
    options = CheckOptions(samples, skip, gold, maximum, presentations, timeout)
    report, console = check(resolved, options), Console()
    summary = [(name, *numbers.values()) for name, numbers in report.summary.items()]
    console.table("rewards", summary, ["function", *next(iter(report.summary.values()))])
    rows = [(f.level, f.function, f.text, ", ".join(map(str, f.rows[:6])), f.column) for f in report.findings]
    console.table(f"{len(report.errors)} errors", rows, ("", "function", "finding", "rows", "column"))
    if difficulty or model is not None:
        _quiet_library_bars()
        measured = measure_difficulty(resolved, difficulty or 64, console)
        histogram = measured.pop("histogram")
        console.table(f"difficulty for {resolved.model.name_or_path}", [(k, f"{v:.4f}") for k, v in measured.items()])
        console.table("prompts by pass rate: 0, between, 1", [histogram])
    return 0 if report.ok else 1


def plan(
    config: tyro.conf.Positional[ConfigFile],
    overrides: tyro.conf.Positional[Overrides],
    /,
    gpu: Annotated[
        str | None, tyro.conf.arg(metavar="SIZE", help="memory of the card, e.g. 24GB; default: here")
    ] = None,
    debug: Debug = False,
) -> int:
    """Predict the memory of a run, phase by phase, without reading weights; exit code 1 when it does not fit."""
    from grpo.config import GRPOConfig
    from grpo.plan_report import planned

    found, lines = planned(GRPOConfig.from_file(config, overrides), gpu)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if found.fits else 1


def bench(
    model: Annotated[
        str | None,
        tyro.conf.arg(metavar="SHAPE", help="such as llama-3.1-8b, or a folder; default: qwen3-1.7b, on a CPU toy"),
    ] = None,
    method: Literal["full", "lora", "qlora"] = "lora",
    gpu: Annotated[str | None, tyro.conf.arg(metavar="SIZE", help="cap memory, e.g. 24GB; default: all of it")] = None,
    tokens: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N", help="measure these lengths, do not search")] = (),
    budget: Annotated[float, tyro.conf.arg(metavar="SECONDS", help="for the search; no try is begun beyond it")] = 600,
    device: Annotated[str, tyro.conf.arg(help="auto, cpu, cuda or cuda:N")] = "auto",
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="write everything measured as JSON")] = None,
    debug: Debug = False,
) -> int:
    """The longest completion that trains here, and what a step costs; random weights, beside TRL where installed."""
    from grpo.bench import benchmark
    from grpo.bench_table import text_lines
    from grpo.trainer.console import Console

    console = Console()
    found = benchmark(model, method, gpu=gpu, tokens=tokens, device=device, budget_s=budget, say=console.say)
    sys.stdout.write("\n".join([f"{found['shape']}, {method}; memory in GiB", *text_lines(found), ""]))
    if out is not None:
        import json

        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def demo(
    seed: Annotated[int, tyro.conf.arg(help="of data, model and sampling")] = 0,
    output_dir: Annotated[
        Path | None, tyro.conf.arg(help="run folder; default: runs/demo, or the next free name")
    ] = None,
    engine: Annotated[
        Literal["hf", "vllm"], tyro.conf.arg(help="rollout engine; vllm needs a GPU and the vllm extra")
    ] = "hf",
    debug: Debug = False,
) -> int:
    """Warm up a tiny model and train it with GRPO, on a CPU, in about a minute."""
    from grpo.demo import free_folder, run_demo

    _quiet_library_bars()
    run_demo(seed, output_dir or free_folder(Path("runs/demo")), engine=engine)
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "demo": demo,
    "train": train,
    "sft": sft,
    "evaluate": evaluate,
    "check-rewards": check_rewards,
    "plan": plan,
    "bench": bench,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exits with the codes listed at the top of this file."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments or bool(os.environ.get("GRPO_DEBUG"))
    # It says at import that a CPU kernel which is not used here is not installed.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="grpo", description="GRPO on the GPU you already have.", args=arguments
        )
    except (InputError, RunError) as error:
        if debug:
            raise
        sys.stderr.write(f"{error}\n")
        code = error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = STOPPED
    sys.exit(code)


def _start(resolved: RunConfig, trainer: str, resume: bool, allow_changes: tuple[str, ...], dry_run: bool) -> int:
    """Print the configuration, or import what trains (torch and all) and run it."""
    if dry_run:
        sys.stdout.write(resolved.to_yaml())
        return 0
    _quiet_library_bars()
    module, _, name = trainer.partition(":")
    return _run(getattr(importlib.import_module(module), name)(args=resolved), resume, allow_changes)


def _quiet_library_bars() -> None:
    """transformers' own progress bars belong on a terminal, not into a log."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def _run(trainer: BaseTrainer, resume: bool, allow_changes: tuple[str, ...]) -> int:
    _stop_on_signals(trainer)
    trainer.train(resume_from_checkpoint=resume, allow_changes=allow_changes)
    if trainer.step < trainer.config.max_steps:
        trainer.console.say(f"stopped at step {trainer.step}, saved; go on with --resume")
        return STOPPED
    folder = Path(trainer.config.output_dir)
    trainer.save_model(folder / "model")
    _show_end(trainer, folder)
    return 0


def _show_end(trainer: Any, folder: Path) -> None:
    show = getattr(trainer, "show_samples", None)
    if show is not None:
        show(trainer.config.logging.completions)
    trainer.console.say(f"model: {folder / 'model'}")
    trainer.console.say(f"report: {folder / 'report.html'}")


def _stop_on_signals(trainer: BaseTrainer) -> None:
    """First SIGINT or SIGTERM: stop at the next step boundary, saved. A second one: at once."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        if trainer.stop_requested:
            raise SystemExit(STOPPED)
        trainer.stop_requested = True
        sys.stderr.write("stopping after this step (again to stop at once)\n")

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
