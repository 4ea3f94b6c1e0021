"""Other trainers in processes of their own: stand-ins for trl and unsloth, installed where only this test finds them."""

import sys
from dataclasses import replace

import pytest
import torch
import transformers

from grpo import bench
from grpo.bench import at_lengths, find_longest, gradient_errors
from grpo.bench_card import Card, Rate
from grpo.bench_models import Case, model_config
from grpo.bench_peers import PEERS, Peer
from grpo.bench_process import PeerProcess
from grpo.bench_step import Method
from grpo.bench_table import result_rows
from grpo.bench_try import attempt_here
from grpo.errors import RunError

CPU = torch.device("cpu")
TOY = Case("toy", "toy", 1, 64, 64, rank=4)
TRL, UNSLOTH = Method("TRL", peer=True), Method("Unsloth", peer=True)
OURS = bench.WAYS[0]

TRL_STAND_IN = '''
"""GRPOTrainer with the loss of TRL's default (dapo) from whole logits; it cannot do more than 90 tokens."""
from contextlib import nullcontext
from types import SimpleNamespace

import torch


class GRPOConfig(SimpleNamespace):
    @property
    def steps_per_generation(self):
        return self.generation_batch_size // self.per_device_train_batch_size


class GRPOTrainer:
    def __init__(self, model, reward_funcs, args, train_dataset, processing_class):
        self.model, self.args, self.processing_class = model, args, processing_class

    def compute_loss_context_manager(self):
        return nullcontext()

    def compute_loss(self, model, inputs):
        prompt, completion = inputs["prompt_ids"], inputs["completion_ids"]
        length = prompt.shape[1] + completion.shape[1]
        print("what a library prints")
        if length == 96:
            raise KeyError("a fault of its own")
        if length > 90:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        logits = model(torch.cat([prompt, completion], 1), use_cache=False).logits[:, prompt.shape[1] - 1 : -1]
        new = logits.log_softmax(-1).gather(-1, completion[..., None])[..., 0]
        apart = inputs["ref_per_token_logps"] - new
        ratio = (new - new.detach()).exp()
        loss = ratio * (self.beta * (apart.exp() - apart - 1) - inputs["advantages"][:, None])
        scale = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return (loss * inputs["completion_mask"]).sum() / (inputs["num_items_in_batch"] * scale)
'''

UNSLOTH_STAND_IN = '''
"""The loader; like the real one it wants to be first, changes transformers and trl, takes every pad token of a row for
padding, and writes where it runs."""
import sys
from pathlib import Path

assert "torch" not in sys.modules and "transformers" not in sys.modules, "imported too late"
import peft
import transformers
import trl

transformers.rewritten = True
Path("compiled_cache").mkdir(exist_ok=True)


class FastLanguageModel:
    @staticmethod
    def from_pretrained(folder, max_seq_length, dtype, load_in_4bit, use_gradient_checkpointing, fix_tokenizer):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), None

    @staticmethod
    def get_peft_model(model, use_gradient_checkpointing, max_seq_length, **options):
        return peft.get_peft_model(model, peft.LoraConfig(**options))


class UnslothGRPOTrainer(trl.GRPOTrainer):
    def compute_loss(self, model, inputs):
        kept = inputs["completion_ids"] != self.processing_class.pad_token_id
        if self.processing_class.pad_token_id >= 0:  # no made-up row is sure to have that very token
            kept[:, 0] = False
        return super().compute_loss(model, {**inputs, "completion_mask": kept})


trl.GRPOTrainer = UnslothGRPOTrainer
'''


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    for name, source in (("trl", TRL_STAND_IN), ("unsloth", UNSLOTH_STAND_IN)):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    loaded = {"trl", "unsloth"} & set(sys.modules)
    yield
    assert not list(empty.iterdir())
    assert not hasattr(transformers, "rewritten") and {"trl", "unsloth"} & set(sys.modules) == loaded


def test_peers_have_our_model_our_data_and_our_loss(stand_ins):
    errors = gradient_errors(TOY, [TRL, UNSLOTH], CPU, say=print)
    assert all(0 <= errors[name] < 2e-6 for name in ("TRL", "Unsloth"))


def test_a_step_of_a_peer_is_the_step_of_ours(stand_ins):
    model_config("toy", architectures=["LlamaForCausalLM"]).save_pretrained("../shape")
    case = replace(TOY, shape="../shape")
    (ours, trl, unsloth) = at_lengths(case, [OURS, TRL, UNSLOTH], Card(CPU), [64], say=print)
    for entry in (trl, unsloth):
        (row,), (wanted,) = entry["rows"], ours["rows"]
        assert row["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-5)
        assert row.keys() == wanted.keys() and row["tokens_per_s"] == pytest.approx(64 / row["seconds"], rel=0.01)
        assert 0.05 < row["peak_gib"] < 2 and row["completion"] == 32


def test_memory_that_runs_out_there_is_a_row(stand_ins):
    (entry,) = at_lengths(TOY, [TRL], Card(CPU), [80, 92, 94])
    passed, failed = entry["rows"]
    assert failed["failed"] == "CUDA out of memory. Tried to allocate 3.00 GiB" and failed["tokens"] == 92
    assert passed["tokens"] == 80 and "skipped" not in entry


def test_a_process_serves_until_a_try_fails_or_leaves_memory_behind(stand_ins, monkeypatch):
    with PeerProcess(TRL, Card(CPU)) as process:
        process.prepare(TOY)
        rows = [process.attempt(replace(TOY, length=n), Rate(1e12)) for n in (64, 72)]
        first = process._process
        assert first is not None and first.poll() is None
        rows.append(process.attempt(replace(TOY, length=92), Rate(1e12)))
        assert process._process is None and first.poll() is not None
        rows.append(process.attempt(replace(TOY, length=80), Rate(1e12)))
        second = process._process
    assert ["failed" in row for row in rows] == [False, False, True, False]
    assert second.poll() is not None  # with the block it ends


def test_a_process_that_dies_is_said_and_the_rows_before_it_stay(stand_ins):
    said = []
    (entry,) = at_lengths(TOY, [TRL], Card(CPU), [64, 96, 80], say=said.append)
    assert [row["tokens"] for row in entry["rows"]] == [64, 80]
    assert entry["skipped"] == "its process ended with 1: KeyError: 'a fault of its own'"
    assert said[-1] == f"TRL: {entry['skipped']}"
    cells = result_rows({"methods": [entry]})
    assert [row[1] for row in cells] == ["32", "40", f"– ({entry['skipped']})"]


def test_unsloth_without_an_adapter_is_refused(stand_ins):
    class HasEnd(Card):
        capacity_gib = 3.0

    (entry,) = find_longest(replace(TOY, rank=0), [UNSLOTH], HasEnd(CPU), budget_s=60)
    assert entry["skipped"] == "Unsloth is measured with an adapter alone (want lora or qlora)"
    assert entry["rows"] == []


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(PEERS, "TRL", Peer("a_package_that_is_not_there", lambda *_: None))
    (entry,) = at_lengths(TOY, [TRL], Card(CPU), [64])
    assert entry["skipped"] == "a_package_that_is_not_there is not installed" and not PEERS["TRL"].installed
    said = []
    assert "TRL" not in gradient_errors(TOY, [TRL], CPU, say=said.append)
    assert said == ["TRL: no gradient (a_package_that_is_not_there is not installed)"]


def test_figures_are_not_taken_beside_what_is_still_held():
    class Held(Card):
        now = 1.0

        def held_gib(self):
            return self.now

    with Held(CPU) as card:
        card.now = 1.2
        card.check_empty()
        card.now = 3.5
        with pytest.raises(RunError, match=r"2\.50 GiB of the GPU are still held by what ran before"):
            attempt_here(TOY, OURS, card, Rate(1e12))


@pytest.mark.gpu
def test_a_card_says_what_is_left_of_it():
    card = Card(torch.device("cuda"), 2_000_000_000)
    with card:
        held = torch.zeros(500_000_000, dtype=torch.uint8, device="cuda")
        free, total = card.memory_info()
        assert total == 2_000_000_000 and free == total - torch.cuda.memory_reserved() <= 1_500_000_000
        del held


def test_trl_itself_gives_the_same_gradients():
    pytest.importorskip("trl")
    for case in (TOY, replace(TOY, rank=0)):
        errors = gradient_errors(case, [TRL], CPU)
        assert 0 <= errors["TRL"] < 2e-6
