"""The cold start: supervised training on prompt + completion, loss on the completion only.

    loss = − Σ_t log π(completion_t | before) / (completion tokens of the optimizer step)

It runs over the same model, data, packing, head and update rooms as GRPO. Left out: training on several turns of a
conversation; the last assistant message is the completion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grpo.batch import Prompt, TokenBatch, Totals
from grpo.config import SFTConfig
from grpo.data import PromptStream, check_column, encode_prompt, load_table, prompt_problem, with_system
from grpo.errors import InputError
from grpo.ledger import Ledger
from grpo.model.load import context_length, stop_token_ids
from grpo.packing import Document, pack_documents, packing_metrics
from grpo.seeds import seed_for
from grpo.trainer.base import BaseTrainer, default_console
from grpo.trainer.build import build_policy, tokenizer_for, with_names
from grpo.trainer.console import Console
from grpo.trainer.state import Item, common_items, generator_items
from grpo.trainer.update import optimizer_step


class SFTTrainer(BaseTrainer):
    """Supervised fine-tuning with the same arguments as `GRPOTrainer`, less the rewards.

    Rows have a prompt and a completion column (text, or chat messages), or one `messages` column whose last message
    is the completion. Raises `InputError` for bad rows before any weight is loaded.
    """

    def __init__(
        self,
        model: str | nn.Module | None = None,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        *,
        console: Console | None = None,
    ) -> None:
        config = with_names(args or SFTConfig(), model, (train_dataset, eval_dataset))
        tokenizer = tokenizer_for(config, model, processing_class)
        examples = _examples(config, tokenizer, train_dataset, config.data.train, "data.train")
        if examples is None:
            raise InputError("data.train is null (want a path, a hub id, or train_dataset=…)")
        self.eval_examples = _examples(config, tokenizer, eval_dataset, config.data.eval, "data.eval") or []
        ledger = Ledger()
        with ledger.phase("load"):
            policy = build_policy(config, model, peft_config)
        _check_context(examples, context_length(policy.causal_lm.config))
        stream = PromptStream(examples, seed_for(config.seed, "data"), config.data.shuffle)
        super().__init__(config, policy, tokenizer, stream, console or default_console(), ledger)
        self.config: SFTConfig = config

    def _advance(self) -> dict[str, Any]:
        with self.phase("pack"):
            batches, totals = self._pack(self.data.take(self.config.examples_per_step))
        with self.phase("update"):
            result = self._within_memory(
                batches,
                lambda bins: optimizer_step(
                    self.policy, self.optimizer, self.schedule, bins, totals, self._batch_loss, self.ledger.phase
                ),
            )
        tokens = sum(batch.input_ids.numel() for batch in batches)
        self.num_tokens += tokens
        faults = {f"{index}/input_ids": batch.input_ids for index, batch in enumerate(batches)}
        return {**self._count(result, faults), **packing_metrics(batches), "step_tokens": float(tokens)}

    def _evaluation(self) -> dict[str, float]:
        if not self.eval_examples:
            return {}
        with self.phase("evaluation"), self.policy.evaluating(), torch.no_grad():
            batches, totals = self._pack(self.eval_examples)
            losses = [self._batch_loss(batch.to(self.policy.device), totals)[0] for batch in batches]
        return {"eval_loss": float(torch.stack(losses).sum())}

    def evaluate(self) -> dict[str, float]:
        """`eval_loss`: mean loss per completion token of the held-out rows."""
        return self._evaluation()

    def items(self) -> list[Item]:
        """The state of a supervised run (see state.py)."""
        return [*common_items("adapter" if self.policy.adapted else "policy"), *generator_items()]

    def _pack(self, examples: list[Prompt]) -> tuple[list[TokenBatch], Totals]:
        documents = [
            Document(place, example.token_ids, example.example["completion_ids"])
            for place, example in enumerate(examples)
        ]
        tokens = sum(len(document.completion_ids) for document in documents)
        batches = pack_documents(documents, self.tokens_per_bin)
        return batches, Totals(tokens, len(documents), len(documents))

    def _batch_loss(self, batch: TokenBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        logprobs = self.policy.logprobs(batch, temperature=1.0).logprobs
        return -logprobs.sum() / max(1, totals.tokens), {}, logprobs.detach()


def _examples(config: SFTConfig, tokenizer: Any, passed: Any, configured: Any, field: str) -> list[Prompt] | None:
    source = passed if passed is not None else configured
    if source is None:
        return None
    table = load_table(source, field)
    has_messages = "messages" in table.rows[0] and config.data.prompt_column not in table.rows[0]
    if not has_messages:
        check_column(table, config.data.prompt_column, "data.prompt_column")
        check_column(table, config.data.completion_column, "data.completion_column")
    stop = stop_token_ids(tokenizer)
    examples, problems = [], []
    for index, row in enumerate(table.rows):
        try:
            prompt_ids, completion_ids = _encode(config, tokenizer, _split(config, row, has_messages), stop)
            _check_lengths(config, prompt_ids, completion_ids)
        except InputError as error:
            problems += [f"{table.name}: row {index + 1}: {line}" for line in error.lines]
            continue
        examples.append(Prompt(index, prompt_ids, {"completion_ids": completion_ids}))
    if problems:
        raise InputError(*problems)
    return examples


def _split(config: SFTConfig, row: Mapping[str, Any], has_messages: bool) -> tuple[Any, Any]:
    if has_messages:
        messages: Any = row.get("messages")
        if problem := prompt_problem(messages):
            raise InputError(f"messages {problem}")
        if isinstance(messages, str) or len(messages or ()) < 2 or messages[-1]["role"] != "assistant":
            raise InputError("messages does not end with an assistant message after a prompt")
        return list(messages[:-1]), [messages[-1]]
    for column in (config.data.prompt_column, config.data.completion_column):
        if problem := prompt_problem(row.get(column)):
            raise InputError(f"{column} {problem}")
    return row[config.data.prompt_column], row[config.data.completion_column]


def _encode(
    config: SFTConfig, tokenizer: Any, parts: tuple[Any, Any], stop: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    """(prompt ids, completion ids ending with EOS)."""
    prompt, completion = with_system(parts[0], config.data.system_prompt), parts[1]
    prompt_ids = encode_prompt(tokenizer, prompt)
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise InputError(f"{config.data.completion_column} is messages but the prompt is text")
        ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    else:
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        whole = list(tokenizer.apply_chat_template([*prompt, *answer], tokenize=True, return_dict=False))
        if whole[: len(prompt_ids)] != prompt_ids:
            raise InputError("the chat template does not keep the prompt as a prefix of prompt + completion")
        ids = whole[len(prompt_ids) :]
    last_stop = max((place for place, token in enumerate(ids) if token in stop), default=None)
    return prompt_ids, ids[: last_stop + 1] if last_stop is not None else [*ids, stop[0]]


def _check_lengths(config: SFTConfig, prompt_ids: list[int], completion_ids: list[int]) -> None:
    for ids, limit, knob in (
        (prompt_ids, config.data.max_prompt_length, "data.max_prompt_length"),
        (completion_ids, config.max_completion_length, "max_completion_length"),
    ):
        if len(ids) > limit:
            raise InputError(f"has {len(ids)} tokens (want at most {knob} = {limit})")


def _check_context(examples: list[Prompt], context: int | None) -> None:
    for example in examples:
        length = len(example.token_ids) + len(example.example["completion_ids"])
        if context is not None and length > context:
            raise InputError(
                f"data.train: row {example.id + 1}: has {length} tokens (the model's context is {context})"
            )
