"""Against the loss, weights and advantages of TRL 1.16 itself, on the same tensors. Skipped when TRL is absent.

Its trainer's own methods run; only the model's forward pass, generation and reward calls are replaced by given
tensors. One process, one accumulation step. Where we differ by decision, the last tests say so.
"""

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from grpo.algorithm import combine_metrics, group_advantages, policy_loss
from tests.algorithm.cases import make_case, run, worst
from tests.algorithm.groups import scored
from tests.tolerances import LOSS

trl = pytest.importorskip("trl", reason="trl is not installed (pip install trl==1.16.0)")
if not trl.__version__.startswith("1.16"):
    pytest.skip(f"trl is {trl.__version__} (want 1.16)", allow_module_level=True)

from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.rloo_trainer import RLOOTrainer  # noqa: E402

TOLERANCE = LOSS["float32"]
TRL_NAME = {"gspo": "grpo"}
DTYPES = [torch.float32, torch.float64]


class Accelerator:
    """One process."""

    device = torch.device("cpu")
    num_processes = 1
    process_index = 0
    sync_gradients = True

    def gather(self, value):
        return value

    gather_for_metrics = gather

    def reduce(self, value, reduction):
        return value

    def pad_across_processes(self, value, dim, pad_index):
        return value

    def unwrap_model(self, model):
        return model


def padded(values, lengths, fill=0.0):
    return torch.nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True, padding_value=fill)


def bare(cls, **attributes):
    """A trainer without a model: its methods, and the attributes that they read."""
    trainer = object.__new__(cls)
    args = {
        "delta": 3.0, "use_bias_correction_kl": True, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
        "steps_per_generation": 1, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 64,
        "gradient_checkpointing_kwargs": None, "report_to": [],
    }  # fmt: skip
    args.update(attributes.pop("args", {}))
    defaults = {
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False), "accelerator": Accelerator(),
        "args": SimpleNamespace(**args), "top_entropy_quantile": 1.0, "beta": 0.0, "epsilon_low": 0.2,
        "epsilon_high": 0.28, "importance_sampling_level": "token", "off_policy_mask_threshold": None,
        "use_vllm": False, "vllm_importance_sampling_correction": False, "current_gradient_accumulation_steps": 1,
        "max_completion_length": 17, "_entropy_bonus_enabled": False, "use_adaptive_entropy": False,
        "entropy_coef": 0.0, "aux_loss_enabled": False, "_metrics": {"train": defaultdict(list)},
    }  # fmt: skip
    for name, value in {**defaults, **attributes}.items():
        setattr(trainer, name, value)
    return trainer


def trl_advantages(case):
    """[B] where each completion has one advantage, else [B, T]."""
    rows = case.advantages.split(case.lengths)
    one_each = all(bool((row == row[0]).all()) for row in rows)
    return torch.stack([row[0] for row in rows]) if one_each else padded(case.advantages, case.lengths)


def trl_loss(recipe, case, *, weights=None, **attributes):
    """TRL's loss, ∂/∂ℓ, ∂/∂H [T] and metrics. `weights` [B, T] or [B, 1]: its importance_sampling_ratio."""
    sequence = recipe in ("gspo", "luspo")
    trainer = bare(
        GRPOTrainer,
        loss_type=TRL_NAME.get(recipe, recipe.removeprefix("reinforce_pp") or "dapo"),
        **{"importance_sampling_level": "sequence" if sequence else "token", **attributes},
    )
    logprobs, entropy = case.logprobs.clone().requires_grad_(), case.entropy.clone().requires_grad_()
    everywhere = padded(torch.ones(len(case.mask), dtype=torch.int64), case.lengths)
    pads = [padded(value, case.lengths) for value in (logprobs, entropy)]
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (pads[0], pads[1], None)
    inputs = {
        "prompt_ids": everywhere[:, :1], "prompt_mask": everywhere[:, :1], "completion_ids": everywhere,
        "completion_mask": everywhere, "tool_mask": padded(case.mask.long(), case.lengths),
        "advantages": trl_advantages(case), "old_per_token_logps": padded(case.old, case.lengths),
        "ref_per_token_logps": padded(case.reference, case.lengths), "num_items_in_batch": case.mask.sum(),
    }  # fmt: skip
    if attributes.get("use_vllm"):
        inputs["sampling_per_token_logps"] = padded(case.sampler, case.lengths)
        inputs["importance_sampling_ratio"] = weights
    if case.old is case.logprobs:
        del inputs["old_per_token_logps"]
    loss = trainer._compute_loss(None, inputs)
    gradients = torch.autograd.grad(loss, [logprobs, entropy], allow_unused=True)
    zero = torch.zeros_like(logprobs)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), *(zero if g is None else g for g in gradients), metrics


def full_rows(seed, drift=0.3):
    """A case in which no row is fully masked."""
    case = make_case(seed, [4, 9, 1, 6, 12], drift=drift)
    first = [0, *case.cu_seqlens.tolist()[1:-1]]
    mask = case.mask.clone()
    mask[first] = True
    return replace(case, mask=mask)


def same(ours, theirs):
    assert abs(float(ours[0]) - float(theirs[0])) <= TOLERANCE * max(1, abs(float(theirs[0])))
    assert worst(ours[1], theirs[1]) <= TOLERANCE and worst(ours[2], theirs[2]) <= TOLERANCE
    metrics = combine_metrics([ours[3]])
    shared = {name for name in theirs[3] if name in metrics}
    for name in shared:
        assert abs(metrics[name] - theirs[3][name]) <= TOLERANCE * max(1, abs(theirs[3][name])), name
    return shared


RECIPES = ["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo", "cispo", "sapo"]
OWN_EPSILON = {"gspo": (3e-4, 4e-4), "luspo": (3e-4, 4e-4), "cispo": (0.2, 5.0)}


def attributes_of(recipe, **more):
    low, high = OWN_EPSILON.get(recipe, (0.2, 0.28))
    return {"epsilon_low": low, "epsilon_high": high, **more}


def drift_of(recipe):
    return 0.001 if recipe in ("gspo", "luspo") else 0.3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [None, 3.0, 1.4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_equals_trl(recipe, delta, dtype):
    seen = set()
    for seed in range(10):
        case = full_rows(seed, drift_of(recipe)).to(dtype)
        theirs = trl_loss(recipe, case, **attributes_of(recipe, args={"delta": delta}))
        seen |= same(run(recipe, case, sampler_correction="none", delta=delta), theirs)
    assert "entropy" in seen
    if recipe not in ("sapo", "cispo"):
        assert {"clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_max", "clip_ratio/region_mean"} <= seen
    assert (recipe == "cispo") == ("cispo_clip_ratio" in seen)


@pytest.mark.parametrize("recipe", RECIPES)
def test_on_policy_loss_equals_trl(recipe):
    """Without old log-probs."""
    case = full_rows(1).to(torch.float32)
    theirs = trl_loss(recipe, replace(case, old=case.logprobs), **attributes_of(recipe))
    same(run(recipe, replace(case, old=None), sampler_correction="none"), theirs)


@pytest.mark.parametrize("estimator", ["k3", "k3_ratio"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_kl_equals_trl(recipe, estimator):
    if estimator == "k3_ratio" and recipe in ("gspo", "luspo"):
        pytest.skip("decision: the KL's ratio is each token's own (test_kl_ratio_of_sequences_is_where_we_differ)")
    for seed in range(5):
        case = full_rows(seed, drift_of(recipe)).to(torch.float32)
        args = {"use_bias_correction_kl": estimator == "k3_ratio"}
        theirs = trl_loss(recipe, case, **attributes_of(recipe, beta=0.3, args=args))
        ours = run(recipe, case, sampler_correction="none", beta=0.3, kl=estimator, reference_logprobs=case.reference)
        assert "kl" in same(ours, theirs)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("recipe", RECIPES)
def test_top_entropy_and_bonus_equal_trl(recipe, quantile):
    for seed in range(5):
        case = full_rows(seed, drift_of(recipe)).to(torch.float32)
        attributes = attributes_of(recipe, top_entropy_quantile=quantile, _entropy_bonus_enabled=True, entropy_coef=0.1)
        theirs = trl_loss(recipe, case, **attributes)
        ours = run(recipe, case, sampler_correction="none", top_entropy_quantile=quantile, entropy_coef=0.1)
        assert "policy_loss" in same(ours, theirs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_off_policy_mask_equals_trl(recipe):
    for seed in range(5):
        case = full_rows(seed, drift_of(recipe)).to(torch.float32)
        threshold = 0.2 * drift_of(recipe)  # between the means of rows, so that a sum would decide otherwise
        theirs = trl_loss(recipe, case, **attributes_of(recipe, off_policy_mask_threshold=threshold))
        same(
            run(
                recipe, replace(case, sampler=case.old), sampler_correction="none", off_policy_mask_threshold=threshold
            ),
            theirs,
        )


def test_token_advantages_equal_trl():
    """The loss of reinforce_pp: TRL takes advantages [B, T] of subclasses."""
    for seed in range(5):
        case = make_case(seed, [4, 9, 1, 6, 12], per_token=True).to(torch.float32)
        same(run("reinforce_pp", case, sampler_correction="none"), trl_loss("dapo", case))


# --- the whole way from rewards to the loss ------------------------------------------------------------------

MODES = {
    "token_truncate": ("truncate", "token", None, 2.0),
    "token_mask": ("mask", "token", 0.8, 1.3),
    "sequence_truncate": ("truncate", "sequence_sum", None, 3.0),
    "sequence_mask": ("mask", "sequence_sum", 0.5, 3.0),
}


def trl_inputs(case, rewards_per_func, weights, *, mode="token_truncate", band=(None, 2.0), missing=(), **attributes):
    """TRL's own batch (advantages, importance ratio) from given completions, rewards and log-probs."""
    lengths, num = case.lengths, len(case.lengths)
    trainer = bare(
        GRPOTrainer, use_vllm=True, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=band[1], vllm_importance_sampling_clip_min=band[0], num_iterations=1,
        environment_factories=None, environments=None, tools=None, pad_to_multiple_of=None, mask_truncated_completions=False,
        _tokenizer=SimpleNamespace(pad_token_id=0), num_generations=attributes.pop("num_generations"), ref_model=None,
        reward_weights=torch.tensor(weights), reward_funcs=[None] * len(weights),
        reward_func_names=[str(i) for i in range(len(weights))], _logs=defaultdict(list), _pending_extra_logs={},
        _pending_metrics={}, _is_vlm=False, log_multimodal=False, **attributes,
    )  # fmt: skip
    trainer._logs = {"prompt": [], "completion": [], "rewards": defaultdict(list), "advantages": [], "extra": {}}
    sampler = [row.tolist() for row in case.sampler.split(lengths)]
    for i, t in missing:
        sampler[i][t] = None
    ids = [[5] * n for n in lengths]
    trainer._generate = lambda prompts: ([[1]] * num, ids, None, [""] * num, sampler, {}, None, None)
    old = padded(case.old, lengths)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (old, None, None)
    trainer._calculate_rewards = lambda *args: torch.tensor(
        [[math.nan if v is None else v for v in row] for row in rewards_per_func]
    )
    output = trainer._generate_and_score_completions([{"prompt": "x"}] * num)
    return output, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def eight(seed):
    return make_case(seed, [4, 9, 1, 6, 12, 3, 5, 2], masked=False, noise=0.25).to(torch.float32)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mode", MODES)
def test_sampler_correction_equals_trl(mode, recipe):
    kind, level, low, high = MODES[mode]
    for seed in range(3):
        case = replace(eight(seed), logprobs=eight(seed).old + drift_of(recipe) * eight(seed).logprobs)
        missing = [(1, 2), (7, 0)]
        sampler = case.sampler.clone()
        for i, t in missing:
            sampler[case.cu_seqlens[i] + t] = math.nan
        fixed = {"num_generations": 8, "scale_rewards": "none", "multi_objective_aggregation": "sum_then_normalize"}
        batch, sampling = trl_inputs(case, [[1.0]] * 8, [1.0], mode=mode, band=(low, high), missing=missing, **fixed)
        attributes = attributes_of(recipe, use_vllm=True, vllm_importance_sampling_correction=True)
        theirs = trl_loss(recipe, case, weights=batch["importance_sampling_ratio"], **attributes)
        ours = run(
            recipe,
            replace(case, sampler=sampler),
            sampler_correction=kind,
            correction_level=level,
            correction_min=low,
            correction_max=high,
        )
        same(ours, theirs)
        metrics = combine_metrics([ours[3]])
        for name in ("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"):
            assert abs(metrics[name] - sampling[name]) <= 1e-6


TABLE = [  # rewards of two functions for two groups of four
    ([1.0, 0.2], [0.0, 0.5], [1.0, 0.1], [0.5, 0.9], [0.0, 0.3], [2.0, 0.4], [1.0, 0.8], [0.25, 0.0]),
    ([1.0, None], [0.0, 0.5], [1.0, 0.1], [0.5, None], [0.0, 0.3], [2.0, 0.4], [None, 0.8], [0.25, 0.0]),
    ([1.0, 0.2], [0.0, 0.2], [1.0, 0.2], [0.5, 0.2], [0.0, 0.3], [2.0, 0.4], [None, None], [0.25, 0.0]),
]


def rollouts_of(rows, weights):
    totals = [
        None if all(v is None for v in row) else sum(w * v for v, w in zip(row, weights, strict=True) if v is not None)
        for row in rows
    ]
    parts = {str(k): [[row[k] for row in rows[:4]], [row[k] for row in rows[4:]]] for k in range(2)}
    return scored([totals[:4], totals[4:]], parts=parts, weights={str(k): w for k, w in enumerate(weights)})


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("rows", TABLE)
def test_advantages_equal_trl(rows, scale, aggregation):
    batch, _ = trl_inputs(
        eight(0), rows, [1.0, 0.5], num_generations=4, scale_rewards=scale, multi_objective_aggregation=aggregation
    )
    ours = group_advantages(
        rollouts_of(rows, [1.0, 0.5]), recipe="dapo", scale_rewards=scale, multi_objective_aggregation=aggregation
    )
    flat = torch.tensor([0.0 if a is None else a for group in ours for a in group])  # outside: TRL trains it with A = 0
    assert worst(batch["advantages"], flat) <= TOLERANCE


def rloo_loss(case):
    logprobs = case.logprobs.clone().requires_grad_()
    trainer = bare(RLOOTrainer)
    pads = padded(logprobs, case.lengths), padded(case.entropy, case.lengths)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (*pads, None)
    everywhere = padded(torch.ones(len(case.mask), dtype=torch.int64), case.lengths)
    first = torch.tensor([0, *case.cu_seqlens.tolist()[1:-1]])
    inputs = {
        "prompt_ids": everywhere[:, :1], "prompt_mask": everywhere[:, :1], "completion_ids": everywhere,
        "completion_mask": padded(case.mask.long(), case.lengths), "advantages": case.advantages[first],
        "old_logps": torch.stack([(o * m).sum() for o, m in zip(*(v.split(case.lengths) for v in (case.old, case.mask)), strict=True)]),
    }  # fmt: skip
    loss = trainer._compute_loss(None, inputs)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0], torch.zeros_like(logprobs), metrics


@pytest.mark.parametrize("dtype", DTYPES)
def test_rloo_equals_trl(dtype):
    """RLOOTrainer has no dual clip."""
    seen = set()
    for seed in range(10):
        case = full_rows(seed, 0.1).to(dtype)
        seen |= same(run("rloo", case, sampler_correction="none", delta=None), rloo_loss(case))
    assert {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"} <= seen


# --- where we differ, by decision ----------------------------------------------------------------------------


def test_kl_ratio_of_sequences_is_where_we_differ():
    """TRL multiplies k3 by the sequence's ratio in gspo and luspo; ours stays the token's, as the estimator needs."""
    case = full_rows(0, 0.1).to(torch.float32)
    theirs = trl_loss("gspo", case, **attributes_of("gspo", beta=0.3))
    ours = run("gspo", case, sampler_correction="none", beta=0.3, reference_logprobs=case.reference)
    assert worst(ours[1], theirs[1]) > 1e-4


def test_fully_masked_rows_are_where_we_differ():
    """TRL counts a fully masked row in grpo's mean over completions; ours counts it nowhere."""
    case = full_rows(0).to(torch.float32)
    mask = case.mask.clone()
    mask[:4] = False
    case = replace(case, mask=mask)
    ours, theirs = run("grpo", case, sampler_correction="none"), trl_loss("grpo", case, **attributes_of("grpo"))
    assert worst(ours[1] * 4 / 5, theirs[1]) <= 1e-6


def test_equal_rewards_are_where_we_differ():
    """Totals that are equal but for the last digit: TRL's float32 std decides; ours is exactly 0."""
    rows = [[0.1, 0.2], [0.2, 0.1], [0.1, 0.2], [0.2, 0.1]] * 2
    batch, _ = trl_inputs(
        eight(0),
        rows,
        [1.0, 1.0],
        num_generations=4,
        scale_rewards="group",
        multi_objective_aggregation="sum_then_normalize",
    )
    assert batch["advantages"].abs().max() < 1e-3
    assert group_advantages(rollouts_of(rows, [1.0, 1.0]), recipe="dapo", scale_rewards="group") == [[0.0] * 4] * 2


def test_split_of_bnpo_is_where_we_differ():
    """TRL's bnpo averages micro-batch means; ours is the mean over the step whatever the split."""
    case = full_rows(0).to(torch.float32)
    halves = case.select([0, 1]), case.select([2, 3, 4])
    whole = run("bnpo", case, sampler_correction="none")[1]
    ours = torch.cat([run("bnpo", half, sampler_correction="none", totals=case.totals)[1] for half in halves])
    theirs = torch.cat([trl_loss("bnpo", half, current_gradient_accumulation_steps=2)[1] for half in halves])
    assert worst(ours, whole) <= 1e-6 and worst(theirs, whole) > 1e-3


def test_policy_loss_is_public_by_its_contract():
    loss, _ = policy_loss("dapo", torch.tensor([-1.0]), torch.tensor([2.0]), torch.tensor([0, 1]))
    assert float(loss) == -2.0
