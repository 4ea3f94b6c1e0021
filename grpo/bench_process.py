"""Another trainer, measured in a process of its own.

    with PeerProcess(method, card) as process:
        process.prepare(case)
        row = process.attempt(case, rate)      # as from bench_try.attempt_here
        found = process.gradients(case)        # as from bench_try.gradient_here

Unsloth's import rewrites transformers and trl for its whole process, and TRL's activation offloading keeps a model's
memory after the model is gone: neither may touch the next measurement. The process imports the trainer's package before
anything else, as Unsloth asks for, and is replaced after a try that failed or left memory behind. Its torch has the
card's cap, and asked how much memory is free it says what is left of that cap, as on a card of that size.
Left out: the seconds of its start, which are not the try's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
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

LEFT_GIB = 1.0  # Unsloth's buffers for layer inputs stay, 0.5 GiB of an 8B at 32,768 tokens; a longer try has them too
_GRADIENTS, _LOG = "gradients.pt", "log.txt"


class PeerProcess:
    """One peer, in a process that starts with the first task and ends with the block.

    Every method raises `InputError` where the peer is not installed or does not do what the case asks for, and
    `RunError` where its process ended otherwise than with an answer.
    """

    def __init__(self, method: Method, card: Card) -> None:
        self._method, self._peer, self._card = method, PEERS[method.name], card
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> PeerProcess:
        self._temporary = tempfile.TemporaryDirectory()
        self._folder = Path(self._temporary.name)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._temporary.cleanup()

    def prepare(self, case: Case, **changes: Any) -> None:
        """Write what the peer reads, before the card has its cap."""
        if not self._peer.installed:
            raise InputError(f"{self._peer.package} is not installed")
        if self._peer.write is not None:
            self._peer.write(case, self._folder, self._card.device, self._card.dtype, **changes)

    def attempt(self, case: Case, rate: Rate) -> Row:
        """`bench_try.attempt_here` of the peer."""
        row: Row = self._ask(case, {"size": self._card.size, "flops": rate.flops})["row"]
        return row

    def gradients(self, case: Case, **changes: Any) -> dict[str, Tensor]:
        """`bench_try.gradient_here` of the peer."""
        self._ask(case, {"changes": changes})
        found: dict[str, Tensor] = torch.load(self._folder / _GRADIENTS)
        return found

    def _ask(self, case: Case, task: dict[str, Any]) -> dict[str, Any]:
        self._card.clean()  # what this process has cached would be missing there
        shape = case.shape if case.shape in SHAPES else str(Path(case.shape).expanduser().resolve())
        task |= {"case": asdict(replace(case, shape=shape, options=()))}
        task |= {"method": self._method.name, "device": str(self._card.device)}
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = process.wait()
            self._end()
            lines = (self._folder / _LOG).read_text(errors="replace").splitlines()
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
            raise RunError(f"its process ended with {code}: {clip(last, 160)}")
        found: dict[str, Any] = json.loads(answer)
        if found["last"]:
            self._end()
        if "refused" in found:
            raise InputError(found["refused"])
        return found

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()  # it has nothing more to say, and a library's threads may keep it
        with suppress(BrokenPipeError):
            process.communicate()
        self._answers.close()

    def _start(self) -> subprocess.Popen[str]:
        paths = [str(Path(path).resolve()) for path in sys.path]
        first = f"import {self._peer.package}"
        code = f"import sys; sys.path[:] = {paths!r}; {first}; from grpo.bench_process import main; main()"
        reading, writing = os.pipe()
        with (self._folder / _LOG).open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(writing)],
                cwd=self._folder,  # Unsloth writes what it has generated where it runs
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                text=True,
            )
        os.close(writing)
        self._answers = os.fdopen(reading)
        return process


# --- in that process -------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer tasks, a line each, until there are none or one leaves the process unfit for another."""
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        for line in sys.stdin:
            try:
                answer = _answer(json.loads(line))
            except (ImportError, InputError) as error:
                answer = {"refused": str(error), "last": True}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
            if answer["last"]:
                return


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    case, method, device = Case(**task["case"]), Method(task["method"], peer=True), torch.device(task["device"])
    files = Path.cwd()
    if "changes" in task:
        torch.save(gradient_here(case, method, device, files, **task["changes"]), files / _GRADIENTS)
        return {"last": True}
    card = Card(device, task["size"])
    if card.size is not None:
        torch.cuda.mem_get_info = card.memory_info
    with card:
        row = attempt_here(case, method, card, Rate(task["flops"]), files)
    return {"row": row, "last": "failed" in row or (card.held_gib() or 0.0) > LEFT_GIB}
