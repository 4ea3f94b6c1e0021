"""One try of another trainer, in a process of its own.

    row = attempt_apart(case, method, card, rate, files)         # a row, as from bench_try.attempt_here
    found = gradient_apart(case, method, device, files)          # parameter name -> gradient

Unsloth's import rewrites transformers and trl for its whole process, and TRL's activation offloading keeps a model's
memory after the model is gone: neither may touch the next measurement. The process imports the trainer's package before
anything else, as Unsloth asks for. Its torch has the card's cap, and asked how much memory is free it says what is left
of that cap, as on a card of that size.
Left out: reuse of a process. Its start costs seconds, not counted as the try's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.bench_card import Card, Rate
from grpo.bench_models import SHAPES, Case
from grpo.bench_peers import PEERS
from grpo.bench_search import Row
from grpo.bench_step import Method
from grpo.bench_try import attempt_here, gradient_here
from grpo.errors import InputError, RunError, clip

_REPLY, _GRADIENT, _LOG = "reply.json", "gradient.pt", "log.txt"


def attempt_apart(case: Case, method: Method, card: Card, rate: Rate, files: Path | None) -> Row:
    """`bench_try.attempt_here` of a peer.

    Args:
        files: what its `write` has written.

    Raises:
        InputError: it is not installed, or does not do what the case asks for.
        RunError: its process failed for another reason than memory that ran out.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = {"size": card.size, "flops": rate.flops}
        row: Row = _run(case, method, card.device, files, task, Path(folder))["row"]
        return row


def gradient_apart(
    case: Case, method: Method, device: torch.device, files: Path | None, **changes: Any
) -> dict[str, Tensor]:
    """`bench_try.gradient_here` of a peer; raises as `attempt_apart`."""
    with tempfile.TemporaryDirectory() as folder:
        _run(case, method, device, files, {"changes": changes}, Path(folder))
        found: dict[str, Tensor] = torch.load(Path(folder) / _GRADIENT)
        return found


def _run(
    case: Case, method: Method, device: torch.device, files: Path | None, task: dict[str, Any], folder: Path
) -> dict[str, Any]:
    peer = PEERS[method.name]
    if not peer.installed:
        raise InputError(f"{peer.package} is not installed")
    Card(device).clean()  # what this process has cached would be missing there
    shape = case.shape if case.shape in SHAPES else str(Path(case.shape).expanduser().resolve())
    task |= {"case": asdict(replace(case, shape=shape, options=())), "method": method.name, "device": str(device)}
    task |= {"files": files and str(files), "folder": str(folder)}
    paths = [str(Path(path).resolve()) for path in sys.path]
    code = f"import sys; sys.path[:] = {paths!r}; import {peer.package}; from grpo.bench_process import main; main()"
    with (folder / _LOG).open("w") as log:
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(task)],
            cwd=files or folder,  # Unsloth writes what it has generated where it runs, to read it the next time
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if not (folder / _REPLY).exists():
        lines = (folder / _LOG).read_text(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        raise RunError(f"its process ended with {done.returncode}: {clip(last, 160)}")
    found: dict[str, Any] = json.loads((folder / _REPLY).read_text())
    if "refused" in found:
        raise InputError(found["refused"])
    return found


# --- in that process -------------------------------------------------------------------------------------------------


def main() -> None:
    """What the process does: the task is its argument, the reply a file."""
    task = json.loads(sys.argv[1])
    folder, files = Path(task["folder"]), task["files"] and Path(task["files"])
    case, method = Case(**task["case"]), Method(task["method"], peer=True)
    try:
        reply = _reply(task, case, method, torch.device(task["device"]), files, folder)
    except (ImportError, InputError) as error:
        reply = {"refused": str(error)}
    (folder / _REPLY).write_text(json.dumps(reply))


def _reply(
    task: dict[str, Any], case: Case, method: Method, device: torch.device, files: Path | None, folder: Path
) -> dict[str, Any]:
    if "changes" in task:
        torch.save(gradient_here(case, method, device, files, **task["changes"]), folder / _GRADIENT)
        return {}
    with Card(device, task["size"]) as card:
        if card.size is not None:
            torch.cuda.mem_get_info = card.memory_info
        return {"row": attempt_here(case, method, card, Rate(task["flops"]), files)}
