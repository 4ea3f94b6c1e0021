"""Names, defaults, refusals: every message is compared as a user would read it."""

import pytest
import yaml

from grpo.config import GRPOConfig, SFTConfig, objective_knobs
from grpo.config_reading import flat_names, known_paths
from grpo.errors import InputError

SKETCH = """
output_dir: runs/countdown
seed: 0
max_steps: 200
prompts_per_step: 16
model:      {name_or_path: some/model, dtype: bfloat16, load_in_4bit: false, trust_remote_code: false, revision: null}
adapter:    {r: 16, alpha: 32, dropout: 0.0, target_modules: all-linear}
data:       {train: path, eval: null, prompt_column: prompt, system_prompt: null, max_prompt_length: 1024, overlong_prompt: error}
rewards:
  - {function: "rewards:math_accuracy", weight: 1.0}
rollout:    {engine: hf, num_generations: 8, max_completion_length: 1024, temperature: 1.0, top_p: 1.0, top_k: 0}
objective:  {recipe: dapo, beta: 0.0, kl: k3_ratio, epsilon: 0.2, epsilon_high: 0.28, delta: 3.0, num_iterations: 1, scale_rewards: none, zero_variance: skip}
optimizer:  {name: adamw, learning_rate: 1.0e-5, weight_decay: 0.0, max_grad_norm: 1.0, lr_scheduler_type: constant, warmup_ratio: 0.0}
update:     {max_tokens_per_batch: 16384, activation_checkpointing: recompute, share_prompts: false}
evaluation: {every_steps: 50, num_generations: 1, temperature: 0.0}
checkpoint: {every_steps: 50, keep: 2}
logging:    {every_steps: 1, trackers: [], completions: 3}
"""


def from_text(tmp_path, text, *overrides, cls=GRPOConfig):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return cls.from_file(path, overrides)


def lines_of(tmp_path, text, *overrides, cls=GRPOConfig):
    with pytest.raises(InputError) as error:
        from_text(tmp_path, text, *overrides, cls=cls)
    return [line.replace(f"{tmp_path}/", "") for line in error.value.lines]


def test_the_documented_sketch_is_the_default(tmp_path):
    config = from_text(tmp_path, SKETCH)
    wanted = GRPOConfig(
        output_dir="runs/countdown",
        model={"name_or_path": "some/model"},
        adapter={},
        data={"train": "path"},
        rewards=[{"function": "rewards:math_accuracy"}],
    )
    assert config == wanted


def test_resolved_yaml_reads_back_equal(tmp_path):
    config = from_text(tmp_path, SKETCH, "objective.delta=null", "optimizer.learning_rate=5e-6")
    assert config.objective.delta is None
    assert config.optimizer.learning_rate == 5e-6
    assert from_text(tmp_path, config.to_yaml()) == config


def test_overrides_reach_missing_sections_and_lists(tmp_path):
    config = from_text(
        tmp_path, "max_steps: 3", "adapter.r=4", "rewards=[m:f]", "data.eval=e.jsonl", "rewards.on_error=none"
    )
    assert config.adapter.r == 4
    assert config.rewards.functions[0].function == "m:f"
    assert (config.data.eval, config.rewards.on_error) == ("e.jsonl", "none")


def test_flat_names_are_the_sections():
    flat = GRPOConfig(
        num_generations=4,
        learning_rate=1e-4,
        beta=0.1,
        max_completion_length=7,
        save_steps=3,
        logging_steps=2,
        lora_r=2,
    )
    nested = GRPOConfig(
        rollout={"num_generations": 4, "max_completion_length": 7},
        optimizer={"learning_rate": 1e-4},
        objective={"beta": 0.1},
        checkpoint={"every_steps": 3},
        logging={"every_steps": 2},
        adapter={"r": 2},
    )
    assert flat == nested


def test_every_flat_name_is_unique_and_has_a_path():
    for cls in (GRPOConfig, SFTConfig):
        names = flat_names(cls)
        assert len(set(names.values())) == len(names)
        assert set(names.values()) <= set(known_paths(cls))
        assert set(known_paths(cls)) == set(names.values()) | set(cls.model_fields) - {
            path.split(".")[0] for path in names.values()
        }


def test_every_knob_says_what_it_is():
    for cls in (GRPOConfig, SFTConfig):
        for section in cls.model_fields.values():
            for name, field in getattr(section.annotation, "model_fields", {}).items():
                assert (
                    field.description
                    or name in ("function", "weight", "learning_rate", "weight_decay")
                    or name.startswith("adam_")
                ), name


REFUSED = {
    "update.learning_rte: 1": "config.yaml: update.learning_rte is unknown (did you mean optimizer.learning_rate?)",
    "rollout.num_generation: 4": "config.yaml: rollout.num_generation is unknown (did you mean rollout.num_generations?)",
    "rolout: {}": "config.yaml: rolout is unknown (did you mean rollout?)",
    "zzzzqqq: 1": "config.yaml: zzzzqqq is unknown",
    "rollout.num_generations: 1": "config.yaml: rollout.num_generations is 1 (want at least 2)",
    "rollout.num_generations: eight": "config.yaml: rollout.num_generations is 'eight' (want a whole number)",
    "rollout.num_generations: 2.5": "config.yaml: rollout.num_generations is 2.5 (want a whole number)",
    "rollout.num_generations: true": "config.yaml: rollout.num_generations is True (want a number)",
    "optimizer.learning_rate: 0": "config.yaml: optimizer.learning_rate is 0 (want more than 0)",
    "optimizer.learning_rate: .nan": "config.yaml: optimizer.learning_rate is nan (want more than 0)",
    "optimizer.learning_rate: .inf": "config.yaml: optimizer.learning_rate is inf (want a finite number)",
    "optimizer.learning_rate: fast": "config.yaml: optimizer.learning_rate is 'fast' (want a number)",
    "data.train: no": "config.yaml: data.train is False (want text)",
    "objective.recipe: ppo": "config.yaml: objective.recipe is 'ppo' (want one of ",
    "model.dtype: float16": "config.yaml: model.dtype is 'float16' (want one of 'bfloat16' or 'float32')",
    "rewards.timeout: 10": "config.yaml: rewards.timeout is 10 (want null)",
    "rewards: [{weight: 2}]": "config.yaml: rewards[0].function is missing (want a value)",
    "max_steps: 0": "config.yaml: max_steps is 0 (want at least 1)",
    "model: seven": "config.yaml: model is 'seven' (want a section with keys)",
    "model.trust_remote_code: true": "config.yaml: model.trust_remote_code is true (want model.revision pinned beside it)",
    "model.load_in_4bit: true": "config.yaml: model.load_in_4bit is true (want an adapter section: 4-bit weights are not trained)",
    "optimizer.name: adafactor": "config.yaml: optimizer.name is 'adafactor' (want one of 'adamw', 'adamw_8bit', ",
    "adapter.dtype: float16": "config.yaml: adapter.dtype is 'float16' (want one of 'float32' or 'bfloat16')",
    "update.activation_checkpointing: cpu": "config.yaml: update.activation_checkpointing is 'cpu' (want one of 'none', ",
    "update.share_prompts: 3": "config.yaml: update.share_prompts is 3 (want ",
    "update.tiled_mlp: true": "config.yaml: update.tiled_mlp is true (want an adapter section: full fine-tuning keeps",
    "rollout.top_p: 0.9": "config.yaml: rollout.top_p is 0.9 (the sampler then differs from the policy; want "
    "rollout.allow_truncated_sampling: true, or the knob off)",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_in_one_line(tmp_path, text):
    path, _, value = text.partition(": ")
    section, _, leaf = path.partition(".")
    lines = lines_of(tmp_path, f"{section}: {{{leaf}: {value}}}" if leaf else text)
    assert len(lines) == 1
    assert lines[0].startswith(REFUSED[text])


def test_problems_are_collected():
    with pytest.raises(InputError) as error:
        GRPOConfig(max_steps=0, num_generations=1, nonsense=3)
    assert len(error.value.lines) == 3
    assert str(error.value).count("\n") == 2


def test_at_most_ten_lines_are_shown():
    with pytest.raises(InputError) as error:
        GRPOConfig(**{f"nonsense_{index}": 1 for index in range(14)})
    assert str(error.value).splitlines()[-1] == "and 4 more"
    assert len(str(error.value).splitlines()) == 11


def test_contradictions_of_the_objective_reach_the_user():
    with pytest.raises(InputError, match="objective.delta is 1.2"):
        GRPOConfig(delta=1.2)


def test_yaml_itself(tmp_path):
    assert "the key 'seed' stands twice" in lines_of(tmp_path, "seed: 1\nseed: 2")[0]
    assert "not valid YAML (line 2)" in lines_of(tmp_path, "model: {\nseed: ]")[0]
    assert "holds list (want sections" in lines_of(tmp_path, "- a\n- b")[0]
    assert "has no value (want section.key=value)" in lines_of(tmp_path, "", "seed")[0]
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file"):
        GRPOConfig.from_file(tmp_path / "nowhere.yaml")


def test_loading_runs_no_code(tmp_path):
    lines = lines_of(tmp_path, "seed: !!python/object/apply:os.system ['true']")
    assert "not valid YAML" in lines[0]


def test_names_of_trl():
    config = GRPOConfig(
        loss_type="dr_grpo",
        per_device_train_batch_size=16,
        gradient_accumulation_steps=4,
        num_generations=8,
        bf16=True,
        gradient_checkpointing=False,
        scale_rewards=True,
        use_vllm=False,
        report_to="none",
        log_completions=True,
        use_bias_correction_kl=False,
    )
    assert config.objective.recipe == "dr_grpo"
    assert config.prompts_per_step == 8
    assert config.model.dtype == "bfloat16"
    assert config.update.activation_checkpointing == "none"
    assert (config.objective.scale_rewards, config.objective.kl) == ("group", "k3")
    assert config.logging.trackers == []
    assert any(line == "loss_type is understood as recipe: dr_grpo" for line in config.translations)


def test_names_of_trls_supervised_trainer():
    config = SFTConfig(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=6,
        bf16=True,
        gradient_checkpointing=True,
        optim="adamw_torch",
        report_to="none",
        packing=True,
        completion_only_loss=True,
        max_length=None,
    )
    assert config.examples_per_step == 24
    assert (config.model.dtype, config.optimizer.name) == ("bfloat16", "adamw")
    assert config.update.activation_checkpointing == "recompute"
    assert config.logging.trackers == []
    wanted = "per_device_train_batch_size × gradient_accumulation_steps is understood as examples_per_step: 24"
    assert wanted in config.translations
    assert SFTConfig(gradient_accumulation_steps=3).examples_per_step == 24  # theirs is 8 a device


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"max_length": 512}, "max_length is 512 (use data.max_prompt_length and max_completion_length)"),
        ({"packing": False}, "packing is False (examples always share bins"),
        ({"completion_only_loss": False}, "completion_only_loss is False (the loss is on the completion only"),
        ({"assistant_only_loss": True}, "assistant_only_loss is True (use rows of a prompt"),
        ({"dataset_text_field": "text"}, "dataset_text_field is 'text' (use columns prompt and completion)"),
        ({"num_train_epochs": 1}, "num_train_epochs is 1 (use max_steps)"),
        ({"loss_type": "nll"}, "loss_type is unknown"),
        ({"per_device_train_batch_size": 2, "examples_per_step": 4}, "and examples_per_step are both given"),
    ],
)
def test_names_of_trls_supervised_trainer_refused(values, line):
    with pytest.raises(InputError) as error:
        SFTConfig(**values)
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("adamw_torch", "adamw"),
        ("adamw_torch_fused", "adamw"),
        ("adamw_8bit", "adamw_8bit"),
        ("adamw_bnb_8bit", "adamw_8bit"),
        ("paged_adamw_32bit", "paged_adamw"),
        ("paged_adamw_8bit", "paged_adamw_8bit"),
    ],
)
def test_optimizers_of_trl(theirs, ours):
    config = GRPOConfig(optim=theirs)
    assert config.optimizer.name == ours
    assert config.translations == (() if theirs == ours else (f"optim {theirs} is understood as {ours}",))


LORA = {"r": 4}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"adapter": LORA, "tiled_mlp": True, "fused_kernels": False}, "update.tiled_mlp is true (want update.fused_"),
        ({"tiled_mlp": True}, "update.tiled_mlp is true (want an adapter section"),
        ({"adapter": LORA, "lora_dropout": 0.1, "tiled_mlp": True}, "beside adapter.dropout = 0.1 (want dropout 0"),
        ({"optim": "paged_adamw", "device": "cpu"}, "optimizer.name is 'paged_adamw' with model.device 'cpu' (want adamw:"),
        ({"optim": "paged_adamw_8bit", "device": "cpu"}, "'paged_adamw_8bit' with model.device 'cpu' (want adamw_8bit:"),
    ],
)  # fmt: skip
def test_memory_knobs_that_contradict(values, line):
    with pytest.raises(InputError) as error:
        GRPOConfig(**values)
    assert len(error.value.lines) == 1
    assert line in error.value.lines[0]


def test_memory_knobs_that_go_together():
    config = GRPOConfig(adapter={"r": 4, "dropout": 0.1}, lora_dtype="bfloat16", optim="paged_adamw_8bit")
    assert (config.adapter.dtype, config.model.allow_4bit_moe) == ("bfloat16", False)
    assert GRPOConfig(adapter=LORA, tiled_mlp=True, activation_checkpointing="offload").update.tiled_mlp
    assert GRPOConfig(share_prompts=True, fused_kernels=False).update.share_prompts
    assert GRPOConfig(optim="adamw_8bit", device="cpu").optimizer.name == "adamw_8bit"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"engine": "server", "adapter": LORA}, 'rollout.servers is empty beside rollout.engine "server"'),
        ({"engine": "vllm", "servers": ["http://a:1"]}, "rollout.servers is given beside rollout.engine 'vllm'"),
        ({"engine": "server", "servers": ["http://a:1"]}, "without an adapter section"),
        ({"engine": "vllm", "device": "cpu"}, 'rollout.engine is "vllm" with model.device "cpu"'),
        ({"engine": "vllm", "share_weights": True}, "rollout.share_weights is true without an adapter section"),
        ({"engine": "vllm", "adapter": {"r": 513}}, "adapter.r is 513 (want at most 512"),
        ({"engine": "vllm", "temperature": 0.001}, "rollout.temperature is 0.001 (want 0.01 to 2"),
        ({"engine": "vllm", "temperature_eval": 2.5}, "evaluation.temperature is 2.5 (want 0.01 to 2"),
        ({"kv_cache": "24XB"}, "rollout.kv_cache is '24XB' (want auto, a size like 24GB, or a share of the GPU"),
        ({"kv_cache": 1.0}, "rollout.kv_cache is 1.0 (want auto, a size like 24GB, or a share of the GPU"),
        ({"kv_cache": True}, "rollout.kv_cache is True"),
    ],
)
def test_engines_refuse_what_they_cannot_do(values, line):
    with pytest.raises(InputError) as error:
        GRPOConfig(**values)
    assert line in str(error.value)


def test_engines_by_trls_names():
    assert GRPOConfig(use_vllm=True).rollout.engine == "vllm"
    assert GRPOConfig(use_vllm=False).rollout.engine == "hf"
    config = GRPOConfig(use_vllm=True, vllm_mode="server", vllm_server_base_url="http://127.0.0.1:8000", adapter=LORA)
    assert (config.rollout.engine, config.rollout.servers) == ("server", ["http://127.0.0.1:8000"])
    assert objective_knobs(config)["sampler_correction"] == "truncate"
    assert objective_knobs(GRPOConfig())["sampler_correction"] == "none"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"use_vllm": True, "vllm_mode": "remote"}, "vllm_mode is 'remote' (want colocate or server)"),
        ({"vllm_gpu_memory_utilization": 0.3}, "vllm_gpu_memory_utilization is 0.3 (use rollout.kv_cache"),
        ({"steps_per_generation": 4}, "steps_per_generation is 4"),
        ({"num_train_epochs": 3}, "num_train_epochs is 3 (use max_steps)"),
        ({"per_device_train_batch_size": 3}, "is 3 completions (want a multiple of num_generations = 8)"),
        ({"loss_type": "grpo", "recipe": "dapo"}, "loss_type and recipe are both given"),
        ({"learning_rate": 1e-3, "optimizer": {"learning_rate": 1e-4}}, "learning_rate is given twice"),
    ],
)
def test_names_of_trl_refused(values, line):
    with pytest.raises(InputError) as error:
        GRPOConfig(**values)
    assert line in str(error.value)


def test_recipes_bring_their_own_defaults_and_the_user_wins():
    assert GRPOConfig(recipe="dapo").objective.epsilon_high == 0.28
    gspo = GRPOConfig(recipe="gspo").objective
    assert (gspo.epsilon, gspo.epsilon_high) == (3e-4, 4e-4)
    assert GRPOConfig(recipe="gspo", epsilon=0.1).objective.epsilon == 0.1
    assert yaml.safe_load(GRPOConfig(recipe="cispo").to_yaml())["objective"]["epsilon_high"] == 5.0


def test_the_supervised_stage_has_no_rollout_section():
    with pytest.raises(InputError, match="num_generations is unknown"):
        SFTConfig(num_generations=8)
    assert SFTConfig(learning_rate=1e-3).optimizer.learning_rate == 1e-3
