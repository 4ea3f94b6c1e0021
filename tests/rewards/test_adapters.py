"""Adapters: functions written for other trainers give here what they give there, also through our own caller."""

import asyncio
import json

import pytest

from rewards.adapters import from_openrlhf, from_reasoning_gym, from_verifiers, from_verl
from rewards.check import check
from rewards.score import Score


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return (
        float(solution_str.strip() == ground_truth) + 0.5 * (data_source == "gsm8k") + (extra_info or {}).get("plus", 0)
    )


def test_verl():
    reward = from_verl(compute_score)
    assert reward.__name__ == "compute_score"
    assert reward(completion="72", data_source="gsm8k", reward_model={"ground_truth": "72"}, ground_truth="1") == 1.5
    assert reward(completion="72", ground_truth="72", answer="1") == 1.0
    assert reward(completion="72", answer="72", extra_info={"plus": 4}) == 5.0
    with pytest.raises(ValueError, match="no reward_model"):
        reward(completion="72")
    assert from_verl(lambda solution_str, ground_truth: 0.25)(completion="", answer=0) == 0.25


def test_verl_dict_and_async():
    async def scored(solution_str, ground_truth, **kwargs):
        return {"score": 0.5, "acc": True, "pred": "7", "why": ["a"]}

    reward = from_verl(scored)
    assert asyncio.run(reward(completion="7", answer="8")) == Score(0.5, acc=True, pred="7", why="['a']")


def test_verl_rows_pass_the_check():
    rows = [{"prompt": f"{n}?", "reward_model": {"ground_truth": str(n)}, "truth": str(n)} for n in (72, 31)]
    report = check(from_verl(lambda solution_str, ground_truth: float(solution_str.strip() == ground_truth)), rows,
                   gold="truth", presentations={"alone": "{answer}"}, skip=["written as 72.", "written as 1,234.00"])  # fmt: skip
    assert report.ok, str(report)


class Tensor:
    def __init__(self, values):
        self.values = values

    def tolist(self):
        return self.values


def test_openrlhf():
    seen, logged = [], {}

    def reward_func(queries, prompts, labels, **kwargs):
        seen.append((queries, prompts, labels))
        return {"rewards": Tensor([1.0, 0.0]), "scores": Tensor([1.0, 0.5]), "extra_logs": {"length": Tensor([3, 5])}}

    reward = from_openrlhf(reward_func)
    chat = [{"role": "user", "content": "q"}]
    given = {"prompts": ["p", chat], "completions": ["a", [{"role": "assistant", "content": "b"}]]}
    assert reward(**given, label=["x", "y"], answer=["1", "2"], log_metric=logged.__setitem__) == [1.0, 0.0]
    assert seen == [(["pa", "qb"], ["p", "q"], ["x", "y"])]
    assert logged == {"scores": 0.75, "length": 4.0}
    reward(**given, answer=["1", "2"])
    assert seen[1][2] == ["1", "2"]
    assert from_openrlhf(lambda queries, prompts, labels: Tensor([2.0, 3.0]))(**given) == [2.0, 3.0]


def test_verifiers():
    def rubric(completion, answer, state, info, task, parser):
        assert state["completion"] is completion and state["answer"] == answer
        return float(parser(completion[-1]["content"]) == answer) + info["bonus"] + (task == "t")

    reward = from_verifiers(rubric, parser=str.strip)
    given = {"prompt": "q", "completion": " 7 ", "answer": "7", "task": "t"}
    assert reward(**given, info=json.dumps({"bonus": 2})) == reward(**given, info={"bonus": 2}) == 4.0
    assert from_verifiers(lambda completion: float(completion == "x"), chat=False)(prompt="q", completion="x") == 1.0

    async def later(completion, **kwargs):
        return 0.5 if set(kwargs) == {"prompt", "answer", "task", "info", "state"} else 0.0

    assert asyncio.run(from_verifiers(later)(**given)) == 0.5


def test_reasoning_gym():
    entries = []

    class Dataset:
        def score_answer(self, answer, entry):
            entries.append(entry)
            return 0.01 if answer is None else float(answer == entry["answer"])

    reward = from_reasoning_gym(Dataset())
    row = {"prompt": [{"role": "user", "content": "2+2"}], "answer": "4", "metadata": {"x": 1}}
    assert reward(completion="<think>5</think> 4 ", **row) == 1.0
    assert reward(completion="<answer>4</answer> so 5", **row) == 1.0
    assert reward(completion="<think>4", **row) == 0.01
    assert entries[0] == {"question": "2+2", "answer": "4", "metadata": {"x": 1}}
    assert from_reasoning_gym(Dataset(), extract=lambda text: text[-1])(completion="is 4", **row) == 1.0


def tiny_classifier(pad=0):
    import torch
    import transformers

    from tests.tiny import tokenizer

    text = tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(text), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, num_labels=2, pad_token_id=pad, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config), text


def test_reward_model(tmp_path):
    import torch

    from rewards.reward_model import reward_model

    model, text = tiny_classifier()
    template, text.chat_template = text.chat_template, None
    prompts, completions = ["add 1", "sort 31 2", "a"], ["2", "2 31 and more of it", "b"]
    with torch.no_grad():
        expected = [
            model.eval()(torch.tensor([text(p + c)["input_ids"]])).logits[0, 0].item()
            for p, c in zip(prompts, completions, strict=True)
        ]
    assert len({round(value, 3) for value in expected}) == 3
    assert reward_model(model, text)(prompts, completions) == pytest.approx(expected, abs=1e-5)
    assert reward_model(model, text, batch_size=2)(prompts, completions) == pytest.approx(expected, abs=1e-5)
    reversed_ = reward_model(model, text, template=lambda prompt, completion: completion + prompt)
    assert reversed_(prompts, completions) != pytest.approx(expected, abs=1e-3)
    text.chat_template = template
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = text.apply_chat_template(messages, tokenize=True, return_dict=False)
    with torch.no_grad():
        chat = model(torch.tensor([ids])).logits[0, 0].item()
    assert reward_model(model, text)([messages[:1]], [messages[1:]]) == pytest.approx([chat], abs=1e-5)
    assert reward_model(model, text)(["a"], ["b"]) == pytest.approx([chat], abs=1e-5)
    text.chat_template = None
    model.save_pretrained(tmp_path)
    text.save_pretrained(tmp_path)
    loaded = reward_model(str(tmp_path), name="helpful", device="cpu")
    assert loaded(prompts, completions) == pytest.approx(expected, abs=1e-5) and loaded.__name__ == "helpful"
    with pytest.raises(ValueError, match="tokens .want at most 64"):
        loaded(["a" * 200], ["b"])


def test_reward_model_without_a_padding_token():
    from rewards.reward_model import reward_model

    model, text = tiny_classifier(pad=None)
    pairs = (["add 1", "sort 31 2"], ["2", "2 31 and more"])
    together = reward_model(model, text)(*pairs)
    alone = [reward_model(model, text)([p], [c])[0] for p, c in zip(*pairs, strict=True)]
    assert together == alone
    with pytest.raises(TypeError, match="no option 'size'"):
        reward_model(model, text, size=3)
    with pytest.raises(TypeError, match="tokenizer is None"):
        reward_model(model)
