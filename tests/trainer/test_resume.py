"""2N steps ≡ N + SIGKILL + resume + N, to the last bit; and every saved item is needed for that."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo import GRPOConfig, GRPOTrainer, InputError, SFTConfig, SFTTrainer
from grpo.trainer.checkpoint import newest_checkpoint
from grpo.trainer.state import capture
from tests.tiny import tiny_model, tokenizer

ROWS = [{"prompt": f"sort {digits}", "answer": digits} for digits in ("31", "4142", "27", "995", "8")]
STEPS = 8


class CountingReward:
    """A reward with state of its own: what it pays depends on how often it was called."""

    __name__ = "counting"

    def __init__(self):
        self.calls = 0

    def __call__(self, completion, answer):
        self.calls += 1
        return len(completion) % 5 + 0.01 * (self.calls % 7) + random.random()

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def noisy(module, arguments, output):
    """Draws from every generator of the process whenever the policy trains."""
    if module.training:
        return output * (1 + 0.01 * random.random() + 0.01 * float(np.random.normal()) + 0.01 * float(torch.rand(())))
    return output


def make(folder, lora=True, dtype=torch.float32, **changes):
    text = tokenizer()
    model = tiny_model(vocab_size=len(text), dtype=dtype)
    model.model.norm.register_forward_hook(noisy)
    config = GRPOConfig(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "prompts_per_step": 2,  # the second epoch begins within the third rollout
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0.2,
            "num_iterations": 2,
            "max_tokens_per_batch": 40,
            "adapter": {"r": 4, "dropout": 0.2} if lora else None,
            "save_steps": 1,
            **changes,
        }
    )
    return GRPOTrainer(model, CountingReward(), config, ROWS, ROWS[:2], processing_class=text)


def final_state(trainer):
    """Everything that a checkpoint would hold, flattened, and the metrics rows without their clock."""
    state = capture(trainer)
    tensors = {f"{file}/{name}": t for file, held in state.tensors.items() for name, t in held.items()}
    return tensors, state.state, rows_of(trainer.folder.path)


def rows_of(folder):
    clock = ("step_time", "tokens_per_second", "phase/", "rewards/counting/p")
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(clock)} for row in rows]


def differences(a, b):
    tensors_a, state_a, rows_a = a
    tensors_b, state_b, rows_b = b
    found = [
        name
        for name in {*tensors_a, *tensors_b}
        if name not in tensors_a or name not in tensors_b or not torch.equal(tensors_a[name], tensors_b[name])
    ]
    found += [name for name in {*state_a, *state_b} if state_a.get(name) != state_b.get(name)]
    return (
        found
        + [f"row {index}" for index, (x, y) in enumerate(zip(rows_a, rows_b, strict=False)) if x != y]
        + ([] if len(rows_a) == len(rows_b) else ["number of rows"])
    )


def run_until(trainer, step):
    for row in trainer.steps():
        if row["step"] == step:
            break


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [5, 6])  # in the middle of a buffer, and at its end; both in the second epoch
def test_resume_equals_going_on(tmp_path, lora, dtype, cut):
    whole = make(tmp_path / "whole", lora, dtype)
    whole.train()
    first = make(tmp_path / "cut", lora, dtype)
    run_until(first, cut)
    assert (first.buffer is not None) == (cut == 5)
    second = make(tmp_path / "cut", lora, dtype)
    second.train(resume_from_checkpoint=True)
    assert differences(final_state(whole), final_state(second)) == []


def scrambled(folder):
    """A new trainer in a process whose generators stand somewhere else, as after a restart."""
    trainer = make(folder)
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    return trainer


ITEMS = ["weights", "optimizer", "step", "schedule", "cursor", "num_tokens", "buffer", "buffer_facts", "policy_version",
         "rewards", "fault_budget", "generators"]  # fmt: skip


@pytest.mark.parametrize("item", [None, *ITEMS, "metrics_bytes"])
def test_every_item_is_needed(tmp_path, item, monkeypatch):
    whole = make(tmp_path / "whole")
    whole.train()
    first = make(tmp_path / "cut")
    run_until(first, 5)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward": 0.0}\n')  # written after the checkpoint, as a killed run leaves it
    second = scrambled(tmp_path / "cut")
    kept = [entry for entry in second.items() if entry.name != item]
    monkeypatch.setattr(second, "items", lambda: kept)
    if item == "metrics_bytes":
        monkeypatch.setattr(second.folder, "rewind", lambda metrics_bytes, step: None)
    failed = False
    try:
        second.train(resume_from_checkpoint=True)
    except (KeyError, ValueError, RuntimeError, AttributeError, IndexError):
        failed = True
    monkeypatch.undo()
    found = ["raised"] if failed else differences(final_state(whole), final_state(second))
    assert bool(found) == (item is not None), found


@pytest.mark.parametrize("part", ["torch", "random", "numpy_keys", "numpy_position"])
def test_every_generator_is_needed(tmp_path, part, monkeypatch):
    whole = make(tmp_path / "whole")
    whole.train()
    first = make(tmp_path / "cut")
    run_until(first, 5)
    second = scrambled(tmp_path / "cut")
    from grpo.trainer import state

    original = state.restore_generators
    fresh = state.generators()
    monkeypatch.setattr(
        state,
        "restore_generators",
        lambda states: original({**states, part: fresh[part]}) if second.step == 5 else original(states),
    )
    second.train(resume_from_checkpoint=True)
    assert differences(final_state(whole), final_state(second))


def test_the_list_of_items_above_is_complete(tmp_path):
    names = {item.name for item in make(tmp_path / "run").items()}
    assert names == {*ITEMS, "nonfinite_in_a_row", "empty_in_a_row", "tokens_per_bin"}  # see test_counters_survive


@pytest.mark.parametrize(("name", "value"), [("nonfinite_in_a_row", 2), ("empty_in_a_row", 9), ("tokens_per_bin", 77)])
def test_counters_survive(tmp_path, name, value):
    first = make(tmp_path / "run")
    setattr(first, name, value)
    first.folder.open(resume=False)
    first.save()
    first.folder.close()
    second = make(tmp_path / "run")
    second.resume()
    assert getattr(second, name) == value


SCRIPT = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    import torch
    torch.set_num_threads(1)
    from tests.trainer.test_resume import make
    trainer = make({folder!r})
    for row in trainer.steps(resume_from_checkpoint={resume}):
        if row["step"] == {kill_at}:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def run_script(folder, resume, kill_at):
    root = str(Path(__file__).parents[2])
    script = textwrap.dedent(SCRIPT.format(root=root, folder=str(folder), resume=resume, kill_at=kill_at))
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


def test_sigkill_and_resume_in_another_process(tmp_path):
    whole = make(tmp_path / "whole")
    whole.train()
    killed = run_script(tmp_path / "cut", False, 5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run_script(tmp_path / "cut", True, -1)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 5 of 8" in resumed.stdout
    a, b = (newest_checkpoint(tmp_path / name, report=print) for name in ("whole", "cut"))
    assert a.step == b.step == STEPS
    for file, tensors in a.tensors.items():
        assert set(tensors) == set(b.tensors[file])
        assert all(torch.equal(value, b.tensors[file][name]) for name, value in tensors.items())
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "cut")


def test_a_supervised_run_resumes_too(tmp_path):
    def make_sft(name):
        text = tokenizer()
        config = SFTConfig(
            output_dir=str(tmp_path / name), max_steps=6, examples_per_step=2, learning_rate=1e-2, save_steps=1,
            adapter={"r": 4, "dropout": 0.3},
        )  # fmt: skip
        rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in ROWS]
        return SFTTrainer(tiny_model(vocab_size=len(text)), config, rows, processing_class=text)

    whole = make_sft("whole")
    whole.train()
    first = make_sft("cut")
    run_until(first, 4)
    second = make_sft("cut")
    torch.manual_seed(99)
    second.train(resume_from_checkpoint=True)
    assert differences(final_state(whole), final_state(second)) == []


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    make(tmp_path / "run", max_steps=1).train()
    with pytest.raises(InputError, match="holds a run"):
        make(tmp_path / "run").train()


def test_resuming_with_other_settings_is_refused_by_name(tmp_path):
    make(tmp_path / "run", max_steps=2).train()
    facts = {
        name: (tmp_path / "run" / name).read_bytes() for name in ("config.yaml", "environment.json", "metrics.jsonl")
    }
    with pytest.raises(InputError) as error:
        make(tmp_path / "run", max_steps=4, learning_rate=1e-3).train(resume_from_checkpoint=True)
    assert [line.split(": ", 1)[1].split(" (")[0] for line in error.value.lines] == [
        "max_steps was 2, is 4",
        "optimizer.learning_rate was 0.01, is 0.001",
    ]
    assert facts == {name: (tmp_path / "run" / name).read_bytes() for name in facts}  # a refused resume changes nothing
    row = make(tmp_path / "run", max_steps=4).train(resume_from_checkpoint=True, allow_changes=["max_steps"])
    assert row["step"] == 4


def test_another_base_model_is_noticed(tmp_path):
    make(tmp_path / "run", max_steps=1).train()
    other = make(tmp_path / "run", max_steps=1)
    with torch.no_grad():
        other.policy.causal_lm.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(InputError, match="frozen base weights differ"):
        other.train(resume_from_checkpoint=True)


def test_resume_without_a_checkpoint_starts_and_says_so(tmp_path, capsys):
    row = make(tmp_path / "run", max_steps=1).train(resume_from_checkpoint=True)
    assert row["step"] == 1
    assert "no checkpoint to resume from, starting at step 0" in capsys.readouterr().out


class StopAt(CountingReward):
    def __call__(self, completion, answer):
        value = super().__call__(completion, answer)
        if self.calls == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return value


@pytest.fixture
def pythons_own_sigint():
    """A parallel test runner may have another handler, which the trainer would leave alone."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_arrives_at_a_step_boundary_and_training_goes_on(tmp_path, pythons_own_sigint):
    whole = make(tmp_path / "whole")
    whole.train()
    trainer = make(tmp_path / "run")
    trainer.rewards[0].function.__class__ = StopAt
    seen = []
    with pytest.raises(KeyboardInterrupt):
        for row in trainer.steps():
            seen.append(row["step"])
    assert seen and trainer.step == seen[-1] < STEPS
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trainer.train()
    assert differences(final_state(whole), final_state(trainer)) == []


class Impatient(CountingReward):
    def __call__(self, completion, answer):
        value = super().__call__(completion, answer)
        if self.calls in (20, 21):
            os.kill(os.getpid(), signal.SIGINT)
        return value


def test_a_second_ctrl_c_acts_at_once_and_is_forgotten(tmp_path, pythons_own_sigint):
    trainer = make(tmp_path / "run")
    trainer.rewards[0].function.__class__ = Impatient
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.rewards[0].function.__class__ = CountingReward
    assert trainer.train()["step"] == STEPS


def test_a_step_that_raises_is_undone(tmp_path):
    whole = make(tmp_path / "whole")
    whole.train()
    trainer = make(tmp_path / "run")
    steps = trainer.steps()
    next(steps), next(steps)
    generate = trainer.engine.generate

    def fail_late(*_):
        random.random(), np.random.rand(), torch.rand(1)
        raise MemoryError("no room")

    trainer.engine.generate = fail_late
    with pytest.raises(MemoryError):
        next(steps)
    trainer.engine.generate = generate
    trainer.train()
    assert differences(final_state(whole), final_state(trainer)) == []
