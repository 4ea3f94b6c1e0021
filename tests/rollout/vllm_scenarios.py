"""What the vLLM engine does on a GPU, one engine a process (it can hold no second one): prints a JSON line of findings.

    python -m tests.rollout.vllm_scenarios lora FOLDER      # also: own, full, four_bit, refusals

`test_vllm_engine.py` runs this and judges the numbers.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

from grpo import GRPOConfig, GRPOTrainer
from grpo.batch import Prompt
from grpo.demo import make_tokenizer
from grpo.errors import InputError, RunError
from grpo.rollout.engine import Sampling
from grpo.rollout.hf_engine import truncate_logits

ROWS = [{"prompt": f"sort {i * 7919 % 1000000:06d} and then say what it is", "answer": str(i)} for i in range(24)]
MIB = 2**20


def save_model(folder: Path, dtype=torch.bfloat16, **changes) -> None:
    """A small Qwen3 whose logits are far from uniform, with the demo's character tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    values = dict(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.08,
    )  # fmt: skip
    Qwen3ForCausalLM(Qwen3Config(**values | changes)).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def length_reward(completion: str) -> float:
    """Something that differs inside a group."""
    return len(set(completion)) / 50


def trainer_for(folder: Path, name: str, **changes) -> GRPOTrainer:
    values = dict(
        output_dir=str(folder / f"run-{name}"), max_steps=3, prompts_per_step=4, num_generations=4,
        max_completion_length=48, engine="vllm", kv_cache="256MiB", cuda_graphs=False, max_sequences=64,
        adapter={"r": 8, "alpha": 32}, learning_rate=1e-3, temperature=0.7, save_steps=2, recipe="dapo",
    )  # fmt: skip
    values.update(changes)
    return GRPOTrainer(
        model=str(folder / "model"), reward_funcs=[length_reward], args=GRPOConfig(**values), train_dataset=ROWS
    )


def disturb(trainer, scale=0.05, seed=1) -> None:
    """Move every trained weight, so that adapter and base differ."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.policy.trainable().values():
            noise = torch.randn(parameter.shape, generator=generator, device="cuda", dtype=torch.float32)
            size = parameter.float().std().nan_to_num(0) if parameter.numel() > 1 else 0.0
            parameter.add_((noise * (scale + 0.2 * size)).to(parameter.dtype))


def prompts_of(trainer, count=4) -> list[Prompt]:
    return list(trainer.data.prompts[:count])


def sampling_of(trainer, **changes) -> Sampling:
    values = dict(vars(trainer._sampling()), **changes)
    return Sampling(**values)


@torch.no_grad()
def policy_logprobs(trainer, prompt, completion, sampling) -> torch.Tensor:
    """What the policy itself gives the tokens under the distribution that was sampled: one plain forward pass."""
    ids = torch.tensor([prompt.token_ids + completion.token_ids], device="cuda")
    with trainer.policy.evaluating():
        logits = trainer.policy.causal_lm(input_ids=ids, use_cache=False).logits[0].float()
    logits = logits[len(prompt.token_ids) - 1 : -1]
    if sampling.temperature:
        logits = truncate_logits(logits / sampling.temperature, sampling)
    return logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids, device="cuda")[:, None])[:, 0].cpu()


def gap(trainer, rollouts, sampling) -> dict[str, float]:
    """Sampler against policy; tokens that one side had excluded (−inf) are counted apart."""
    differences, excluded = [], 0
    for prompt, group in zip(rollouts.prompts, rollouts.completions, strict=True):
        for completion in group:
            theirs = torch.tensor(completion.sampler_logprobs)
            ours = policy_logprobs(trainer, prompt, completion, sampling)
            finite = torch.isfinite(ours) & torch.isfinite(theirs)
            excluded += int((~finite).sum())
            differences.append((theirs - ours)[finite].abs())
    flat = torch.cat(differences)
    return {"mean": float(flat.mean()), "max": float(flat.max()), "tokens": len(flat), "excluded": excluded}


def tokens(rollouts) -> list[list[int]]:
    return [completion.token_ids for group in rollouts.completions for completion in group]


def agreement(left, right) -> float:
    """Share of equal tokens up to the first difference of each pair."""
    same = total = 0
    for a, b in zip(left, right, strict=True):
        total += max(len(a), len(b))
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return same / total


def generator_states() -> list:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), torch.cuda.get_rng_state()]


def same_states(left, right) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(left, right, strict=True))


def used_mib() -> float:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / MIB


def raises(kind, action) -> str:
    """The line of the error, or "" when there was none."""
    try:
        action()
    except kind as error:
        return str(error) or type(error).__name__
    return ""


def checks(trainer) -> dict:
    """Everything about one engine and its policy."""
    engine, found = trainer.engine, {}
    found["asleep"] = engine.memory()
    disturb(trainer)
    before = generator_states()
    frozen = {n: p.detach().clone() for n, p in trainer.policy.module.named_parameters()}
    plain = sampling_of(trainer)
    cut = sampling_of(trainer, top_p=0.9, top_k=12)
    greedy = sampling_of(trainer, temperature=0.0, num_generations=1)
    with engine.awake():
        report = engine.load_weights(trainer.policy)
        first = engine.generate(prompts_of(trainer), plain)
        found["sync"] = {"seconds": report.seconds, "bytes": report.num_bytes, "gap": report.probe_gap}
        found["plain"] = gap(trainer, first, plain)
        found["cut"] = gap(trainer, engine.generate(prompts_of(trainer), cut), cut)
        found["greedy"] = gap(trainer, engine.generate(prompts_of(trainer), greedy), greedy)
        found["again"] = agreement(tokens(first), tokens(engine.generate(prompts_of(trainer), plain)))
        reordered = engine.generate(prompts_of(trainer)[::-1], plain)
        found["reordered"] = agreement(tokens(first)[:4], tokens(reordered)[-4:])
        found["distinct"] = len({tuple(ids) for ids in tokens(first)})
        found["awake"] = engine.memory()
    found["generators_kept"] = same_states(before, generator_states())
    found["weights_kept"] = all(torch.equal(p, frozen[n]) for n, p in trainer.policy.module.named_parameters())
    found["interrupted"] = interrupted(trainer, plain, tokens(first))
    found["stale"] = stale(trainer)
    found["outside"] = raises(RunError, lambda: engine.load_weights(trainer.policy))
    found["too_long"] = raises(RunError, lambda: too_long(trainer, plain))
    found["leak_mib"] = leak(trainer)
    return found


def interrupted(trainer, plain, wanted) -> float:
    """Ctrl-C after three scheduler steps; then the same again: agreement with the undisturbed tokens."""
    engine = trainer.engine
    inner = engine._llm.llm_engine
    step, calls = inner.step, []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    with engine.awake():
        engine.load_weights(trainer.policy)
        inner.step = stop
        error = raises(KeyboardInterrupt, lambda: engine.generate(prompts_of(trainer), plain))
        inner.step = step
        assert error
        return agreement(wanted, tokens(engine.generate(prompts_of(trainer), plain)))


def stale(trainer) -> dict[str, str]:
    """Sabotage: what is sent is lost, or arrives damaged."""
    engine, send, found = trainer.engine, trainer.engine._send, {}
    saved = {n: p.detach().clone() for n, p in trainer.policy.trainable().items()}

    def sync() -> None:
        with engine.awake():
            engine.load_weights(trainer.policy)

    disturb(trainer, scale=0.3, seed=2)
    engine._send = lambda policy: 0
    found["nothing sent"] = raises(RunError, sync)
    engine._send = send
    with torch.no_grad():
        for name, parameter in trainer.policy.trainable().items():
            parameter.copy_(saved[name])
    found["then right"] = raises(RunError, sync)
    return found


def too_long(trainer, plain) -> None:
    with trainer.engine.awake():
        trainer.engine.load_weights(trainer.policy)
        trainer.engine.generate([Prompt(0, [7] * 5000, {})], plain)


def leak(trainer, cycles=20) -> float:
    """Growth of the device's used memory over so many cycles of wake, sync, a few tokens, sleep."""
    short = sampling_of(trainer, max_completion_length=4)
    levels = []
    for _ in range(cycles + 2):
        with trainer.engine.awake():
            trainer.engine.load_weights(trainer.policy)
            trainer.engine.generate(prompts_of(trainer), short)
        torch.cuda.empty_cache()
        levels.append(used_mib())
    return levels[-1] - levels[1]


def trains(trainer) -> dict:
    """Three steps: the rows' own figures."""
    rows = list(trainer.steps())
    names = ["sync/seconds", "sync/probe_gap", "sampling/sampling_logp_difference/mean", "sampling/ess", "step_time",
             "phase/rollout/seconds", "phase/wake/seconds", "phase/sync/seconds", "phase/sleep/seconds",
             "phase/update/peak_gib", "grad_norm", "reward"]  # fmt: skip
    return {"steps": len(rows), **{name: rows[-1].get(name) for name in names}}


def aliased(trainer) -> float:
    """Share of the frozen bytes whose storage is the engine's."""
    theirs = {p.untyped_storage().data_ptr() for p in trainer.engine._model().parameters()}
    frozen = [p for p in trainer.policy.module.parameters() if not p.requires_grad]
    return sum(p.nbytes for p in frozen if p.untyped_storage().data_ptr() in theirs) / sum(p.nbytes for p in frozen)


def main(name: str, folder: Path) -> dict:
    start = time.monotonic()
    if name == "refusals":
        return {
            "too large": raises(InputError, lambda: trainer_for(folder, name, kv_cache="500GiB")),
        }
    options = {
        "lora": {"share_weights": True},
        "own": {"share_weights": False},
        "full": {"adapter": None, "learning_rate": 1e-5},
        "four_bit": {"load_in_4bit": True},
        "float32": {"dtype": "float32", "adapter": None, "learning_rate": 1e-5},
    }[name]
    trainer = trainer_for(folder, name, **options)
    found = {"start_seconds": time.monotonic() - start}
    if name == "lora":
        found["aliased"] = aliased(trainer)
    found |= checks(trainer)
    found["trains"] = trains(trainer)
    found["seconds"] = time.monotonic() - start
    return found


if __name__ == "__main__":
    scenario, where = sys.argv[1], Path(sys.argv[2])
    if not (where / "model" / "config.json").exists():
        save_model(where / "model")
    sys.stdout.write("\n" + json.dumps(main(scenario, where)) + "\n")
