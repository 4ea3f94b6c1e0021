"""Every knob of a run: nested pydantic models, frozen and strict. An unknown key fails and names the nearest one.

YAML uses the sections below; Python may also pass the same names flat (`GRPOConfig(num_generations=8)`), and the
names that users of TRL type are understood (`config_reading.py`). Problems are collected and raised together as one
`InputError`; nothing edits the user's values.
Longer than a file should be, since the table of all knobs is one thing to read.
Left out: reading files of the model or the data. What can only be known from them is checked where they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from grpo import config_reading
from grpo.algorithm.recipes import RECIPES, check_objective
from grpo.errors import InputError
from grpo.sizes import parse_bytes

MAX_ENGINE_RANK = 512  # of an adapter that vLLM serves


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("want a number")
    return value


def _tokens_or_auto(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError("want a whole number, at least 1, or auto")


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys forbidden, defaults validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


class ModelConfig(Section):
    """Which causal language model, and how its weights are held."""

    name_or_path: str = Field("", description="folder or hub id of a Hugging Face causal LM")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="of the base weights; 2 or 4 B each")
    load_in_4bit: bool = Field(False, description="NF4 base weights through bitsandbytes; 0.52 B each")
    allow_4bit_moe: bool = Field(
        False,
        description="permit load_in_4bit on a mixture of experts: fused experts stay unquantised, routing suffers",
    )
    trust_remote_code: bool = Field(False, description="run code that ships with the model; needs revision")
    revision: str | None = Field(None, description="commit or tag on the hub")
    attn_implementation: str = Field("sdpa", description="attention of transformers (sdpa, eager, …)")
    device: str = Field("auto", description="auto = cuda if there is one, else cpu")


class AdapterConfig(Section):
    """LoRA through peft. Without this section the whole model is trained."""

    r: Int = Field(16, ge=1, description="rank; memory grows in proportion")
    alpha: Float = Field(32, gt=0, description="scale is alpha / r")
    dropout: Float = Field(
        0.0, ge=0, lt=1, description="on the adapter's input; above 0 these projections keep their unfused path"
    )
    target_modules: str | list[str] = Field("all-linear", description="names, a regex, or all-linear")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the adapter's weights, gradients and optimizer state; bfloat16 halves the weights and "
        "gradients; fused kernels compute in model.dtype, the unfused path in this one",
    )


class DataConfig(Section):
    """Where prompts come from: hub id, or a local .jsonl .json .csv .parquet file or saved dataset folder."""

    train: str | None = Field(None, description="training data")
    eval: str | None = Field(None, description="held-out data; evaluated every evaluation.every_steps")
    prompt_column: str = Field("prompt", description="text, or a list of chat messages")
    completion_column: str = Field("completion", description="supervised stage only: the answer to learn")
    system_prompt: str | None = Field(None, description="put in front as a system message")
    max_prompt_length: Int = Field(1024, ge=1, description="tokens; longer prompts: see overlong_prompt")
    overlong_prompt: Literal["error", "drop"] = Field("error", description="what to do with longer prompts")
    shuffle: bool = Field(True, description="a new order each epoch, from the seed")


class RewardFunction(Section):
    """One reward: "module:function" or "path/file.py:function", and how it is called."""

    function: str = Field(description="name of the function")
    weight: Float = Field(1.0, description="in the sum; 0 = metric only")
    name: str | None = Field(None, description="in metrics; null = the function's own")
    where: Literal["inline", "process", "async", "gpu"] | None = Field(
        None,
        description="process: workers that are killed at the limit, no GPU; gpu: in this process, without gradients; "
        "null = async for an async function, else inline",
    )
    timeout_s: Float | None = Field(
        None, gt=0, description="seconds of a call, process and async only; null = rewards.timeout"
    )
    on_error: Literal["raise", "none"] | None = Field(None, description="null = rewards.on_error")
    max_concurrency: Int | None = Field(
        None, ge=1, description="completions judged at a time; null = 4 in processes, all when async"
    )
    memory_mb: Int | None = Field(None, ge=1, description="MiB of address space of a worker; null = 4096")
    arguments: dict[str, Any] | None = Field(
        None, description="of a factory, which makes the reward, or bound to the function; null = the function as it is"
    )
    range: tuple[Float, Float] | None = Field(
        None, description="[lowest, highest] value, another one is a fault; null = any"
    )
    tier: str | None = Field(None, description="sandbox of a reward that runs model-written code: its argument `tier`")


class RewardsConfig(Section):
    """The reward functions, and what one of them failing means."""

    functions: list[RewardFunction] = Field(default_factory=list, description="their weighted sum is the reward")
    on_error: Literal["raise", "none"] = Field(
        "raise", description="raise: save and stop; none: that completion leaves loss and baseline"
    )
    weights: list[Float] | None = Field(None, description="of functions passed in Python, in their order")
    soft_overlong_cache: Int | None = Field(
        None, ge=1, description="tokens before max_completion_length over which a penalty grows to −1; null = off"
    )
    timeout: Float | None = Field(
        None,
        gt=0,
        description="seconds of a call of functions with where: process (null = 10) or async (null = no limit); inline "
        "it cannot be enforced",
    )

    @field_validator("timeout")
    @classmethod
    def _enforceable(cls, timeout: float | None, info: ValidationInfo) -> float | None:
        functions = info.data.get("functions", [])
        if timeout is not None and not any(entry.where in ("process", "async") for entry in functions):
            raise ValueError("want null")  # nothing here has a limit
        return timeout


class RolloutConfig(Section):
    """How completions are sampled."""

    engine: Literal["hf", "vllm", "server"] = Field(
        "hf",
        description="hf: the policy samples from itself; vllm: an engine in this process, on the same GPU; server: "
        "running `vllm serve` processes",
    )
    num_generations: Int = Field(8, ge=2, description="completions per prompt, the group")
    max_completion_length: Int = Field(1024, ge=1, description="tokens; KV cache and bins grow with it")
    temperature: Float = Field(1.0, gt=0, description="of sampling and of the policy's log-probs")
    top_p: Float = Field(1.0, gt=0, le=1, description="nucleus; 1 = off")
    top_k: Int = Field(0, ge=0, description="0 = off")
    min_p: Float = Field(0.0, ge=0, lt=1, description="0 = off")
    allow_truncated_sampling: bool = Field(
        False, description="permit top_p, top_k, min_p in training (sampler and policy then differ)"
    )
    max_sequences: Int = Field(256, ge=1, description="sequences decoded at once; KV cache grows with it")
    kv_cache: Annotated[float | str, BeforeValidator(_no_bool)] = Field(
        "auto",
        description="vllm: memory of the KV cache while sampling; a size (24GB), a share of the GPU (0.4), or auto: "
        "what the rest leaves",
    )
    share_weights: bool | Literal["auto"] = Field(
        "auto",
        description="vllm: frozen base weights exist once on the GPU, the trainer sees the engine's; auto: where the "
        "model allows it, and what prevents it is printed; true: or refuse",
    )
    cuda_graphs: bool = Field(True, description="vllm: faster decoding; about a minute more at start")
    servers: list[str] = Field(default_factory=list, description="server: http://host:port of each `vllm serve`")
    server_adapter_dir: str | None = Field(
        None, description="server: folder that trainer and servers both see, for adapters; null = in output_dir"
    )
    server_timeout_s: Float = Field(600, gt=0, description="server: seconds a request may take before it is retried")

    @field_validator("kv_cache")
    @classmethod
    def _size_or_share(cls, value: float | str) -> float | str:
        if value == "auto" or (isinstance(value, float) and 0 < value < 1):
            return value
        try:
            if parse_bytes(value) < 2**20:
                raise ValueError
        except ValueError:
            raise ValueError("want auto, a size like 24GB, or a share of the GPU between 0 and 1") from None
        return value


class ObjectiveConfig(Section):
    """The loss: a named recipe (a row of independent choices) and the knobs that override it."""

    recipe: Literal[tuple(RECIPES)] = Field("dapo", description="see grpo/algorithm/recipes.py")  # type: ignore[valid-type]
    beta: Float = Field(0.0, ge=0, description="weight of the KL to the reference; 0 = no reference, no pass")
    kl: Literal["k1", "k2", "k3", "k3_ratio"] = Field("k3_ratio", description="estimator of the KL")
    kl_in: Literal["loss", "reward"] = Field("loss", description="where beta · KL enters")
    epsilon: Float = Field(0.2, gt=0, description="ratio clipped below 1 − epsilon")
    epsilon_high: Float = Field(0.28, gt=0, description="ratio clipped above 1 + epsilon_high")
    delta: Float | None = Field(3.0, description="dual clip: bound of the ratio when A < 0; null = off")
    num_iterations: Int = Field(1, ge=1, description="optimizer steps on each batch of rollouts")
    scale_rewards: Literal["none", "group", "batch"] = Field("none", description="what advantages are divided by")
    zero_variance: Literal["skip", "drop", "refill", "keep"] = Field(
        "skip", description="groups whose rewards are all equal: skip their forward pass (same gradient), …"
    )
    max_refill_rounds: Int = Field(3, ge=1, description="refill: sampling rounds at most, then go on")
    importance_sampling_level: Literal["token", "sequence", "sequence_sum"] | None = Field(
        None, description="level of the ratio; null = the recipe's own"
    )
    denominator: Literal["sequence_mean", "token_mean", "constant", "sequence_sum", "sequence"] | None = Field(
        None, description="what token losses are divided by; null = the recipe's own"
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        "sum_then_normalize", description="several rewards: sum first or normalise each first"
    )
    mask_truncated_completions: bool = Field(False, description="cut-off completions leave loss and baseline")
    top_entropy_quantile: Float = Field(1.0, gt=0, le=1, description="train on this share of tokens, highest entropy")
    entropy_coef: Float = Field(0.0, description="weight of the entropy bonus; not 0 = exact but slower head")
    sapo_temperature_pos: Float = Field(1.0, gt=0, description="sapo, A > 0")
    sapo_temperature_neg: Float = Field(1.05, gt=0, description="sapo, A ≤ 0")
    sampler_correction: Literal["none", "truncate", "mask", "bypass"] | None = Field(
        None, description="importance weight policy / sampler; null = none for hf, which is the policy itself"
    )
    correction_level: Literal["token", "sequence_mean", "sequence_sum"] = Field("token", description="of that weight")
    correction_max: Float | None = Field(None, gt=0, description="cap, or upper end of the band; null = by level")
    correction_min: Float | None = Field(None, ge=0, description="lower end of the band; null = by level")
    off_policy_mask_threshold: Float | None = Field(
        None, description="drop a completion with A < 0 and mean(sampler − policy log-prob) above this"
    )


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "adamw",
        description="adamw: torch, state in the weights' dtype, 8 B per fp32 weight; adamw_8bit: 2.03 B (tensors under "
        "4,096 elements 8 B); paged_…: bitsandbytes, large states may move to host memory, needs CUDA",
    )
    learning_rate: Float = Field(1e-5, gt=0)
    weight_decay: Float = Field(0.0, ge=0)
    adam_beta1: Float = Field(0.9, ge=0, lt=1)
    adam_beta2: Float = Field(0.999, ge=0, lt=1)
    adam_epsilon: Float = Field(1e-8, gt=0)
    max_grad_norm: Float = Field(1.0, gt=0, description="gradient norm clipped to this")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    warmup_ratio: Float = Field(0.0, ge=0, le=1, description="share of max_steps with a rising rate")
    min_lr_ratio: Float = Field(0.0, ge=0, le=1, description="linear, cosine: end at this share of the rate")


class UpdateConfig(Section):
    """How the policy update fits into memory. No knob here changes the gradient."""

    max_tokens_per_batch: Annotated[int | Literal["auto"], BeforeValidator(_tokens_or_auto)] = Field(
        16384, description="tokens in one packed bin; sets the update's peak; auto: the most that fit, see grpo plan"
    )
    activation_checkpointing: Literal["none", "recompute", "offload"] = Field(
        "recompute",
        description="recompute: keep only layer inputs; offload: keep them in pinned host memory "
        "((layers − 1) × tokens × hidden_size elements), one layer's working set on the GPU",
    )
    share_prompts: bool = Field(
        False, description="run a group's prompt once for all its completions in a bin; fewer tokens, less memory"
    )
    fused_kernels: bool | Literal["auto"] = Field(
        "auto",
        description="fused norms, RoPE, MLP and projections, swapped into this model instance; auto: where the model "
        "allows it, and what is left alone is printed; true: or refuse; false: leave the model as it is",
    )
    tiled_mlp: bool = Field(
        False, description="MLP in slices of about hidden_size tokens: less memory, about 1.3 × time in the MLP"
    )
    keep_attention: bool = Field(
        False,
        description="with offload on CUDA: attention outputs of long documents wait in host memory too, not computed "
        "again; twice the host memory, some % faster at 20K tokens, more beyond",
    )
    logprob_chunk_mb: Int = Field(512, ge=1, description="MiB of the logit tile in the LM head")


class EvaluationConfig(Section):
    """Held-out evaluation on data.eval."""

    every_steps: Int = Field(50, ge=0, description="0 = only before and after training")
    num_generations: Int = Field(1, ge=1, description="completions per prompt")
    temperature: Float = Field(0.0, ge=0, description="0 = greedy")
    pass_threshold: Float = Field(1.0, description="a completion is right when its reward reaches this")


class CheckpointConfig(Section):
    """Exact resume points in output_dir/checkpoints."""

    every_steps: Int = Field(50, ge=0, description="0 = only at the end")
    keep: Int = Field(2, ge=1, description="newest checkpoints kept on disk")


class LoggingConfig(Section):
    """What is written and shown. metrics.jsonl and report.html are always written."""

    every_steps: Int = Field(1, ge=1, description="steps between progress lines")
    trackers: list[Literal["wandb"]] = Field(default_factory=list, description="in addition to the local files")
    completions: Int = Field(3, ge=0, description="sample completions shown at the end")
    rollouts_every_steps: Int = Field(1, ge=0, description="steps between rollout files, the first always; 0 = none")


class RunConfig(Section):
    """What a GRPO run and a supervised run share."""

    output_dir: str = Field("runs/grpo", description="run folder")
    seed: Int = Field(0, ge=0, lt=2**31)
    max_steps: Int = Field(200, ge=1, description="optimizer steps")
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig | None = None
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    update: UpdateConfig = UpdateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    _source: ClassVar[str] = "config"
    _translations: tuple[str, ...] = PrivateAttr(default=())

    def __init__(self, **values: Any) -> None:
        source = values.pop("_source_name", "") or self._source
        sections, notes, problems = config_reading.nested(type(self), values)
        error: ValidationError | None = None
        try:
            super().__init__(**sections)
        except ValidationError as invalid:
            error = invalid
        if error is not None:
            problems += [config_reading.line(type(self), detail) for detail in error.errors()]
        elif not problems:
            problems += self.contradictions()
        if problems:
            raise InputError(*[f"{source}: {line}" for line in problems])
        self._translations = tuple(notes)

    @property
    def translations(self) -> tuple[str, ...]:
        """Names of another trainer that were understood, one line each; the run prints them once."""
        return self._translations

    def contradictions(self) -> list[str]:
        """Settings that are each possible but not together."""
        problems = []
        if self.model.trust_remote_code and self.model.revision is None:
            problems.append("model.trust_remote_code is true (want model.revision pinned beside it)")
        if self.model.load_in_4bit and self.adapter is None:
            problems.append("model.load_in_4bit is true (want an adapter section: 4-bit weights are not trained)")
        return problems + self._memory_contradictions()

    def _memory_contradictions(self) -> list[str]:
        problems = []
        if self.update.keep_attention and self.update.activation_checkpointing != "offload":
            problems.append(
                f"update.keep_attention is true with update.activation_checkpointing "
                f"{self.update.activation_checkpointing!r} (want offload)"
            )
        if self.update.keep_attention and not self.update.fused_kernels:
            problems.append(
                "update.keep_attention is true (want update.fused_kernels: auto or true, of which it is a part)"
            )
        if self.update.tiled_mlp and not self.update.fused_kernels:
            problems.append("update.tiled_mlp is true (want update.fused_kernels: auto or true, of which it is a part)")
        if self.update.fused_kernels is True and self.adapter is not None and self.adapter.dropout > 0:
            problems.append(
                f"update.fused_kernels is true beside adapter.dropout = {self.adapter.dropout} (want dropout 0, or "
                "auto: projections with dropout then keep their own forward)"
            )
        if self.update.tiled_mlp and self.adapter is None:
            problems.append("update.tiled_mlp is true (want an adapter section: full fine-tuning keeps stock MLPs)")
        if self.update.tiled_mlp and self.adapter is not None and self.adapter.dropout > 0:
            problems.append(
                f"update.tiled_mlp is true beside adapter.dropout = {self.adapter.dropout} (want dropout 0: a slice's "
                "recomputation would draw another mask)"
            )
        if self.optimizer.name.startswith("paged_") and self.model.device.startswith("cpu"):
            problems.append(
                f"optimizer.name is {self.optimizer.name!r} with model.device {self.model.device!r} "
                f"(want {self.optimizer.name.removeprefix('paged_')}: paged state needs CUDA)"
            )
        return problems

    def to_yaml(self) -> str:
        """The resolved configuration: every knob with its value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read YAML, apply `section.key=value` overrides, validate.

        Raises:
            InputError: one line per problem, each naming the file and the key.
        """
        values = config_reading.read_yaml(Path(path))
        for override in overrides:
            config_reading.apply_override(values, override)
        return cls(**values, _source_name=str(path))


class GRPOConfig(RunConfig):
    """A GRPO run. `GRPOConfig(num_generations=8, learning_rate=1e-6)` or by sections, or both."""

    prompts_per_step: Int = Field(16, ge=1, description="groups in one optimizer step (all ranks)")
    rewards: RewardsConfig = RewardsConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()

    _source: ClassVar[str] = "GRPOConfig"

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)

    def contradictions(self) -> list[str]:
        """Settings that are each possible but not together."""
        problems = super().contradictions()
        rollout = self.rollout
        if self.rewards.functions and self.rewards.weights is not None:
            problems.append("rewards.weights is given beside rewards.functions (want each function's own weight)")
        cache = self.rewards.soft_overlong_cache
        if cache is not None and cache > rollout.max_completion_length:
            problems.append(
                f"rewards.soft_overlong_cache is {cache} (want at most rollout.max_completion_length = "
                f"{rollout.max_completion_length})"
            )
        truncated = [
            f"rollout.{name} is {getattr(rollout, name)}"
            for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0))
            if getattr(rollout, name) != off
        ]
        if truncated and not rollout.allow_truncated_sampling:
            problems.append(
                f"{', '.join(truncated)} (the sampler then differs from the policy; want "
                "rollout.allow_truncated_sampling: true, or the knob off)"
            )
        return problems + _engine_contradictions(self) + check_objective(self.objective.recipe, **objective_knobs(self))


class SFTConfig(RunConfig):
    """A supervised run: the cold-start stage before GRPO, completion-only loss."""

    output_dir: str = Field("runs/sft", description="run folder")
    examples_per_step: Int = Field(64, ge=1, description="examples in one optimizer step")
    max_completion_length: Int = Field(1024, ge=1, description="tokens; a longer answer is an error")

    _source: ClassVar[str] = "SFTConfig"

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)


def _engine_contradictions(config: GRPOConfig) -> list[str]:
    rollout = config.rollout
    problems = []
    if rollout.engine == "server" and not rollout.servers:
        problems.append('rollout.servers is empty beside rollout.engine "server" (want http://host:port of each)')
    if rollout.engine != "server" and rollout.servers:
        problems.append(f'rollout.servers is given beside rollout.engine {rollout.engine!r} (want "server")')
    if rollout.engine == "server" and config.adapter is None:
        problems.append(
            'rollout.engine is "server" without an adapter section (want one: only adapters are sent to servers)'
        )
    if rollout.engine != "hf" and config.adapter is not None and config.adapter.r > MAX_ENGINE_RANK:
        problems.append(f"adapter.r is {config.adapter.r} (want at most {MAX_ENGINE_RANK}: vLLM serves no larger one)")
    temperatures = {"rollout": rollout.temperature, "evaluation": config.evaluation.temperature}
    for section, value in temperatures.items():
        if rollout.engine != "hf" and value != 0 and not 0.01 <= value <= 2:
            problems.append(f"{section}.temperature is {value} (want 0.01 to 2 with vLLM, which changes smaller ones)")
    if rollout.engine == "vllm" and config.model.device.startswith("cpu"):
        problems.append('rollout.engine is "vllm" with model.device "cpu" (want hf, or a CUDA device)')
    if rollout.engine == "vllm" and rollout.share_weights is True and config.adapter is None:
        problems.append(
            "rollout.share_weights is true without an adapter section (want auto: a trained base is copied)"
        )
    return problems


def objective_knobs(config: GRPOConfig) -> dict[str, Any]:
    """The knobs of the objective with the sampler's correction decided: off when the policy samples from itself."""
    knobs = config.objective.model_dump(exclude={"recipe"})
    if knobs["sampler_correction"] is None:
        knobs["sampler_correction"] = "none" if config.rollout.engine == "hf" else "truncate"
    return knobs
