"""Which engine is built for which configuration, in which order, with which options: vLLM replaced by a recorder."""

import dataclasses
from pathlib import Path

import pytest
import torch

from grpo.batch import Prompt
from grpo.config import GRPOConfig
from grpo.demo import make_tokenizer
from grpo.errors import InputError
from grpo.model.policy import Policy
from grpo.rollout import vllm_engine, vllm_start
from grpo.rollout.hf_engine import HFEngine
from grpo.rollout.vllm_weights import share_base
from grpo.sizes import format_bytes
from grpo.trainer import engines
from grpo.trainer.build import build_policy
from tests.rollout.test_vllm_weights import EngineModel
from tests.tiny import tiny_model

GIB = 2**30


class Recorder:
    """Stands for VLLMEngine: loads what it is told to, in the engine's layout, and remembers."""

    def __init__(self, options, tokenizer, *, probe, say):
        from transformers import AutoModelForCausalLM

        self.options, self.probe = options, probe
        self.source_existed = Path(options.source).is_dir()
        loaded = AutoModelForCausalLM.from_pretrained(options.source, dtype=getattr(torch, options.dtype))
        self.model = EngineModel(loaded)
        self.shared = None

    def share_base(self, model, device):
        self.shared = share_base(model, self.model, device)
        return self.shared


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(vllm_engine, "VLLMEngine", Recorder)
    monkeypatch.setattr(vllm_start, "check_vllm", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * GIB, 80 * GIB))


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def made(folder, model=None, name="model", **changes):
    values = dict(
        output_dir=str(folder / "run"), engine="vllm", adapter={"r": 5, "target_modules": ["q_proj", "down_proj"]},
        max_prompt_length=100, max_completion_length=60, kv_cache=0.25, max_sequences=7,
        model={"name_or_path": str(folder / name) if model is None else "", "dtype": "float32"},
    )  # fmt: skip
    values.update(changes)
    config, lines = GRPOConfig(**values), []
    prompts = [Prompt(row, [row + 5, 6, 7], {}) for row in range(9)]
    engine, policy = engines.make_engine(
        config, model, None, make_tokenizer(), prompts, lines.append, lambda m: build_policy(config, m, None)
    )
    return engine, policy, lines


def test_hf_samples_with_the_policy_itself(folder):
    engine, policy, _ = made(folder, engine="hf")
    assert isinstance(engine, HFEngine)
    assert engine.policy is policy


def test_a_lora_policy_is_made_of_the_engines_weights(folder, recorder):
    engine, policy, lines = made(folder)
    o = engine.options
    assert (o.adapter_rank, o.adapter_targets, o.share_weights) == (5, ("down_proj", "q_proj"), True)
    assert (o.max_length, o.max_sequences, o.kv_cache_bytes, o.dtype) == (160, 7, 20 * GIB, "float32")
    assert isinstance(policy, Policy)
    theirs = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    frozen = [p for p in policy.module.parameters() if not p.requires_grad]
    assert frozen and all(p.untyped_storage().data_ptr() in theirs for p in frozen)
    assert engine.shared.own == ()
    assert "shared with the engine" in lines[-1]
    assert [ids[0] for ids in engine.probe.sequences] == [5, 6, 7, 8, 9, 10, 11, 12]


def test_nothing_is_shared_when_all_weights_are_trained_or_it_is_not_wanted(folder, recorder):
    engine, _, lines = made(folder, adapter=None)
    assert (engine.options.adapter_rank, engine.options.share_weights, engine.shared) == (None, False, None)
    size = format_bytes(sum(p.nbytes for p in tiny_model().parameters()))
    assert lines[-1] == (
        f"rollout: the engine has its own copy of the base weights, {size} on the GPU while it is awake "
        "(all weights are trained)"
    )
    engine, _, lines = made(folder, share_weights=False)
    assert (engine.options.adapter_rank, engine.options.share_weights) == (5, False)
    assert "rollout.share_weights is false" in lines[-1]


def test_a_model_object_is_written_for_the_engine_and_keeps_its_own_dtype(folder, recorder):
    model = tiny_model(seed=3).double().float()
    engine, policy, _ = made(folder, model=model, adapter=None)
    assert engine.source_existed and not Path(engine.options.source).exists()
    assert engine.options.dtype == "float32"
    assert policy.module is model
    wanted = EngineModel(model)
    for (name, found), (_, value) in zip(engine.model.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(found, value), name


def test_the_engine_gets_the_merged_weights_of_an_adapters_folder(folder, recorder):
    from grpo.model.adapter import adapter_modules, base_of

    warm = build_policy(GRPOConfig(model={"name_or_path": str(folder / "model"), "dtype": "float32"}, adapter={"r": 2}),
                        None, None)  # fmt: skip
    with torch.no_grad():
        for parts in adapter_modules(base_of(warm.module)).values():
            parts.b.normal_()
    warm.module.save_pretrained(folder / "warm")
    make_tokenizer().save_pretrained(folder / "warm")
    engine, _, _ = made(folder, name="warm")
    assert engine.shared.own == ()
    plain = EngineModel(tiny_model())
    moved = [
        name
        for (name, found), (_, value) in zip(engine.model.named_parameters(), plain.named_parameters(), strict=True)
        if not torch.equal(found, value)
    ]
    assert moved
    assert not Path(engine.options.source).exists()


def test_wanting_what_cannot_be_shared_is_refused(folder, recorder, monkeypatch):
    def differing(self, model, device):
        next(self.model.parameters()).data[0] += 1
        return share_base(model, self.model, device)

    monkeypatch.setattr(Recorder, "share_base", differing)
    with pytest.raises(InputError, match=r"rollout\.share_weights is true \(want auto: model\.embed_tokens\.weight"):
        made(folder, share_weights=True)
    _, _, lines = made(folder)
    assert "held twice (model.embed_tokens.weight" in lines[-1]


def test_sizes_of_the_cache(folder, recorder):
    assert made(folder, kv_cache="3GiB")[0].options.kv_cache_bytes == 3 * GIB
    automatic = made(folder, kv_cache="auto")[0].options.kv_cache_bytes
    # 2 layers · 2 (K and V) · 2 heads · 8 wide · 4 bytes, 7 sequences of 160 tokens, and 5 %
    room = made(folder, kv_cache="auto")[0].options.kv_cache_room
    assert 0.9 * (0.95 * 60 * GIB - 1.4 * GIB) < room < 0.95 * 60 * GIB  # a tiny model, and the allowance for graphs
    assert automatic == pytest.approx(1.05 * 7 * 160 * 2 * 2 * 2 * 8 * 4, rel=0.01)


def test_options_know_every_knob_that_vllm_has():
    names = {field.name for field in dataclasses.fields(vllm_start.VLLMOptions)}
    assert {"source", "dtype", "cuda_graphs", "load_in_4bit", "revision", "trust_remote_code"} <= names
