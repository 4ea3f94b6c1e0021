"""The decode loop against one sequence at a time, no cache, no padding, Python arithmetic."""

import math

import numpy as np
import pytest
import torch

from grpo.batch import Prompt
from grpo.model.policy import Policy
from grpo.rollout.engine import Sampling
from grpo.rollout.hf_engine import HFEngine, sample, truncate_logits
from grpo.seeds import seed_for, uniforms
from tests.tiny import FAMILIES, tiny_gpt2, tiny_model, tokenizer


def sampling(**changes):
    values = {
        "num_generations": 3,
        "max_completion_length": 12,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "stop_token_ids": (1,),
        "seed": 5,
    }
    return Sampling(**{**values, **changes})


def prompts(*lengths):
    return [
        Prompt(row, [(7 * row + 3 * place) % 50 + 5 for place in range(n)], {"prompt": "x"})
        for row, n in enumerate(lengths)
    ]


def engine_for(model, **arguments):
    engine = HFEngine(Policy(model), tokenizer(), **arguments)
    engine.load_weights(engine.policy)
    return engine


def slow_distribution(logits, settings):
    """Probabilities after temperature, top-k, top-p, min-p, by sorting Python lists."""
    scaled = [value / settings.temperature for value in logits]
    top = max(scaled)
    weights = [math.exp(value - top) for value in scaled]
    probabilities = [weight / sum(weights) for weight in weights]
    order = sorted(range(len(logits)), key=lambda v: -probabilities[v])
    kept = order[: settings.top_k] if settings.top_k else order
    total = sum(probabilities[v] for v in kept)
    nucleus, mass = [], 0.0
    for v in kept:
        if mass >= settings.top_p:
            break
        nucleus.append(v)
        mass += probabilities[v] / total
    best = max(probabilities[v] for v in nucleus)
    total = sum(probabilities[v] for v in nucleus)
    final = {v: probabilities[v] / total for v in nucleus if probabilities[v] >= settings.min_p * best}
    total = sum(final.values())
    return [final.get(v, 0.0) / total for v in range(len(logits))]


def slow_generate(model, prompt, generation, settings):
    seed = np.array([seed_for(settings.seed, prompt.epoch, prompt.id, generation)], dtype=np.uint64)
    tokens, logprobs = [], []
    while len(tokens) < settings.max_completion_length:
        with torch.no_grad():
            logits = model(torch.tensor([prompt.token_ids + tokens]), use_cache=False).logits[0, -1].double().tolist()
        if settings.temperature == 0:
            token = max(range(len(logits)), key=logits.__getitem__)
            probabilities = slow_distribution(logits, sampling())
        else:
            probabilities = slow_distribution(logits, settings)
            draw = float(uniforms(seed, np.array([len(tokens)], dtype=np.uint64))[0])
            running = 0.0
            for token, probability in enumerate(probabilities):
                running += probability
                if running > draw:
                    break
        tokens.append(token)
        logprobs.append(math.log(probabilities[token]))
        if token in settings.stop_token_ids:
            return tokens, logprobs, "stop"
    return tokens, logprobs, "length"


CASES = {
    "plain": {},
    "cool": {"temperature": 0.7},
    "hot": {"temperature": 1.7},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "many stops": {"stop_token_ids": tuple(range(1, 60, 4))},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_one_sequence_at_a_time(case):
    model = tiny_model().eval()
    settings = sampling(**CASES[case])
    batch = prompts(1, 9, 4)
    rollouts = engine_for(model).generate(batch, settings)
    for prompt, group in zip(batch, rollouts.completions, strict=True):
        for generation, completion in enumerate(group):
            tokens, logprobs, reason = slow_generate(model, prompt, generation, settings)
            assert completion.token_ids == tokens
            assert completion.finish_reason == reason
            assert completion.sampler_logprobs == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_left_padding_and_cache_in_every_family(family):
    model = (tiny_gpt2() if family == "gpt2" else tiny_model(family)).eval()
    batch = prompts(2, 11)
    settings = sampling(num_generations=2, max_completion_length=6)
    rollouts = engine_for(model).generate(batch, settings)
    for prompt, group in zip(batch, rollouts.completions, strict=True):
        for generation, completion in enumerate(group):
            tokens, logprobs, _ = slow_generate(model, prompt, generation, settings)
            assert completion.token_ids == tokens
            assert completion.sampler_logprobs == pytest.approx(logprobs, abs=2e-5)


def test_a_sample_does_not_depend_on_its_batch():
    engine = engine_for(tiny_model())
    settings = sampling(stop_token_ids=tuple(range(1, 60, 6)))
    batch = prompts(3, 8, 5, 1)
    together = engine.generate(batch, settings).completions
    backwards = engine.generate(batch[::-1], settings).completions[::-1]
    small = engine_for(tiny_model(), max_sequences=2).generate(batch, settings).completions
    for other in (backwards, small):
        assert [[c.token_ids for c in group] for group in other] == [[c.token_ids for c in group] for group in together]
    again = engine.generate(batch, settings).completions
    assert again == together  # a re-run is bitwise the same


@pytest.mark.parametrize("fits", [1, 2, 5])
def test_out_of_memory_means_fewer_at_a_time_and_the_same_tokens(fits):
    said = []
    model = tiny_model("qwen3")
    wanted = engine_for(model).generate(prompts(4, 7, 2), sampling())
    engine = engine_for(tiny_model("qwen3"), say=said.append)

    def limited(module, arguments, keywords):
        if keywords["input_ids"].shape[0] > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    engine.policy.backbone.register_forward_pre_hook(limited, with_kwargs=True)
    found = engine.generate(prompts(4, 7, 2), sampling())
    for mine, theirs in zip(found.completions, wanted.completions, strict=True):
        assert [c.token_ids for c in mine] == [c.token_ids for c in theirs]
    assert engine.max_sequences <= fits
    assert len(said) >= 1
    assert all("sequences at a time from now on" in line for line in said)


def test_a_single_sequence_that_does_not_fit_is_an_error():
    engine = engine_for(tiny_model("qwen3"))

    def never(module, arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine.policy.backbone.register_forward_pre_hook(never)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(prompts(4, 7), sampling())
    assert engine.max_sequences == 1


def test_generations_epochs_and_seeds_differ():
    engine = engine_for(tiny_model())
    (prompt,) = prompts(4)
    first = engine.generate([prompt], sampling()).completions[0]
    assert len({tuple(c.token_ids) for c in first}) == 3
    later = Prompt(prompt.id, prompt.token_ids, prompt.example, epoch=1)
    assert engine.generate([later], sampling()).completions[0][0].token_ids != first[0].token_ids
    assert engine.generate([prompt], sampling(seed=6)).completions[0][0].token_ids != first[0].token_ids


def test_the_process_generators_are_not_touched():
    engine = engine_for(tiny_model())
    before = torch.get_rng_state()
    engine.generate(prompts(3, 4), sampling())
    assert torch.equal(before, torch.get_rng_state())


def test_eos_as_the_last_allowed_token_is_a_stop():
    engine = engine_for(tiny_model())
    (prompt,) = prompts(4)
    free = engine.generate([prompt], sampling(stop_token_ids=(999,))).completions[0][0].token_ids
    place = next(place for place in range(3, 12) if free[place] not in free[:place])
    settings = sampling(stop_token_ids=(free[place],), max_completion_length=place + 1)
    completion = engine.generate([prompt], settings).completions[0][0]
    assert completion.token_ids == free[: place + 1]
    assert completion.finish_reason == "stop"
    shorter = sampling(stop_token_ids=(free[place],), max_completion_length=place)
    assert engine.generate([prompt], shorter).completions[0][0].finish_reason == "length"


def test_score_is_the_models_own_log_softmax():
    model = tiny_model().eval()
    engine = engine_for(model)
    sequences = [[5, 9, 2, 7], [8, 8]]
    for sequence, got in zip(sequences, engine.score(sequences), strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([sequence])).logits[0].double().log_softmax(-1)
        assert got == pytest.approx([float(logprobs[t, sequence[t + 1]]) for t in range(len(sequence) - 1)], abs=1e-5)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0, -40.0]]).repeat(40_000, 1)
    seeds = np.array([seed_for("draw", index) for index in range(len(logits))], dtype=np.uint64)
    draws = torch.from_numpy(uniforms(seeds, np.zeros(1, dtype=np.uint64)))
    tokens, logprobs = sample(logits, draws, sampling())
    wanted = logits[0].double().softmax(-1)
    frequency = torch.bincount(tokens, minlength=5) / len(tokens)
    assert (frequency - wanted).abs().max() < 0.01
    assert torch.allclose(logprobs.double(), wanted.log()[tokens], atol=1e-6)


def test_an_excluded_token_is_never_drawn():
    logits = torch.full((3, 6), -1.0)
    logits[:, 4:] = -torch.inf
    for draw in (0.0, 0.5, 1 - 2**-53):
        tokens, logprobs = sample(logits, torch.full((3,), draw, dtype=torch.float64), sampling())
        assert int(tokens.max()) < 4
        assert torch.isfinite(logprobs).all()


def test_truncation_keeps_at_least_the_best():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    kept = truncate_logits(logits, sampling(top_p=1e-6))
    assert torch.isfinite(kept).tolist() == [[False, True, False, False]]


def test_generating_before_the_first_sync_is_refused():
    engine = HFEngine(Policy(tiny_model()), tokenizer())
    with pytest.raises(RuntimeError, match="before load_weights"):
        engine.generate(prompts(2), sampling())
