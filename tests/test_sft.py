"""The supervised stage: what it learns from, and its loss against full logits."""

import pytest
import torch

from grpo import InputError, SFTConfig, SFTTrainer
from grpo.packing import Document
from tests.model.test_policy import slow_logprobs
from tests.tiny import tiny_model, tokenizer

ROWS = [
    {"prompt": "sort 31", "completion": "13"},
    {"prompt": [{"role": "user", "content": "sort 402"}], "completion": [{"role": "assistant", "content": "024"}]},
    {"prompt": [{"role": "user", "content": "sort 9"}], "completion": "9"},
    {"prompt": "sort 88123", "completion": "12388"},
]


def make(tmp_path, rows=ROWS, **changes):
    text = tokenizer()
    values = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "examples_per_step": 4, "learning_rate": 1e-2}
    return SFTTrainer(tiny_model(vocab_size=len(text)), SFTConfig(**{**values, **changes}), rows, processing_class=text)


def test_examples_end_with_one_eos_and_prompts_are_the_templates(tmp_path):
    text = tokenizer()
    examples = make(tmp_path).data.prompts
    shown = [(text.decode(e.token_ids), text.decode(e.example["completion_ids"])) for e in examples]
    assert shown == [
        ("sort 31", "13<|end|>"),
        ("<|user|>sort 402<|end|><|assistant|>", "024<|end|>"),
        ("<|user|>sort 9<|end|><|assistant|>", "9<|end|>"),
        ("sort 88123", "12388<|end|>"),
    ]


@pytest.mark.parametrize("capacity", [1, 20, 1000])
def test_loss_and_gradient_against_full_logits_for_any_packing(tmp_path, capacity):
    trainer = make(tmp_path, max_tokens_per_batch=capacity, max_grad_norm=1e9)
    model = tiny_model(vocab_size=len(tokenizer())).double()
    documents = [Document(e.id, e.token_ids, e.example["completion_ids"]) for e in trainer.data.prompts]
    logprobs = torch.cat([slow_logprobs(model, document) for document in documents])
    loss = -logprobs.mean()
    loss.backward()
    caught = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: caught.update({n: p.grad.clone() for n, p in trainer.policy.trainable().items()})
    )
    row = next(trainer.steps())
    assert row["loss"] == pytest.approx(float(loss), rel=1e-5)
    for name, parameter in model.named_parameters():
        error = (caught[name].double() - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, name


def test_held_out_loss_is_the_same_number(tmp_path):
    text = tokenizer()
    trainer = SFTTrainer(
        tiny_model(vocab_size=len(text)),
        SFTConfig(output_dir=str(tmp_path / "run"), max_tokens_per_batch=20),
        ROWS[:1],
        ROWS,
        processing_class=text,
    )
    model = tiny_model(vocab_size=len(text)).double().eval()
    with torch.no_grad():
        wanted = -torch.cat(
            [slow_logprobs(model, Document(0, e.token_ids, e.example["completion_ids"])) for e in trainer.eval_examples]
        ).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(wanted), rel=1e-5)


BAD = [
    ([{"prompt": "a"}], "no column 'completion'"),
    ([{"prompt": "a", "completion": None}], "row 1: completion is null"),
    ([{"prompt": "", "completion": "b"}], "row 1: prompt is empty"),
    ([ROWS[0], {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}], "row 2: completion is messages but the prompt is text"),
    ([{"messages": [{"role": "user", "content": "a"}]}], "row 1: messages does not end with an assistant message"),
    ([{"prompt": "a", "completion": "1" * 40}], "row 1: has 41 tokens (want at most max_completion_length = 30)"),
    ([{"prompt": "1" * 40, "completion": "1"}], "row 1: has 40 tokens (want at most data.max_prompt_length = 35)"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "problem"), BAD)
def test_bad_rows(tmp_path, rows, problem):
    with pytest.raises(InputError) as error:
        make(tmp_path, rows, max_completion_length=30, max_prompt_length=35)
    assert problem in str(error.value)


def test_a_conversation_column(tmp_path):
    text = tokenizer()
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ]
    }
    (example,) = make(tmp_path, [row]).data.prompts
    assert text.decode(example.token_ids) == "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    assert text.decode(example.example["completion_ids"]) == "d<|end|>"


def test_rows_beyond_the_context_are_named(tmp_path):
    with pytest.raises(InputError, match=r"row 1: has 302 tokens \(the model's context is 256\)"):
        make(tmp_path, [{"prompt": "1" * 150, "completion": "2" * 151}])
