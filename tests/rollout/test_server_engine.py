"""The HTTP engine against a fake `vllm serve`: every token, log-prob and fault recomputed or counted."""

import copy
import json
import math
import os
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from grpo.batch import Prompt
from grpo.config import AdapterConfig
from grpo.errors import InputError, RunError
from grpo.model.adapter import add_adapter
from grpo.model.policy import Policy
from grpo.rollout import server_engine
from grpo.rollout.engine import Sampling
from grpo.rollout.probe import WeightProbe
from grpo.rollout.server_client import UnreachableError
from grpo.rollout.server_engine import ServerEngine
from grpo.seeds import seed_for
from tests.rollout.fake_vllm_server import NUM_TOKENS, FakeServer, log_softmax, sample, toy_logits
from tests.tiny import tiny_model, tokenizer

STOPS = (1, 9)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(server_engine, "RETRY_S", 0.01)


@pytest.fixture
def fakes():
    """Makes fake servers, and stops them."""
    made = []

    def make(**arguments):
        made.append(FakeServer(**arguments))
        return made[-1]

    yield make
    for fake in made:
        fake.stop()


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


def tiny_policy(**changes):
    module = add_adapter(tiny_model("llama"), AdapterConfig(r=4, alpha=10, dtype="float32"))
    torch.manual_seed(3)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return Policy(module, **changes)


def engine_for(tmp_path, *servers, **arguments):
    lines = []
    values = {"timeout_s": 20.0, "say": lines.append} | arguments
    engine = ServerEngine([fake.url for fake in servers], "tiny", tmp_path / "adapters", tokenizer(), **values)
    for fake in servers:
        fake.requests.clear()
    return engine, lines


def ready(tmp_path, policy, *servers, **arguments):
    engine, lines = engine_for(tmp_path, *servers, **arguments)
    engine.load_weights(policy)
    for fake in servers:
        fake.requests.clear()
    return engine, lines


def sampling(**changes):
    values = dict(num_generations=4, max_completion_length=6, temperature=0.7, top_p=0.9, top_k=7, min_p=0.0)
    return Sampling(**{**values, "stop_token_ids": STOPS, "seed": 5, **changes})


def prompts(count=5):
    return [
        Prompt(row + 10, [(3 * row + place) % NUM_TOKENS for place in range(row + 2)], {}, 1) for row in range(count)
    ]


def expected(prompts, settings, version=0):
    """[P][G] of (ids, log-probs, reason), one sample after the other."""
    params = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k, "ignore_eos": True}
    params |= {"max_tokens": settings.max_completion_length, "stop_token_ids": settings.stop_token_ids}
    return [
        [
            sample(
                toy_logits, p.token_ids, params | {"seed": seed_for(settings.seed, p.epoch, p.id, g)}, f"{version:06d}"
            )
            for g in range(settings.num_generations)
        ]
        for p in prompts
    ]


def found(rollouts):
    return [[(c.token_ids, c.sampler_logprobs, c.finish_reason) for c in group] for group in rollouts.completions]


def no_thread_is_left():
    return [t.name for t in threading.enumerate() if t.name.startswith("rollout-server")] == []


# --- an honest run ---------------------------------------------------------------------------------------------------


def test_tokens_logprobs_reasons_and_texts_are_those_of_each_samples_own_seed(tmp_path, policy, fakes):
    servers = [fakes(), fakes()]
    engine, lines = ready(tmp_path, policy, *servers)
    rollouts = engine.generate(prompts(), sampling())
    want = expected(prompts(), sampling())
    assert found(rollouts) == want
    assert {reason for group in want for _, _, reason in group} == {"stop", "length"}  # both are met
    assert any(2 in ids[:-1] for group in want for ids, _, _ in group)  # the model's own EOS does not stop
    assert rollouts.policy_version == 0
    assert rollouts.prompts == prompts()
    coder = tokenizer()
    for group in rollouts.completions:
        assert [c.text for c in group] == [coder.decode(c.token_ids, skip_special_tokens=True) for c in group]
    seeds = [body["sampling_params"]["seed"] for server in servers for body in server.requests]
    assert len(set(seeds)) == len(seeds) == 20
    assert max(seeds) < 2**62
    assert lines == []


def test_generation_is_a_function_of_the_seed_alone(tmp_path, policy, fakes):
    engine, _ = ready(tmp_path, policy, fakes())
    first = found(engine.generate(prompts(), sampling()))
    assert found(engine.generate(prompts()[2:], sampling())) == first[2:]
    assert found(engine.generate(prompts(), sampling(seed=6))) != first


def test_greedy(tmp_path, policy, fakes):
    engine, _ = ready(tmp_path, policy, fakes())
    settings = sampling(temperature=0.0, top_k=0, top_p=1.0, num_generations=1)
    assert found(engine.generate(prompts(), settings)) == expected(prompts(), settings)


def test_scores_are_logprobs_at_temperature_one(tmp_path, policy, fakes):
    engine, _ = ready(tmp_path, policy, fakes())
    sequences = [[3, 4, 5, 6], [7, 8], [2]]
    want = [
        [log_softmax(toy_logits(ids[:place], "000000"))[ids[place]] for place in range(1, len(ids))]
        for ids in sequences
    ]
    assert engine.score(sequences) == want


def test_prompts_keep_their_order_and_requests_are_bounded_and_spread(tmp_path, policy, fakes, monkeypatch):
    monkeypatch.setattr(server_engine, "MAX_OUTSTANDING", 3)
    late = lambda body, index: ("sleep", 0.05 * (-len(body["token_ids"]) % 4))  # noqa: E731
    servers = [fakes(), fakes()]
    engine, _ = ready(tmp_path, policy, *servers)
    for server in servers:
        server.hook = late
    seen = []
    engine.progress = lambda done, total: seen.append((done, total))
    assert found(engine.generate(prompts(), sampling())) == expected(prompts(), sampling())
    assert seen == [(done, 20) for done in range(1, 21)]
    assert 1 < max(server.most_active for server in servers) <= 3
    assert min(len(server.requests) for server in servers) >= 2


# --- adapters --------------------------------------------------------------------------------------------------------


def test_each_sync_has_a_new_name_and_leaves_nothing_of_the_old(tmp_path, policy, fakes):
    servers = [fakes(), fakes()]
    engine, _ = engine_for(tmp_path, *servers)
    names = []
    for version in range(3):
        report = engine.load_weights(policy)
        (folder,) = (tmp_path / "adapters").iterdir()
        assert report.policy_version == engine.policy_version == version
        assert report.num_bytes == (folder / "adapter_model.safetensors").stat().st_size
        assert report.probe_gap is None
        assert [list(server.adapters.values()) for server in servers] == [[str(folder)]] * 2
        names.append(folder.name)
        assert found(engine.generate(prompts(2), sampling())) == expected(prompts(2), sampling(), version)
    assert len(set(names)) == 3
    for server in servers:
        paths = [path for path, _ in server.control if "unload" in path]
        assert len(paths) == 2
        assert not any("load_inplace" in body for _, body in server.control)
    engine.close()
    assert list((tmp_path / "adapters").iterdir()) == []
    assert [server.adapters for server in servers] == [{}, {}]
    engine.close()
    with pytest.raises(RuntimeError, match="close"):
        engine.generate(prompts(), sampling())


def test_two_runs_on_one_server_do_not_share_a_name(tmp_path, policy, fakes):
    server = fakes()
    ready(tmp_path / "a", policy, server)
    ready(tmp_path / "b", policy, server)
    assert len(server.adapters) == 2


def test_generate_before_load_weights_raises(tmp_path, fakes):
    engine, _ = engine_for(tmp_path, fakes())
    assert engine.policy_version == -1
    for call in (lambda: engine.generate(prompts(), sampling()), lambda: engine.score([[1, 2]])):
        with pytest.raises(RuntimeError, match="before load_weights"):
            call()


def test_a_refused_adapter_ends_the_sync_and_the_old_one_stays(tmp_path, policy, fakes):
    good, bad = fakes(), fakes()
    engine, _ = ready(tmp_path, policy, good, bad)
    before = dict(good.adapters)
    bad.refuse_adapters = "LoRA rank 64 is greater than max_lora_rank 16."
    with pytest.raises(RunError, match=rf"server {bad.url} refused adapter .*rank 64.*--max-lora-rank"):
        engine.load_weights(policy)
    assert engine.policy_version == 0
    assert good.adapters == before
    assert len(list((tmp_path / "adapters").iterdir())) == 1
    assert found(engine.generate(prompts(1), sampling())) == expected(prompts(1), sampling())


def test_an_adapter_that_is_there_already_came_with_a_lost_answer(tmp_path, policy, fakes, monkeypatch):
    server = fakes()
    engine, _ = engine_for(tmp_path, server)
    honest = server.load
    monkeypatch.setattr(server, "load", lambda body: (honest(body), honest(body))[1])
    engine.load_weights(policy)
    assert len(server.adapters) == 1
    assert found(engine.generate(prompts(1), sampling())) == expected(prompts(1), sampling())


def test_a_policy_without_an_adapter_is_refused(tmp_path, fakes):
    engine, _ = engine_for(tmp_path, fakes())
    with pytest.raises(InputError, match="without an adapter"):
        engine.load_weights(Policy(tiny_model("llama")))


def test_an_adapter_of_another_name_is_the_one_that_is_sent(tmp_path, fakes):
    module = tiny_policy().module
    module.add_adapter("second", module.peft_config["default"])
    module.set_adapter("second")
    server = fakes()
    engine, _ = engine_for(tmp_path, server)
    engine.load_weights(Policy(module))
    (folder,) = (tmp_path / "adapters").iterdir()
    assert list(server.adapters.values()) == [str(folder / "second")]
    assert not (folder / "adapter_config.json").exists()


def test_ctrl_c_in_a_sync_leaves_no_folder(tmp_path, policy, fakes, monkeypatch):
    server = fakes()
    engine, _ = ready(tmp_path, policy, server)
    before = dict(server.adapters)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_living", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.load_weights(policy)
    assert engine.policy_version == 0
    assert server.adapters == before
    assert [str(folder) for folder in (tmp_path / "adapters").iterdir()] == list(before.values())


def test_a_folder_that_cannot_be_written_is_said(tmp_path, policy, fakes):
    (tmp_path / "adapters").write_text("a file")
    engine, _ = engine_for(tmp_path, fakes())
    with pytest.raises(RunError, match="rollout.server_adapter_dir: cannot write"):
        engine.load_weights(policy)


# --- at the start ----------------------------------------------------------------------------------------------------


def test_servers_that_cannot_be_reached_are_named_at_the_start(tmp_path, fakes):
    up, down = fakes(), fakes()
    down.stop()
    with pytest.raises(InputError) as caught:
        engine_for(tmp_path, up, down, down)
    assert len(caught.value.lines) == 2
    assert all(f"{down.url} does not answer /health" in line and "vllm serve" in line for line in caught.value.lines)


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ({"model": "other"}, r"serves other \(want tiny"),
        ({"raw": True}, "want --logprobs-mode processed_logprobs"),
        ({"runtime_lora": False}, "cannot load adapters while it runs.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    ],
)
def test_a_server_started_otherwise_is_refused_in_one_line(tmp_path, fakes, fault, line):
    with pytest.raises(InputError, match=line) as caught:
        engine_for(tmp_path, fakes(**fault))
    assert len(caught.value.lines) == 1


def test_another_version_is_said_and_a_served_name_is_taken(tmp_path, fakes):
    server = fakes(version="0.31.2", served_as="alias")
    _, lines = engine_for(tmp_path, server)
    assert lines == [f"warning: {server.url} is vLLM 0.31.2; 0.26.0 is the version tested"]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a:1", "http://"])
def test_what_is_no_url_is_refused(tmp_path, url):
    with pytest.raises(InputError, match="want http://host:port"):
        ServerEngine([url], "tiny", tmp_path, tokenizer())


def test_no_server_is_refused(tmp_path):
    with pytest.raises(InputError, match="rollout.servers is empty"):
        ServerEngine([], "tiny", tmp_path, tokenizer())


def test_sequences_that_do_not_fit_are_refused_before_a_request(tmp_path, policy, fakes):
    server = fakes(max_model_len=11)
    engine, _ = ready(tmp_path, policy, server)
    engine.generate(prompts(4), sampling())  # 5 + 6 tokens
    server.requests.clear()
    with pytest.raises(RunError, match="takes sequences of 11 tokens.*--max-model-len 12"):
        engine.generate(prompts(5), sampling())
    assert server.requests == []


def test_a_temperature_that_vllm_would_change_is_refused(tmp_path, policy, fakes):
    engine, _ = ready(tmp_path, policy, fakes())
    with pytest.raises(InputError, match="rollout.temperature is 0.005"):
        engine.generate(prompts(), sampling(temperature=0.005))


# --- faults ----------------------------------------------------------------------------------------------------------


def once(fault, at=2):
    return lambda body, index: fault if index == at else None


RETRIED = [
    ("status", 500, "CUDA error"),
    ("status", 503, "busy"),
    ("drop",),
    ("bytes", b'{"choices": ['),
    ("bytes", b"[]"),
]


@pytest.mark.parametrize("fault", RETRIED, ids=str)
def test_what_may_pass_is_asked_again_with_the_same_body(tmp_path, policy, fakes, fault):
    server = fakes()
    engine, lines = ready(tmp_path, policy, server)
    server.hook = once(fault)
    assert found(engine.generate(prompts(), sampling())) == expected(prompts(), sampling())
    count = Counter(json.dumps(body) for body in server.requests)
    assert sorted(count.values()) == [1] * 19 + [2]
    assert lines == []


def test_a_late_answer_is_asked_for_again_with_the_same_seed(tmp_path, policy, fakes):
    server = fakes()
    engine, _ = ready(tmp_path, policy, server, timeout_s=1.0)
    server.hook = once(("sleep", 6.0))
    started = time.perf_counter()
    assert found(engine.generate(prompts(), sampling())) == expected(prompts(), sampling())
    assert time.perf_counter() - started < 5.0  # nobody waited for the late one
    count = Counter(body["sampling_params"]["seed"] for body in server.requests)
    assert sorted(count.values()) == [1] * 19 + [2]


@pytest.mark.parametrize("fault", RETRIED[:2] + RETRIED[3:4], ids=str)
def test_what_never_passes_ends_in_one_line(tmp_path, policy, fakes, fault):
    server = fakes()
    engine, _ = ready(tmp_path, policy, server)
    server.hook = lambda body, index: fault if len(body["token_ids"]) == 3 else None
    with pytest.raises(RunError, match=rf"server {server.url} failed, attempt 3 of the same request") as caught:
        engine.generate(prompts(), sampling())
    assert "\n" not in str(caught.value)
    assert no_thread_is_left()


def test_a_refusal_names_server_and_reason_and_is_not_repeated(tmp_path, policy, fakes):
    server = fakes()
    engine, _ = ready(tmp_path, policy, server)
    server.hook = lambda body, index: ("status", 400, "top_p must be in (0, 1]. " + "x" * 5000)
    with pytest.raises(RunError, match=rf"server {server.url} refused a request: HTTP 400: .*top_p must be") as caught:
        engine.generate(prompts(1), sampling(num_generations=1))
    assert len(str(caught.value)) < 350
    assert len(server.requests) == 1


def edited(change):
    def edit(answer):
        change(answer["choices"][0])
        return answer

    return ("edit", edit)


def shorter(choice):
    choice["logprobs"]["content"].pop()


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (edited(shorter), r"\d+ tokens but \d+ log-probs"),
        (edited(lambda choice: choice.update(finish_reason="repetition")), "finish reason 'repetition'"),
        (edited(lambda choice: choice.update(finish_reason="stop", token_ids=[3])), "tokens but|after token 3"),
        (edited(lambda choice: choice["token_ids"].extend([3] * 20)), "tokens but"),
        (edited(lambda choice: choice.update(logprobs=None)), "tokens but 0 log-probs"),
        (edited(lambda choice: choice.pop("token_ids")), "answers in another form than vLLM"),
        (("edit", lambda answer: {**answer, "choices": []}), "answers in another form than vLLM"),
        (("edit", lambda answer: {**answer, "model": "tiny"}), "answered with tiny"),
    ],
)
def test_an_answer_against_the_protocol_ends_the_run_and_names_the_server(tmp_path, policy, fakes, fault, line):
    server = fakes()
    engine, _ = ready(tmp_path, policy, server)
    server.hook = once(fault, at=1)
    with pytest.raises(RunError, match=rf"server {server.url}.*({line})"):
        engine.generate(prompts(), sampling())
    assert no_thread_is_left()


def test_missing_logprobs_unfinished_and_empty_completions(tmp_path, policy, fakes):
    server = fakes()
    engine, _ = ready(tmp_path, policy, server)
    wanted = {}

    def hook(body, index):
        kind = wanted.get(body["sampling_params"]["seed"])
        changes = {
            "missing": lambda choice: choice["logprobs"]["content"][0].update(logprob=-9999.0),
            "null": lambda choice: choice.update(finish_reason=None),
            "empty": lambda choice: choice.update(finish_reason="abort", token_ids=[], logprobs={"content": None}),
        }
        return edited(changes[kind]) if kind else None

    for g, kind in enumerate(("missing", "null", "empty")):
        wanted[seed_for(5, 1, 10, g)] = kind
    server.hook = hook
    (want,) = expected(prompts(1), sampling())
    (group,) = found(engine.generate(prompts(1), sampling()))
    assert group[0][0] == want[0][0]
    assert math.isnan(group[0][1][0])
    assert group[0][1][1:] == want[0][1][1:]
    assert group[1] == (want[1][0], want[1][1], "error")
    assert group[2] == ([], [], "abort")
    assert group[3] == want[3]


def test_a_server_that_dies_is_said_once_and_the_tokens_are_the_same(tmp_path, policy, fakes):
    good, bad = fakes(), fakes()
    engine, lines = ready(tmp_path, policy, good, bad)
    bad.hook = once(("die",), at=3)
    assert found(engine.generate(prompts(), sampling())) == expected(prompts(), sampling())
    assert len(lines) == 1
    assert lines[0].startswith(f"server {bad.url} is dead (")
    assert len(good.requests) >= 17
    good.requests.clear()
    assert found(engine.generate(prompts(), sampling())) == expected(prompts(), sampling())
    assert len(good.requests) == 20  # the dead one is not asked
    assert len(lines) == 1


def test_a_server_that_comes_back_gets_the_adapter_and_requests(tmp_path, policy, fakes):
    good, bad = fakes(), fakes()
    engine, lines = ready(tmp_path, policy, good, bad)
    bad.hook = once(("die",), at=0)
    engine.generate(prompts(), sampling())
    again = fakes(port=bad.port)
    assert found(engine.generate(prompts(), sampling())) == expected(prompts(), sampling())
    assert lines[1:] == [f"server {bad.url} is back"]
    assert list(again.adapters) == list(good.adapters)
    assert len(again.requests) > 5
    engine.load_weights(policy)
    assert list(again.adapters) == list(good.adapters)


def test_a_server_that_comes_back_with_another_model_ends_the_run(tmp_path, policy, fakes):
    good, bad = fakes(), fakes()
    engine, _ = ready(tmp_path, policy, good, bad)
    bad.stop()
    engine.generate(prompts(), sampling())
    fakes(port=bad.port, model="other")
    with pytest.raises(RunError, match="serves other"):
        engine.generate(prompts(), sampling())


def test_a_server_that_goes_away_while_it_is_asked_again_stays_dead(tmp_path, policy, fakes, monkeypatch):
    good, bad = fakes(), fakes()
    engine, lines = ready(tmp_path, policy, good, bad)
    bad.stop()
    engine.generate(prompts(), sampling())
    again = fakes(port=bad.port)

    def gone(server, model_name, say):
        raise UnreachableError("reset")

    monkeypatch.setattr(server_engine, "check_server", gone)
    assert found(engine.generate(prompts(), sampling())) == expected(prompts(), sampling())
    assert again.requests == []
    assert len(lines) == 1


def test_a_server_that_dies_before_a_sync_does_not_end_it(tmp_path, policy, fakes):
    good, bad = fakes(), fakes()
    engine, lines = ready(tmp_path, policy, good, bad)
    bad.stop()
    assert engine.load_weights(policy).policy_version == 1
    assert len(lines) == 1
    assert found(engine.generate(prompts(), sampling())) == expected(prompts(), sampling(), version=1)


@pytest.mark.parametrize("when", ["sync", "generate", "during"])
def test_when_all_are_dead_one_line_says_so(tmp_path, policy, fakes, when):
    servers = [fakes(), fakes()]
    engine, _ = ready(tmp_path, policy, *servers)
    for server in servers:
        if when == "during":
            server.hook = once(("die",))
        else:
            server.stop()
    with pytest.raises(RunError, match=rf"no rollout server is left \({servers[0].url}, {servers[1].url}\)"):
        engine.load_weights(policy) if when == "sync" else engine.generate(prompts(), sampling())
    assert no_thread_is_left()
    engine.close()
    assert list((tmp_path / "adapters").iterdir()) == []


def test_a_lost_adapter_is_loaded_again_once(tmp_path, policy, fakes):
    server = fakes()
    engine, lines = ready(tmp_path, policy, server)
    (name,) = server.adapters
    server.adapters.clear()  # a restart between two calls: same port, same model, no adapter
    server.control.clear()
    assert found(engine.generate(prompts(), sampling())) == expected(prompts(), sampling())
    assert [body["lora_name"] for _, body in server.control] == [name]
    assert lines == [f"server {server.url} had lost the adapter (restarted?): loaded again"]


def test_a_lost_adapter_whose_folder_is_gone_ends_the_run(tmp_path, policy, fakes):
    server = fakes()
    engine, _ = ready(tmp_path, policy, server)
    server.adapters.clear()
    shutil.rmtree(tmp_path / "adapters")
    with pytest.raises(RunError, match="refused adapter .*no adapter at"):
        engine.generate(prompts(), sampling())


def test_ctrl_c_breaks_the_calls_off_and_leaves_no_thread(tmp_path, policy, fakes):
    server = fakes()
    engine, _ = ready(tmp_path, policy, server)
    server.hook = lambda body, index: ("sleep", 6.0)
    timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts(), sampling())
    assert time.perf_counter() - started < 5.0  # nobody waited for the answers
    assert no_thread_is_left()
    timer.join()
    server.hook = None
    assert found(engine.generate(prompts(), sampling())) == expected(prompts(), sampling())
    engine.close()


# --- a real model behind the fake ------------------------------------------------------------------------------------


def served_llama(alpha_over_r=2.5, base=None):
    """Logits of the tiny base with W + s·B·A, read from the adapter's file the first time a path is met."""
    from safetensors.torch import load_file

    base, loaded, lock = base or tiny_model("llama").eval(), {}, threading.Lock()

    def load(path):
        tensors = load_file(Path(path) / "adapter_model.safetensors")
        model = copy.deepcopy(base)
        names = [name for name in tensors if "lora_A" in name]
        for name in names:
            where = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            update = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
            model.get_submodule(where).weight.data += alpha_over_r * update
        assert len(names) == 14
        return model

    @torch.no_grad()
    def logits(token_ids, path):
        with lock:
            if path and path not in loaded:
                loaded[path] = load(path)
        model = loaded[path] if path else base
        return model(input_ids=torch.tensor([token_ids])).logits[0, -1].tolist()

    return logits, loaded


def plain_logprobs(policy, prompt, ids, temperature):
    with torch.no_grad(), policy.evaluating():
        logits = policy.causal_lm(input_ids=torch.tensor([prompt + ids])).logits[0].float() / temperature
    start = len(prompt) - 1
    return logits.log_softmax(-1)[start : start + len(ids)].gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def move(policy):
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def test_sampler_logprobs_are_the_policys_after_each_sync_and_the_probe_sees_it(tmp_path, fakes):
    policy = tiny_policy()
    logits, _ = served_llama()
    probe = WeightProbe([prompt.token_ids for prompt in prompts()])
    engine, lines = engine_for(tmp_path, fakes(logits=logits), probe=probe)
    settings = sampling(temperature=0.8, top_k=0, top_p=1.0, num_generations=2, max_completion_length=6)
    for version in range(2):
        report = engine.load_weights(policy)
        assert report.probe_gap < 1e-5
        rollouts = engine.generate(prompts(2), settings)
        assert rollouts.policy_version == version
        for prompt, group in zip(rollouts.prompts, rollouts.completions, strict=True):
            for completion in group:
                want = plain_logprobs(policy, prompt.token_ids, completion.token_ids, 0.8)
                assert completion.sampler_logprobs == pytest.approx(want, abs=1e-4)
        move(policy)
    assert lines == []


def test_a_server_with_stale_weights_is_caught(tmp_path, fakes):
    policy = tiny_policy()
    logits, loaded = served_llama()
    probe = WeightProbe([prompt.token_ids for prompt in prompts()])
    stale = None
    engine, _ = engine_for(tmp_path, fakes(logits=lambda ids, path: logits(ids, stale or path)), probe=probe)
    engine.load_weights(policy)
    (stale,) = loaded
    move(policy)
    with pytest.raises(RunError, match="stale or corrupt weights"):
        engine.load_weights(policy)


def test_a_server_that_scales_the_adapter_wrongly_is_caught_at_the_first_sync(tmp_path, fakes):
    logits, _ = served_llama(alpha_over_r=25.0)
    probe = WeightProbe([prompt.token_ids for prompt in prompts()])
    engine, _ = engine_for(tmp_path, fakes(logits=logits), probe=probe)
    with pytest.raises(RunError, match="stale or corrupt weights"):
        engine.load_weights(tiny_policy())
