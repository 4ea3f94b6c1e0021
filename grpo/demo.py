"""`grpo demo`: the whole story on two CPU cores, without a download.

A tiny Qwen3 with a character tokenizer is warm-started on demonstrations of "sort these digits", most of which are
wrong in a systematic way; the model learns the format and several ways to answer. GRPO with the verifiable reward
"exactly the sorted digits" then has to find the right one: the reward is the only teacher of the rise.
Left out: a configuration. The numbers are those of a recipe that was measured (README has the table).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.config import GRPOConfig, SFTConfig
from grpo.errors import InputError

NUM_EVAL = 512
DIGITS = 6
NO_SAVINGS = {"activation_checkpointing": "none"}  # memory is no concern at this size
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def sort_reward(completion: str, answer: str, truncated: bool) -> float:
    """1 for exactly the sorted digits ended by EOS, else 0."""
    return float(completion == answer and not truncated)


def make_problems(count: int, seed: int) -> list[dict[str, Any]]:
    """`count` different problems: chat prompt "sort 402917" and the answer "012479"."""
    source = random.Random(f"sort-{seed}")
    numbers: dict[str, None] = {}
    while len(numbers) < count:
        numbers["".join(source.choice("0123456789") for _ in range(DIGITS))] = None
    return [
        {"prompt": [{"role": "user", "content": f"sort {digits}"}], "answer": "".join(sorted(digits))}
        for digits in numbers
    ]


def make_demonstrations(problems: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Answers for the warm start, 65 % of them wrong: reversed, sorted by halves only, or with duplicates dropped."""
    source = random.Random(f"demonstrations-{seed}")
    rows = []
    for problem in problems:
        digits, right = problem["prompt"][0]["content"].split()[1], problem["answer"]
        half = DIGITS // 2
        wrong = source.choice(
            [
                right[::-1],
                right[::-1],
                "".join(sorted(digits[:half])) + "".join(sorted(digits[half:])),
                "".join(dict.fromkeys(right)),
            ]
        )
        rows.append({"prompt": problem["prompt"], "completion": wrong if source.random() < 0.65 else right})
    return rows


def make_tokenizer() -> Any:
    """One token per character, with a chat template and EOS `<|end|>`; a real fast tokenizer, made in memory."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unk|>"]
    characters = "abcdefghijklmnopqrstuvwxyz0123456789 +-*/=().,:?!<>\n"
    vocabulary = {token: index for index, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        padding_side="left",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: Any, seed: int) -> Any:
    """A randomly initialised Qwen3 shape: 2 layers, width 64, 4 heads, tied head, about 0.1M parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def warm_start_config(seed: int, folder: Path) -> SFTConfig:
    """250 steps of 64 demonstrations."""
    return SFTConfig(
        output_dir=str(folder),
        seed=seed,
        max_steps=250,
        examples_per_step=64,
        learning_rate=2e-3,
        max_completion_length=16,
        update=NO_SAVINGS,
        checkpoint={"every_steps": 0},
    )


def grpo_config(seed: int, folder: Path, reward_weights: list[float], engine: str = "hf") -> GRPOConfig:
    """160 optimizer steps: 64 prompts × 8 generations, each batch used twice."""
    rollout: dict[str, Any] = {"num_generations": 8, "max_completion_length": 8, "max_sequences": 512, "engine": engine}
    if engine == "vllm":
        rollout |= {"kv_cache": "1GiB", "cuda_graphs": False}
    return GRPOConfig(
        reward_weights=reward_weights,
        output_dir=str(folder),
        seed=seed,
        max_steps=160,
        prompts_per_step=64,
        rollout=rollout,
        objective={"num_iterations": 2, "scale_rewards": "group"},
        optimizer={
            "learning_rate": 1e-3,
            "adam_beta2": 0.95,
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0.05,
            "min_lr_ratio": 0.1,
        },
        update=NO_SAVINGS,
        evaluation={"every_steps": 40},
        checkpoint={"every_steps": 0},
        logging={"rollouts_every_steps": 20},
    )


def holds_demo(folder: Path) -> bool:
    """Whether a demo has run, or begun to, in `folder`."""
    return any((folder / name).exists() for name in ("summary.json", "metrics.jsonl", "warm_start"))


def free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of `wanted-2`, `wanted-3`, … in which no demo has run."""
    folder, number = wanted, 1
    while holds_demo(folder):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def run_demo(
    seed: int, output_dir: Path, teacher: Callable[..., Any] | None = None, engine: str = "hf"
) -> dict[str, Any]:
    """Warm start, then GRPO. Returns and writes the summary. Raises `InputError` when the folder holds a run.

    `teacher` replaces the reward that trains (the control pays at random); accuracy is always `sort_reward`'s. `engine`
    samples in the GRPO stage: hf on any device, vllm on a GPU (InputError where it cannot run).
    """
    start = time.monotonic()
    if holds_demo(output_dir):
        raise InputError(f"{output_dir}: holds a run (want --output-dir NEW, or remove it)")
    if engine == "vllm":
        from grpo.rollout.vllm_start import check_vllm

        check_vllm()
    import torch

    from grpo.sft import SFTTrainer
    from grpo.trainer.loop import GRPOTrainer
    from grpo.trainer.metrics import environment_facts

    torch.set_num_threads(1)  # a model this small only loses by sharing its work
    problems = make_problems(NUM_EVAL + 8000, seed)
    held_out, train = problems[:NUM_EVAL], problems[NUM_EVAL:]
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    seconds = {"imports and setup": time.monotonic() - start}

    began = time.monotonic()
    warm_up = SFTTrainer(
        model,
        warm_start_config(seed, output_dir / "warm_start"),
        make_demonstrations(train, seed),
        processing_class=tokenizer,
    )
    warm_up.train()
    seconds["warm start"] = time.monotonic() - began

    began = time.monotonic()
    trainer = GRPOTrainer(
        model,
        [sort_reward] if teacher is None else [sort_reward, teacher],
        grpo_config(seed, output_dir, [1.0] if teacher is None else [0.0, 1.0], engine),
        train,
        held_out,
        processing_class=tokenizer,
        console=warm_up.console,
    )
    totals: dict[str, float] = {}
    for row in trainer.steps():
        for name in ("rollout", "score", "pack", "update", "evaluation"):
            totals[name] = totals.get(name, 0.0) + (row.get(f"phase/{name}/seconds") or 0.0)
    seconds["grpo"] = time.monotonic() - began
    seconds |= {f"grpo: {name}": value for name, value in totals.items()}
    seconds["total"] = time.monotonic() - start
    trainer.save_model(output_dir / "model")
    summary = {
        "accuracy_before": trainer.first_row["initial_eval_rewards/sort_reward/mean"],
        "accuracy_after": row["eval_rewards/sort_reward/mean"],
        "num_problems": len(held_out),
        "engine": engine,
        "seconds": seconds,
        "seed": seed,
        "steps": trainer.step,
        "versions": environment_facts()["versions"],
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _show(trainer, summary, output_dir)
    return summary


def _show(trainer: Any, summary: dict[str, Any], output_dir: Path) -> None:
    trainer.show_samples(3)
    rows = [
        ("accuracy after the warm start", f"{summary['accuracy_before']:.1%}"),
        ("accuracy after GRPO", f"{summary['accuracy_after']:.1%}"),
        ("held-out problems (greedy)", summary["num_problems"]),
        *[(f"seconds, {name}", f"{value:.1f}") for name, value in summary["seconds"].items()],
        ("run folder", output_dir),
        ("report", output_dir / "report.html"),
    ]
    trainer.console.table("demo", rows)
