"""The GRPO loop, one screen: rollout → score → pack → reference → update, and nothing hidden elsewhere.

    trainer = GRPOTrainer(model="…", reward_funcs=[f], args=GRPOConfig(…), train_dataset=rows)
    for metrics in trainer.steps(): …

Left out: building the parts (build.py), running and saving (base.py), the update's inside (update.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from grpo.algorithm import ADVANTAGE_KNOBS, LOSS_KNOBS, group_advantages, zero_variance_groups
from grpo.batch import Completion, Prompt, RolloutBuffer, ScoredRollouts, TokenBatch
from grpo.config import GRPOConfig, objective_knobs
from grpo.data import encode_prompt, prompt_problem, prompt_text, with_system
from grpo.errors import InputError, RunError
from grpo.evaluate import evaluate_rollouts
from grpo.ledger import Ledger
from grpo.packing import pack, packing_metrics
from grpo.rollout.engine import RolloutEngine, Sampling, SyncReport
from grpo.scoring import (
    FaultBudget,
    close_pools,
    merge_scored,
    placement_lines,
    range_of_totals,
    score,
    select_groups,
)
from grpo.seeds import seed_for
from grpo.trainer.base import BaseTrainer, default_console
from grpo.trainer.build import build_parts
from grpo.trainer.console import Console
from grpo.trainer.metrics import completion_metrics
from grpo.trainer.shaping import (
    is_token_wise,
    measure_k1,
    penalized_advantages,
    with_overlong_penalty,
    with_token_returns,
)
from grpo.trainer.state import Item, common_items, generator_items, rollout_items
from grpo.trainer.update import StepResult, add_reference_logprobs, update

MAX_EMPTY_IN_A_ROW = 10
CAUSES: tuple[Literal["all_right", "all_wrong", "all_truncated", "all_invalid"], ...] = (
    "all_right",
    "all_wrong",
    "all_truncated",
    "all_invalid",
)


class GRPOTrainer(BaseTrainer):
    """Trains a causal language model with GRPO on the user's own reward functions.

    Args:
        model: folder, hub id, or a Hugging Face model (also one that peft already wrapped).
        reward_funcs: one or several functions, or their names "module:function"; None: `args.rewards`.
        args: every knob; None: the defaults.
        train_dataset: rows with a prompt column (list of dicts, Dataset, path, hub id); None: `args.data.train`.
        eval_dataset: the same for held-out rows; None: `args.data.eval`.
        processing_class: the tokenizer; None: the one beside the model.
        peft_config: a `peft.PeftConfig`; None: `args.adapter`.

    Raises:
        InputError: bad configuration, data, rewards or model; one line per problem, before any weight is loaded
            where it can be known before.
    """

    def __init__(
        self,
        model: str | nn.Module | None = None,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        *,
        console: Console | None = None,
    ) -> None:
        console = console or default_console()
        ledger = Ledger()
        with ledger.phase("load"):
            parts = build_parts(
                args or GRPOConfig(),
                model,
                reward_funcs,
                (train_dataset, eval_dataset),
                processing_class,
                peft_config,
                console,
            )
        super().__init__(parts.config, parts.policy, parts.tokenizer, parts.data, console, ledger)
        self.config: GRPOConfig = parts.config
        self.rewards = parts.rewards
        self.eval_prompts = parts.eval_prompts
        self.stop_token_ids = parts.stop_token_ids
        self.engine: RolloutEngine = parts.engine
        self.engine.phase = self.ledger.phase
        self.ledger.meter.unmapped = self.engine.unmapped_bytes
        self.engine.progress = lambda done, total: self.view.progress(done, total) if self.view else None
        self.last_sync: SyncReport | None = None
        self.advantage_knobs, self.loss_knobs = split_knobs(self.config)
        self.last_evaluation: ScoredRollouts | None = None
        self.buffer: RolloutBuffer | None = None
        self.empty_in_a_row = 0
        self.fault_budget = FaultBudget()

    def notes(self) -> Sequence[str]:
        """Also where the rewards run."""
        return [*super().notes(), *placement_lines(self.rewards)]

    def release(self) -> None:
        """End the rewards' worker processes (a later call starts new ones) and what the engine left elsewhere."""
        close_pools(self.rewards)
        self.engine.release()

    # --- the loop --------------------------------------------------------------------------------------------

    def _advance(self) -> dict[str, Any]:
        if self.buffer is None:
            self.buffer = self._collect()
        collected = self.buffer

        def run(batches: list[TokenBatch]) -> tuple[StepResult, RolloutBuffer]:
            buffer = replace(collected, batches=batches)
            return update(
                self.policy,
                self.optimizer,
                self.schedule,
                self.config,
                self.loss_knobs,
                buffer,
                phase=self.ledger.phase,
            )

        with self.phase("update"):
            result, buffer = self._within_memory(collected.batches, run)
        metrics = {**buffer.metrics, **self._count(result, _fault_tensors(buffer))}
        self._check_progress(buffer)
        self.buffer = buffer if buffer.iteration < self.config.objective.num_iterations else None
        return {"reward": None, "reward_std": None, "kl": None, "entropy": None, **metrics}

    def _collect(self) -> RolloutBuffer:
        config = self.config
        sampled = self._sample_and_score(self.data.take(config.prompts_per_step))
        scored = sampled
        if config.objective.zero_variance == "refill":
            scored, sampled = self._refill(sampled)
        with self.phase("reference"):
            k1 = self._k1_of_reward(scored)
        with self.phase("pack"):
            advantages = self._advantages(scored, k1)
            batches, totals = pack(
                scored,
                advantages,
                self.tokens_per_bin,
                skip_zero_advantage=self._skips_zero_advantage,
                share_prompts=config.update.share_prompts,
            )
            if k1 is not None and is_token_wise(config.objective.recipe):
                batches = with_token_returns(batches, scored, k1, config)
            elif not self._acts_without_advantage and not any(a for group in advantages for a in group):
                batches = []  # every advantage is zero: nothing to learn, the weights stay bit for bit
        with self.phase("reference"):
            if batches and config.objective.beta > 0:
                batches = add_reference_logprobs(self.policy, batches, config.rollout.temperature)
        if self._rollouts_are_due():
            self.folder.write_rollouts(self.step + 1, scored, advantages)
        return RolloutBuffer(batches, totals, {**self._rollout_metrics(sampled), **packing_metrics(batches)})

    def _sample_and_score(self, prompts: list[Prompt]) -> ScoredRollouts:
        with self.phase("rollout"), self.engine.awake():
            self.last_sync = self.engine.load_weights(self.policy)
            rollouts = self.engine.generate(prompts, self._sampling())
        with self.phase("score"):
            scored = score(
                rollouts,
                self.rewards,
                step=self.step + 1,
                max_steps=self.config.max_steps,
                epoch=self.data.epoch,
                on_error=self.config.rewards.on_error,
                seed=self.config.seed,
            )
            self.fault_budget.check(scored)
            cache = self.config.rewards.soft_overlong_cache
            if cache is None:
                return scored
            return with_overlong_penalty(scored, self.config.rollout.max_completion_length, cache)

    def _rollouts_are_due(self) -> bool:
        """Whether one of the steps that will use these rollouts is a multiple of the knob; the first always is."""
        every = self.config.logging.rollouts_every_steps
        last = self.step + self.config.objective.num_iterations
        return every > 0 and (self.step == 0 or last // every > self.step // every)

    def _refill(self, sampled: ScoredRollouts) -> tuple[ScoredRollouts, ScoredRollouts]:
        """Sample other prompts in place of groups without variance, `max_refill_rounds` times at most.

        Returns the groups to train on, as many as were asked for, and everything that was sampled.
        """
        everything = sampled
        for _ in range(self.config.objective.max_refill_rounds):
            causes = zero_variance_groups(everything, **self.advantage_knobs)
            missing = self.config.prompts_per_step - causes.count(None)
            if missing <= 0:
                break
            everything = merge_scored([everything, self._sample_and_score(self.data.take(missing))])
        causes = zero_variance_groups(everything, **self.advantage_knobs)
        best_first = sorted(range(len(causes)), key=lambda p: causes[p] is not None)  # stable: in order of sampling
        return select_groups(everything, sorted(best_first[: self.config.prompts_per_step])), everything

    def _k1_of_reward(self, scored: ScoredRollouts) -> dict[int, Tensor] | None:
        objective = self.config.objective
        if objective.beta == 0 or objective.kl_in == "loss":
            return None
        return measure_k1(self.policy, scored, self.tokens_per_bin, self.config.rollout.temperature)

    def _advantages(self, scored: ScoredRollouts, k1: dict[int, Tensor] | None) -> list[list[float | None]]:
        objective = self.config.objective
        if k1 is None:
            advantages = group_advantages(scored, recipe=objective.recipe, **self.advantage_knobs)
        else:
            advantages = penalized_advantages(scored, k1, objective.beta, objective.recipe, self.advantage_knobs)
        if objective.zero_variance != "drop":
            return advantages
        causes = zero_variance_groups(scored, **self.advantage_knobs)
        return [
            group if cause is None else [None] * len(group) for group, cause in zip(advantages, causes, strict=True)
        ]

    def _rollout_metrics(self, sampled: ScoredRollouts) -> dict[str, float]:
        """Of everything that was sampled, before any filtering."""
        rollouts = sampled.rollouts
        declared = range_of_totals(self.rewards, self.config.rewards.soft_overlong_cache is not None)
        causes = zero_variance_groups(sampled, **self.advantage_knobs, reward_range=declared)
        tokens = sum(
            len(prompt.token_ids) + len(completion.token_ids)
            for prompt, group in zip(rollouts.prompts, rollouts.completions, strict=True)
            for completion in group
        )
        self.num_tokens += tokens
        return {
            **sampled.metrics,
            **completion_metrics(rollouts),
            **_sync_metrics(self.last_sync),
            **{f"groups/{cause}": float(causes.count(cause)) for cause in CAUSES},
            "groups/refilled": float(len(causes) - self.config.prompts_per_step),
            "frac_reward_zero_std": sum(cause is not None for cause in causes) / len(causes),
            "policy_version": float(rollouts.policy_version),
            "step_tokens": float(tokens),
        }

    @property
    def _acts_without_advantage(self) -> bool:
        """Whether a completion with A = 0 still has a gradient (KL or entropy in the loss)."""
        objective = self.config.objective
        return (objective.beta > 0 and objective.kl_in == "loss") or objective.entropy_coef != 0

    @property
    def _skips_zero_advantage(self) -> bool:
        return self.config.objective.zero_variance != "keep" and not self._acts_without_advantage

    def _sampling(self) -> Sampling:
        seed = seed_for(self.config.seed, "rollout", self.step)
        return Sampling.of(self.config.rollout, self.stop_token_ids, seed)

    def _check_progress(self, buffer: RolloutBuffer) -> None:
        self.empty_in_a_row = 0 if buffer.batches else self.empty_in_a_row + 1
        if self.empty_in_a_row >= MAX_EMPTY_IN_A_ROW:
            cause = max(CAUSES, key=lambda name: buffer.metrics.get(f"groups/{name}", 0))
            raise RunError(
                f"{MAX_EMPTY_IN_A_ROW} steps in a row had nothing to learn from: "
                f"no group's rewards differ (mostly {cause})"
            )

    # --- beside the loop -------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Any], num_generations: int = 1, temperature: float | None = None, seed: int = 0
    ) -> list[list[Completion]]:
        """Completions of text or chat prompts under the present policy: [P][num_generations].

        `temperature` None is the configuration's, 0 is greedy.

        Raises:
            InputError: a prompt is neither text nor messages, naming its place.
        """
        encoded = []
        for place, value in enumerate(prompts, 1):
            if problem := prompt_problem(value):
                raise InputError(f"prompts: row {place}: {problem}")
            prompt = with_system(value, self.config.data.system_prompt)
            encoded.append(Prompt(place - 1, encode_prompt(self.tokenizer, prompt), {"prompt": prompt}))
        sampling = replace(
            self._sampling(), num_generations=num_generations, seed=seed_for(self.config.seed, "generate", seed)
        )
        if temperature is not None:
            sampling = replace(sampling, temperature=temperature)
        with self.engine.awake():
            self.engine.load_weights(self.policy)
            return self.engine.generate(encoded, sampling).completions

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics, each with the prefix `eval_`. Raises `InputError` without held-out rows."""
        if not self.eval_prompts:
            raise InputError("data.eval is null (want held-out rows: data.eval or eval_dataset)")
        return self._evaluation()

    def _evaluation(self) -> dict[str, float]:
        if not self.eval_prompts:
            return {}
        evaluation = self.config.evaluation
        sampling = replace(
            self._sampling(),
            num_generations=evaluation.num_generations,
            temperature=evaluation.temperature,
            seed=seed_for(self.config.seed, "evaluation"),
        )
        with self.phase("evaluation"), self.engine.awake():
            self.engine.load_weights(self.policy)
            rollouts = self.engine.generate(self.eval_prompts, sampling)
            metrics, self.last_evaluation = evaluate_rollouts(
                rollouts,
                self.rewards,
                evaluation.pass_threshold,
                seed=self.config.seed,
                step=self.step,
                max_steps=self.config.max_steps,
            )
        return {f"eval_{name}": value for name, value in metrics.items()}

    def show_samples(self, count: int) -> None:
        """Print `count` completions of the last evaluation (or, without held-out rows, of the present policy)."""
        scored = self.last_evaluation
        if scored is None:
            with self.engine.awake():
                self.engine.load_weights(self.policy)
                rollouts = self.engine.generate(list(self.data.prompts[:count]), self._sampling())
            scored = score(
                rollouts,
                self.rewards,
                step=self.step,
                max_steps=self.config.max_steps,
                on_error="none",
                seed=self.config.seed,
            )
        self.console.samples(
            (
                prompt_text(prompt.example["prompt"]),
                group[0].text,
                {name: values[p][0] for name, values in scored.parts.items()},
            )
            for p, (prompt, group) in enumerate(
                zip(scored.rollouts.prompts[:count], scored.rollouts.completions[:count], strict=True)
            )
        )

    def items(self) -> list[Item]:
        """The state of a GRPO run (see state.py)."""
        return [*common_items("adapter" if self.policy.adapted else "policy"), *rollout_items(), *generator_items()]


def split_knobs(config: GRPOConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The objective's knobs for `group_advantages` and for `policy_loss`."""
    knobs = objective_knobs(config)
    return {name: knobs[name] for name in ADVANTAGE_KNOBS}, {name: knobs[name] for name in LOSS_KNOBS}


def _sync_metrics(report: SyncReport | None) -> dict[str, float]:
    """What the last sync moved; nothing where the engine is the policy itself."""
    if report is None or not report.num_bytes:
        return {}
    metrics = {"sync/seconds": report.seconds, "sync/mib": report.num_bytes / 2**20}
    return metrics | ({"sync/probe_gap": report.probe_gap} if report.probe_gap is not None else {})


def _fault_tensors(buffer: RolloutBuffer) -> dict[str, Any]:
    return {
        f"{index}/{name}": value
        for index, batch in enumerate(buffer.batches)
        for name, value in vars(batch).items()
        if hasattr(value, "dtype")
    }
