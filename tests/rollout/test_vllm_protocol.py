"""The order of what the vLLM engine does, with vLLM replaced by a stand-in that keeps its rules: what sleeps must wake before
it is used, unfinished requests come back in the next call, one adapter id is one set of weights.

The real engine is judged on a GPU (test_vllm_engine.py).
"""

import math
import random
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from grpo.batch import Prompt
from grpo.config import AdapterConfig
from grpo.demo import make_tokenizer
from grpo.errors import InputError, RunError
from grpo.model.adapter import adapter_modules, add_adapter, base_of
from grpo.model.policy import Policy
from grpo.rollout import vllm_engine, vllm_start, vllm_weights
from grpo.rollout.engine import Sampling
from grpo.rollout.probe import WeightProbe, policy_scores
from grpo.rollout.vllm_engine import VLLMEngine
from grpo.rollout.vllm_start import VLLMOptions
from tests.rollout.test_vllm_weights import EngineModel, LoRAModel, PEFTHelper, Slots
from tests.tiny import tiny_model

STOP = 1
SIZES = {"weights": 300, "kv_cache": 7000}
SAMPLING = Sampling(3, 5, 1.0, 1.0, 0, 0.0, (STOP,), 7)
OPTIONS = VLLMOptions("folder", "float32", 64, 8, 2**30, adapter_rank=4)


class LLM:
    """`vllm.LLM` as far as the engine uses it. `events` tells what happened; `faults` what goes wrong next."""

    def __init__(self, **arguments):
        LLM.last = self
        self.arguments, self.events, self.faults = arguments, [], {}
        self.asleep, self.cached, self.served = set(), set(), []
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # the real one seeds the process twice
        module = tiny_model()
        self.policy = base_of(add_adapter(module, AdapterConfig(r=4)))
        manager = SimpleNamespace(
            _adapter_manager=Slots(self.policy, rank=4),
            lora_config=SimpleNamespace(lora_dtype=torch.float32),
            vocab_size=61,
        )
        runner = SimpleNamespace(model=EngineModel(tiny_model()), lora_manager=manager)
        self.worker = SimpleNamespace(model_runner=runner, device=torch.device("cpu"), _sleep_mode_backend=None)
        processor = SimpleNamespace(request_states={}, parent_requests={})
        core = SimpleNamespace(shutdown=lambda: self.events.append("shutdown"))
        self.llm_engine = SimpleNamespace(output_processor=processor, abort_request=self._abort, engine_core=core)

    def _abort(self, names, internal):
        assert internal
        self.events.append(f"abort {len(names)}")
        self.llm_engine.output_processor.request_states.clear()

    def collective_rpc(self, function):
        return [function(SimpleNamespace(worker=self.worker))]

    def sleep(self, level):
        assert not self.asleep, "half awake: the real one ignores this call"
        assert "sleep" not in self.faults, "Memory usage increased after sleeping."
        self.events.append(f"sleep {level}")
        self.asleep = {"kv_cache"} if self.worker._sleep_mode_backend else {"weights", "kv_cache"}
        self.cached.clear()

    def wake_up(self, tags):
        if "wake" in self.faults:
            raise RuntimeError("CUDA Error: out of memory")
        assert tags is None or set(tags) <= self.asleep, f"{tags} do not sleep"
        self.events.append(f"wake {'all' if tags is None else ' '.join(tags)}")
        self.asleep -= self.asleep if tags is None else set(tags)

    def reset_prefix_cache(self):
        self.cached.clear()
        return "held blocks" not in self.faults

    def generate(self, prompts, parameters, lora_request, use_tqdm):
        assert not self.asleep, "generation asleep waits for ever"
        assert not self.llm_engine.output_processor.request_states, "requests of an earlier call come back"
        random.random(), np.random.rand(), torch.rand(1)
        self.llm_engine.output_processor.request_states = {str(i): None for i in range(len(prompts))}
        if error := self.faults.pop("generate", None):
            raise error
        prompts = list(use_tqdm(prompts, desc="Rendering prompts") if use_tqdm else prompts)
        bar = use_tqdm(total=len(prompts), desc="") if use_tqdm else None
        self.served += [(lora_request, p) for p in parameters]
        outputs = []
        for prompt, wanted in zip(prompts, parameters, strict=True):
            outputs.append(self._answer(prompt["prompt_token_ids"], wanted, lora_request))
            if bar:
                bar.update(1)
        self.llm_engine.output_processor.request_states.clear()
        return outputs[: len(outputs) - self.faults.pop("lost", 0)]

    def _answer(self, ids, wanted, lora_request):
        key = (tuple(ids), None if lora_request is None else lora_request.lora_name)
        cached = len(ids) if key in self.cached or "stale cache" in self.faults else 0
        if wanted.prompt_logprobs is None:
            self.cached.add(key)
        draw = random.Random(f"{wanted.seed} {ids}")
        count = draw.randint(1, wanted.max_tokens)
        tokens = [draw.randint(5, 50) for _ in range(count)]
        reason = "length" if count == wanted.max_tokens else "stop"
        tokens[-1] = STOP if reason == "stop" else tokens[-1]
        flat = SimpleNamespace(start_indices=list(range(count)), logprobs=[-t / 50 for t in tokens])
        return SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=tokens, logprobs=flat, finish_reason=reason)],
            num_cached_tokens=cached,
            prompt_logprobs=None if wanted.prompt_logprobs is None else self._scores(ids),
        )

    def _scores(self, ids):
        """From the adapter that the slots hold, put into a policy of the stand-in's own."""
        slots = self.worker.model_runner.lora_manager._adapter_manager
        with torch.no_grad():
            for path, parts in adapter_modules(self.policy).items():
                lora = slots.registered[slots.lora_index_to_id[0]].loras[path]
                parts.a.copy_(lora["a"])
                parts.b.copy_(lora["b"] / parts.scale)
        scores = policy_scores(Policy(self.policy), [ids]).tolist()
        return [None, *({token: SimpleNamespace(logprob=s)} for token, s in zip(ids[1:], scores, strict=True))]


class SamplingParams(SimpleNamespace):
    def __init__(self, **values):
        super().__init__(**{"seed": None, "prompt_logprobs": None, **values})


class NoneLive(set):
    """Lets a test make as many engines as it likes."""

    def __bool__(self):
        return False


class TorchWithCUDA:
    """torch for the engine's file alone: a device with 60 of 80 GiB free."""

    def __init__(self):
        self.cuda = SimpleNamespace(
            is_available=lambda: True,
            synchronize=lambda: None,
            empty_cache=lambda: None,
            mem_get_info=lambda: (60 * 2**30, 80 * 2**30),
        )

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def vllm(monkeypatch):
    modules = {
        "vllm": SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams, __version__="0.26.0"),
        "vllm.lora": ModuleType("vllm.lora"),
        "vllm.lora.request": SimpleNamespace(
            LoRARequest=lambda name, number, path: SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path)
        ),
        "vllm.lora.lora_model": SimpleNamespace(LoRAModel=LoRAModel),
        "vllm.lora.peft_helper": SimpleNamespace(PEFTHelper=PEFTHelper),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for module in (vllm_engine, vllm_start):
        monkeypatch.setattr(module, "torch", TorchWithCUDA())
    monkeypatch.setattr(vllm_engine, "_LIVE", NoneLive())
    monkeypatch.setattr(vllm_engine, "kv_only_sleep", lambda: "KV alone")
    monkeypatch.setattr(vllm_engine, "unmapped_bytes", lambda: sum(SIZES[tag] for tag in LLM.last.asleep))
    return modules["vllm"]


def make(policy=None, lines=None, **changes):
    prompts = [[row + 5, *range(6, 26)] for row in range(3)]
    say = lines.append if lines is not None else None
    return VLLMEngine(
        VLLMOptions(**{**vars(OPTIONS), **changes}), make_tokenizer(), probe=WeightProbe(prompts, say), say=say
    )


@pytest.fixture
def policy():
    module = add_adapter(tiny_model(), AdapterConfig(r=4))
    with torch.no_grad():
        for parts in adapter_modules(base_of(module)).values():
            parts.b.normal_(std=0.1)
    return Policy(module)


def prompts(count=4):
    return [Prompt(row, [row + 9, 8, 7], {}) for row in range(count)]


def rollout(engine, policy, sampling=SAMPLING):
    with engine.awake():
        engine.load_weights(policy)
        return engine.generate(prompts(), sampling)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"share_weights": True}, ["sleep 1", "wake all", "sleep 1"]),
        ({}, ["sleep 1", "wake weights", "wake kv_cache", "sleep 1"]),
        ({"adapter_rank": None}, ["sleep 2", "wake weights", "wake kv_cache", "sleep 2"]),
    ],
)
def test_weights_wake_before_the_sync_and_the_cache_after_it(vllm, policy, changes, wanted):
    engine = make(**changes)
    if changes.get("adapter_rank", 4) is None:
        policy, engine.probe = Policy(tiny_model(seed=3)), None
    llm = engine._llm
    rollout(engine, policy)
    assert llm.events == wanted
    rollout(engine, policy)
    assert llm.events == wanted + wanted[1:]


def test_answers_are_in_order_with_a_seed_each_and_the_protocols_fields(vllm, policy):
    engine = make()
    found = rollout(engine, policy)
    assert found.policy_version == 0
    for prompt, group in zip(prompts(), found.completions, strict=True):
        for g, completion in enumerate(group):
            seed = SAMPLING.seed_of(prompt, g)
            want = engine._llm._answer(prompt.token_ids, SamplingParams(seed=seed, max_tokens=5), None).outputs[0]
            assert completion.token_ids == want.token_ids
            assert completion.sampler_logprobs == want.logprobs.logprobs
            assert completion.finish_reason == want.finish_reason
    asked = [p for _, p in engine._llm.served][-12:]
    assert len({p.seed for p in asked}) == 12 and all(p.seed < 2**62 for p in asked)
    fields = ("n", "logprobs", "flat_logprobs", "detokenize", "ignore_eos")
    assert {tuple(getattr(p, name) for name in fields) for p in asked} == {(1, 0, True, False, True)}
    assert all(p.stop_token_ids == [STOP] for p in asked)


def test_each_sync_has_a_new_name_and_number(vllm, policy):
    engine = make()
    for _ in range(3):
        rollout(engine, policy)
    requests = {(r.lora_name, r.lora_int_id, r.lora_path) for r, _ in engine._llm.served}
    assert len({name for name, *_ in requests}) == len({number for _, number, _ in requests}) == 3
    assert all(path.startswith("/nonexistent/") for *_, path in requests)
    assert engine.policy_version == 2


def test_the_gap_is_measured_and_stale_weights_end_the_run(vllm, policy):
    engine = make()
    with engine.awake():
        report = engine.load_weights(policy)
    assert report.probe_gap < 1e-5
    assert report.num_bytes > 0
    with torch.no_grad():
        for parts in adapter_modules(policy.causal_lm).values():
            parts.b.mul_(-9)
    engine._send = lambda policy: 0
    with pytest.raises(RunError, match="stale or corrupt weights"), engine.awake():
        engine.load_weights(policy)
    assert engine._llm.events[-1] == "sleep 1"


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("stale cache", "answers from a prefix cache of older weights"),
        ("held blocks", "did not empty its prefix cache"),
    ],
)
def test_a_cache_of_older_weights_ends_the_run(vllm, policy, fault, line):
    engine = make()
    engine._llm.faults[fault] = True
    with pytest.raises(RunError, match=line):
        rollout(engine, policy)


@pytest.mark.parametrize(
    ("fault", "kind", "line"),
    [
        (RuntimeError("engine core died"), RunError, "the rollout engine failed: engine core died"),
        (ValueError("prompt is too long"), RunError, "the rollout engine failed: prompt is too long"),
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError, "no memory"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_an_interrupted_generation_leaves_no_request_and_the_engine_goes_on(vllm, policy, fault, kind, line):
    engine = make()
    wanted = rollout(engine, policy)
    with engine.awake():
        engine.load_weights(policy)
        engine._llm.faults["generate"] = fault
        with pytest.raises(kind, match=line or None):
            engine.generate(prompts(), SAMPLING)
        assert "abort 12" in engine._llm.events
        again = engine.generate(prompts(), SAMPLING)
    assert again.completions == wanted.completions


def test_lost_answers_and_misuse_are_named(vllm, policy):
    engine = make()
    with pytest.raises(RuntimeError, match="before load_weights"):
        engine.generate(prompts(), SAMPLING)
    with pytest.raises(RunError, match=r"load_weights\(\) outside awake"):
        engine.load_weights(policy)
    with engine.awake():
        engine.load_weights(policy)
        engine._llm.faults["lost"] = 1
        with pytest.raises(RunError, match="11 answers to 12 requests"):
            engine.generate(prompts(), SAMPLING)
        with pytest.raises(RunError, match="may take 65 tokens, but the engine was built for 64"):
            engine.generate([Prompt(0, [7] * 60, {})], SAMPLING)


def test_a_failed_wake_up_is_one_line_and_the_next_one_may_succeed(vllm, policy):
    engine = make()
    engine._llm.faults["wake"] = True
    with pytest.raises(RunError, match=r"did not wake up \(weights; 60\.00 GiB of 80\.00 GiB free"):
        rollout(engine, policy)
    del engine._llm.faults["wake"]
    assert len(rollout(engine, policy).completions) == 4


def test_an_engine_that_cannot_go_to_sleep_is_one_line(vllm, policy):
    """vLLM asserts that the device has more memory than before, which another process can prevent."""
    engine = make()
    engine._llm.faults["sleep"] = True
    with pytest.raises(RunError, match=r"did not go to sleep \(60\.00 GiB of 80\.00 GiB free; did another process"):
        rollout(engine, policy)


def test_what_sleeps_is_mapped_before_it_is_freed(vllm, policy):
    engine = make(share_weights=True)
    rollout(engine, policy)
    events = engine._llm.events
    engine.close()
    assert events[-3:] == ["sleep 1", "wake all", "shutdown"]
    own = make()
    rollout(own, policy)
    events = own._llm.events
    own.close()
    assert events[-4:] == ["sleep 1", "wake weights", "wake kv_cache", "shutdown"]
    inside = make()
    with inside.awake():
        inside.load_weights(policy)  # the cache was mapped for the probe
        events = inside._llm.events
        inside.close()
        assert events[-2:] == ["wake kv_cache", "shutdown"]


def test_an_engine_that_only_synced_goes_back_to_sleep(vllm, policy):
    engine = make()
    engine.probe = None
    with engine.awake():
        engine.load_weights(policy)
    assert engine._llm.events == ["sleep 1", "wake weights", "wake kv_cache", "sleep 1"]
    shared = make(share_weights=True)
    shared.probe = None
    with shared.awake():
        shared.load_weights(policy)
    assert shared._llm.events == ["sleep 1"]


def test_the_generators_of_the_process_stand_where_they_stood(vllm, policy):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    wanted = random.random(), np.random.rand(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    rollout(make(), policy)
    assert (random.random(), np.random.rand(), torch.rand(1)) == wanted


def test_progress_and_phases(vllm, policy):
    engine, seen, phases = make(), [], []
    engine.progress = lambda done, total: seen.append((done, total))

    @contextmanager
    def phase(name):
        phases.append(name)
        yield

    engine.phase = phase
    rollout(engine, policy)
    assert seen == [(done, 12) for done in range(1, 13)]
    assert phases == ["wake", "sync", "probe", "wake", "sleep"]


def test_what_the_engine_is_started_with(vllm, monkeypatch):
    arguments = make(cuda_graphs=False, adapter_rank=9, adapter_targets=("q_proj",))._llm.arguments
    wanted = {
        "model": "folder", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 8, "kv_cache_memory_bytes": 2**30,
        "logprobs_mode": "processed_logprobs", "enable_sleep_mode": True, "enable_prefix_caching": True,
        "enforce_eager": True, "max_lora_rank": 16, "lora_target_modules": ["q_proj"], "generation_config": "vllm",
        "skip_tokenizer_init": True,
    }  # fmt: skip
    assert arguments.items() >= wanted.items()
    assert arguments["gpu_memory_utilization"] == math.floor(60 / 80 * 1000 - 5) / 1000
    made = []
    monkeypatch.setattr(vllm_start, "make_nf4_tables", lambda: made.append(True))
    four_bit = make(load_in_4bit=True)._llm.arguments
    assert made == [True]
    assert (four_bit["quantization"], "hf_overrides" in four_bit) == ("bitsandbytes", False)


def test_other_versions_and_machines_without_cuda_are_refused(vllm, monkeypatch):
    vllm.__version__ = "0.27.1"
    with pytest.raises(InputError, match=r"vllm is 0\.27\.1 \(want 0\.26\.0"):
        make()
    vllm.__version__ = "0.26.0+cu130"
    make()
    monkeypatch.setattr(vllm_start.torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="there is no CUDA device"):
        make()


def test_an_engine_that_does_not_start_says_what_would_fit(vllm, monkeypatch):
    def refuse(**arguments):
        raise ValueError("No available memory for the cache blocks.")

    monkeypatch.setattr(vllm, "LLM", refuse)
    with pytest.raises(
        InputError, match=r"KV cache of 1\.00 GiB \(60\.00 GiB of 80\.00 GiB free, about 0\.50 GiB of it"
    ):
        make(kv_cache_room=2**29)


def test_sharing_needs_an_engine_that_keeps_its_weights(vllm):
    with pytest.raises(RuntimeError, match="started without share_weights"):
        make().share_base(tiny_model(), torch.device("cpu"))
    engine = make(share_weights=True)
    assert engine._llm.worker._sleep_mode_backend == "KV alone"
    assert engine.share_base(tiny_model(), torch.device("cpu")).own == ()
    assert vllm_weights.engine_views(engine._model(), tiny_model().named_parameters())


@pytest.mark.parametrize(("share", "asleep"), [(True, 7000), (False, 7300)])
def test_what_sleeps_is_known_to_whoever_counts_memory(vllm, policy, share, asleep):
    engine = make(share_weights=share)
    assert engine.unmapped_bytes() == asleep
    with engine.awake():
        assert engine.unmapped_bytes() == 7000  # the weights are back, or never left
        engine.load_weights(policy)
        assert engine.unmapped_bytes() == 0
    assert engine.unmapped_bytes() == asleep


def test_a_process_holds_one_engine(vllm, monkeypatch):
    monkeypatch.setattr(vllm_engine, "_LIVE", set())
    first = make()
    with pytest.raises(InputError, match="this process has an engine already"):
        make()
    first.close()
    first.close()
    assert first._llm is None
    make()
