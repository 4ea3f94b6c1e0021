"""Out of GPU memory in an update: the same step in smaller bins, or the knob to turn."""

import json

import pytest
import torch

from grpo.errors import RunError
from grpo.packing import pack_documents, smaller_bins
from tests.test_packing import some_documents
from tests.test_sft import make as make_sft
from tests.tolerances import SPLIT, relative_error
from tests.trainer.test_update import make_trainer

BIG = 10_000  # tokens of a bin: everything in one


def fail_at(trainer, calls):
    """Run out of memory at the given forward passes that learn, counted from 0."""
    count = [0]

    def hook(module, arguments):
        if module.training and torch.is_grad_enabled():
            count[0] += 1
            if count[0] - 1 in calls:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    trainer.policy.causal_lm.model.register_forward_pre_hook(hook)


def first_gradients(trainer):
    """Gradients of the first step as the optimizer sees them, and its row."""
    caught = {}

    def keep(*_):
        caught.update({n: p.grad.clone() for n, p in trainer.policy.trainable().items() if p.grad is not None})

    handle = trainer.optimizer.register_step_pre_hook(keep)
    row = next(trainer.steps())
    handle.remove()
    return caught, row


def assert_same_step(plain, failing, calls):
    wanted, row = first_gradients(plain)
    fail_at(failing, calls)
    found, other = first_gradients(failing)
    assert failing.tokens_per_bin < plain.tokens_per_bin == BIG
    assert found.keys() == wanted.keys() != set()
    for name, value in wanted.items():
        assert relative_error(found[name], value) < SPLIT["float32"] * 10, name
    assert other["loss"] == pytest.approx(row["loss"], abs=1e-6)
    assert other["learning_rate"] == row["learning_rate"]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("calls", [{0}, {0, 1}, {0, 2}], ids=str)
def test_the_step_is_done_again_and_is_the_same(tmp_path, capsys, calls, beta, share):
    options = {"beta": beta, "share_prompts": share, "max_tokens_per_batch": BIG, "zero_variance": "keep"}
    assert_same_step(make_trainer(tmp_path / "a", **options), make_trainer(tmp_path / "b", **options), calls)
    said = capsys.readouterr()
    assert (said.out + said.err).count("out of GPU memory in the update, done again") == len(calls)


def test_the_supervised_step_too(tmp_path):
    options = {"max_tokens_per_batch": BIG}
    assert_same_step(make_sft(tmp_path / "a", **options), make_sft(tmp_path / "b", **options), {0})


def test_the_smaller_size_is_part_of_the_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, max_tokens_per_batch=BIG)
    fail_at(trainer, {0})
    steps = trainer.steps()
    next(steps)
    trainer.stop_requested = True
    list(steps)
    again = make_trainer(tmp_path, max_tokens_per_batch=BIG)
    again.train(resume_from_checkpoint=True)
    assert again.tokens_per_bin == trainer.tokens_per_bin < BIG


def test_what_never_fits_is_saved_with_the_knob_after_three_halvings(tmp_path, capsys):
    trainer = make_trainer(tmp_path, max_tokens_per_batch=BIG)
    steps = trainer.steps()
    next(steps)
    fail_at(trainer, set(range(100)))
    with pytest.raises(RunError, match="out of GPU memory in phase update .lower update.max_tokens_per_batch"):
        next(steps)
    said = capsys.readouterr()
    assert 1 <= (said.out + said.err).count("done again") <= 3
    assert trainer.tokens_per_bin == BIG  # a step that was not done leaves nothing behind
    assert (tmp_path / "run" / "checkpoints" / "step_000001").is_dir()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1


def test_smaller_bins_hold_the_same_documents():
    documents = some_documents(seed=0)
    (bin_,) = pack_documents(documents, BIG)
    parts = smaller_bins([bin_], 60)
    assert len(parts) > 10
    assert all(sum(part.segments.lengths) <= 60 for part in parts)
    wanted = {int(d.row_id): d for d in documents}
    for part in parts:
        starts = part.cu_seqlens.tolist()
        for d, row in enumerate(part.row_ids.tolist()):
            document, rows = wanted.pop(row), slice(starts[d], starts[d + 1])
            tokens = [*document.prompt_ids, *document.completion_ids]
            assert part.input_ids[rows].tolist() == tokens[:-1]
            assert part.targets[rows].tolist() == tokens[1:]
            assert part.positions[rows].tolist() == list(range(len(tokens) - 1))
            low, high = part.completion_cu_seqlens[d : d + 2].tolist()
            scored = part.scored_index[low:high]
            assert part.targets[scored].tolist() == list(document.completion_ids)
            assert torch.equal(part.advantages[scored], torch.full((len(scored),), document.advantage))
            assert part.sampler_logprobs[scored].tolist() == pytest.approx(list(document.sampler_logprobs))
    assert not wanted
    assert all(a is b for a, b in zip(smaller_bins(parts, 60), parts, strict=True))
