"""Surgery: the same numbers with and without it, in every family, and nothing changed outside the one instance."""

import copy

import pytest
import torch
import transformers

from grpo.config import GRPOConfig
from grpo.errors import InputError
from grpo.model.policy import Policy
from grpo.model.surgery import _unread_mlps, patch
from grpo.trainer.build import build_policy
from tests.model.test_offload import adapted, bins, gradients
from tests.tiny import tiny_gpt2, tiny_model
from tests.tolerances import FUSED, relative_error

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"]
EAGER = {"gemma2": {"attn_implementation": "eager"}}


def mild(family, make=adapted, **options):
    """A model in which rounding does not grow from layer to layer, with an adapter of ordinary size."""
    size = {"size": 0.05} if make is adapted else {}
    return make(family, initializer_range=0.1, **size, **{**EAGER.get(family, {}), **options})


def both(family, dtype, make=adapted):
    """(stock, fused) log-probs and gradients of the same model."""
    results = []
    for fused in (False, True):
        policy = Policy(mild(family, make, dtype=dtype), fused_kernels=fused)
        found = gradients(policy, bins())
        with torch.no_grad(), policy.evaluating():
            logprobs = torch.cat([policy.logprobs(batch, 1.0).logprobs for batch in bins()])
        results.append((logprobs, found, policy))
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_of_the_families_is_fused_and_gives_the_same(family, dtype):
    (logprobs, stock, _), (fused_logprobs, fused, policy) = both(family, dtype)
    tolerance = FUSED[str(dtype).removeprefix("torch.")]
    assert relative_error(fused_logprobs, logprobs) < tolerance
    for name, wanted in stock.items():
        assert relative_error(fused[name], wanted) < tolerance, name
    assert all(change.done for change in policy.surgery.changes), policy.surgery.changes
    layers = len(policy.backbone.layers)
    kinds = [
        type(policy.backbone.get_submodule(c.path.removeprefix("model."))).__name__ for c in policy.surgery.changes
    ]
    for kind in ("Attention", "MLP"):
        assert sum(name.endswith(kind) for name in kinds) == layers
    norms = sum(type(m).__name__.endswith("RMSNorm") for m in policy.backbone.modules())
    assert sum(name.endswith("RMSNorm") for name in kinds) == norms > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_it_is_as_near_the_truth_as_the_stock_model(family):
    """Two roundings of one gradient differ from each other; what counts is how far each is from float64.

    Outside autocast peft takes the adapter's products in float32; ours are bfloat16, as under autocast.
    """
    exact = mild(family, dtype=torch.bfloat16).double()
    truth = gradients(Policy(exact, fused_kernels=False), bins())
    (_, stock, _), (_, fused, _) = both(family, torch.bfloat16)

    def error(found):
        return relative_error(*(torch.cat([g[name].double().flatten() for name in truth]) for g in (found, truth)))

    assert error(fused) < 2 * error(stock), (error(fused), error(stock))


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_is_fused_where_weights_are_not_in_the_way(family):
    def make(family, **options):
        return tiny_model(family, **options)

    (logprobs, stock, _), (fused_logprobs, fused, _) = both(family, torch.float64, make)
    assert relative_error(fused_logprobs, logprobs) < FUSED["float64"]
    assert any("embed" in name for name in stock)
    for name, wanted in stock.items():
        assert relative_error(fused[name], wanted) < FUSED["float64"], name


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_gives_back_every_bit_and_others_never_change(family):
    other = tiny_model(family, seed=3, **EAGER.get(family, {}))
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        others = other(ids).logits
        model = adapted(family, **EAGER.get(family, {}))
        before, keys = model(ids).logits, list(model.state_dict())
        surgery = patch(model)
        assert any(change.done for change in surgery.changes)
        assert torch.equal(other(ids).logits, others)
        assert list(model.state_dict()) == keys
        surgery.restore()
        assert torch.equal(model(ids).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_patching_twice_is_refused():
    model = tiny_model("llama")
    surgery = patch(model)
    with pytest.raises(ValueError, match="patched already"):
        patch(model)
    surgery.restore()
    patch(model)


def test_a_second_policy_takes_the_model_over_from_the_first():
    model = adapted()
    first = Policy(model, activation_checkpointing="offload")
    wanted = gradients(first, bins())
    found = gradients(Policy(model, activation_checkpointing="recompute"), bins())
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_hooks_still_run_and_are_not_run_by_the_probes():
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    runs = []
    for module in (model.model.norm, model.model.layers[0].mlp, model.model.layers[1].self_attn):
        module.register_forward_hook(lambda module, _, __: runs.append(module))
    patch(model)
    assert not runs
    with torch.no_grad():
        model(torch.arange(2, 9)[None])
    assert len(runs) == 3


def test_a_projection_with_a_hook_is_called_as_it_is():
    model = tiny_model("llama").requires_grad_(False)
    runs = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: runs.append(1))
    changes = {change.path: change for change in patch(model).changes}
    assert "hooks" in changes["model.layers.0.mlp"].what
    assert "(" not in changes["model.layers.1.mlp"].what
    runs.clear()
    with torch.no_grad():
        model(torch.arange(2, 9)[None])
    assert runs == [1]


def test_an_unknown_architecture_runs_as_it_is_and_says_so():
    policy = Policy(tiny_gpt2())
    assert policy.surgery.changes == []
    assert any("it runs as it is" in line for line in policy.notes())


def test_a_module_that_gives_other_numbers_is_left_alone_and_named():
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    kind = type(mlp)

    class Other(kind):
        def forward(self, x):
            return super().forward(x) * 1.01

    mlp.__class__ = Other
    changes = {change.path: change for change in patch(model).changes}
    assert changes["model.layers.0.mlp"].done
    assert not changes["model.layers.1.mlp"].done
    assert "differs" in changes["model.layers.1.mlp"].what


@pytest.mark.parametrize(("option", "reason"), [({"dropout": 0.3}, "LoRA dropout"), ({}, None)])
def test_lora_dropout_keeps_its_own_forward(option, reason):
    policy = Policy(adapted(**option))
    said = [change.what for change in policy.surgery.changes if "MLP" in change.what]
    assert said
    assert all((reason or "") in what for what in said)
    assert all(("(" in what) == bool(reason) for what in said)


def test_the_adapter_switched_off_is_the_bare_base():
    model = adapted()
    bare = Policy(tiny_model("qwen3"), fused_kernels=False)
    policy = Policy(model)
    batch = bins()[0]
    with torch.no_grad(), policy.evaluating():
        with policy.reference() as reference:
            off = reference.logprobs(batch, 1.0).logprobs
        on = policy.logprobs(batch, 1.0).logprobs
        wanted = bare.logprobs(batch, 1.0).logprobs
    assert relative_error(off, wanted) < FUSED["float32"]
    assert relative_error(on, wanted) > 100 * FUSED["float32"]


def test_the_frozen_reference_is_patched_too_and_stays_apart():
    model = tiny_model("qwen3")
    policy = Policy(model, keep_reference=True)
    batch = bins()[0]
    with torch.no_grad():
        before = policy.logprobs(batch, 1.0).logprobs
        for p in policy.trainable().values():
            p.add_(0.1)
        with policy.reference() as reference:
            assert torch.equal(reference.logprobs(batch, 1.0).logprobs, before)
        assert not torch.equal(policy.logprobs(batch, 1.0).logprobs, before)


def test_a_copy_of_a_patched_model_runs_on_its_own_weights():
    model = tiny_model("llama")
    patch(model)
    twin = copy.deepcopy(model)
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        before = model(ids).logits
        for p in twin.parameters():
            p.zero_()
        assert torch.equal(model(ids).logits, before)
        assert twin(ids).logits.abs().sum() == 0


def test_generation_and_plain_calls_keep_the_models_own_attention():
    model = tiny_model("qwen3").eval()
    ids = torch.arange(2, 9)[None]
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False)
    Policy(model)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), wanted)


@pytest.mark.parametrize("mode", ["recompute", "none"])
def test_an_adapter_changed_behind_autograds_back_is_seen_at_once(mode):
    """Some optimizers write through pointers, which moves no version counter: copies may not trust it."""
    policy, batch = Policy(adapted(dtype=torch.bfloat16), activation_checkpointing=mode), bins()[0]
    gradients(policy, [batch])
    with torch.no_grad(), policy.evaluating():
        before = policy.logprobs(batch, 1.0).logprobs
    for p in policy.trainable().values():
        p.data.mul_(1.5)
    found = gradients(policy, [batch])
    changed = adapted(dtype=torch.bfloat16)
    for name, p in changed.named_parameters():
        if "lora_" in name:
            p.data.mul_(1.5)
    fresh = Policy(changed, activation_checkpointing=mode)
    for name, wanted in gradients(fresh, [batch]).items():
        assert torch.equal(found[name], wanted), name
    with torch.no_grad(), policy.evaluating():
        after = policy.logprobs(batch, 1.0).logprobs
        assert torch.equal(after, fresh.logprobs(batch, 1.0).logprobs)
    assert not torch.equal(after, before)


@pytest.mark.parametrize(("family", "unread"), [("llama", True), ("qwen3", True), ("gemma2", False), ("gemma3", False)])
def test_an_mlps_value_is_left_out_only_where_it_goes_into_a_sum_alone(family, unread):
    model = tiny_model(family)
    with torch.no_grad():
        assert len(list(_unread_mlps(model))) == (len(model.model.layers) if unread else 0)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tiled", [False, True])
def test_checkpointing_tiling_and_surgery_together(family, tiled):
    wanted = gradients(Policy(mild(family, dtype=torch.float64), fused_kernels=False), bins(8, budget=80))
    policy = Policy(mild(family, dtype=torch.float64), activation_checkpointing="offload", tiled_mlp=tiled)
    found = gradients(policy, bins(8, budget=80))
    for name, value in wanted.items():
        assert relative_error(found[name], value) < FUSED["float64"], name


def test_a_recomputation_leaves_the_down_projection_out(monkeypatch):
    from grpo.model import surgery

    asked = []
    original = surgery.lora_mlp
    monkeypatch.setattr(surgery, "lora_mlp", lambda *a, **k: (asked.append(k["skip_output"]), original(*a, **k))[1])
    policy = Policy(adapted(), activation_checkpointing="recompute")
    asked.clear()
    gradients(policy, bins(1))
    layers = len(policy.backbone.layers)
    assert asked == [False] * layers + [True] * layers


@pytest.mark.parametrize(
    ("make", "options", "line"),
    [
        (tiny_gpt2, {"fused_kernels": True}, "update.fused_kernels is true (want auto: nothing in this architecture"),
        (
            lambda: tiny_model("cohere"),
            {"fused_kernels": True},
            "update.fused_kernels is true (want auto: model.layers",
        ),
        (lambda: tiny_mamba(), {"share_prompts": True}, "update.share_prompts is true (want false"),
        (lambda: tiny_moe(), {"tiled_mlp": True}, "update.tiled_mlp is true (want false: 0 of 2 layers"),
        (tiny_gpt2, {"keep_attention": True, "activation_checkpointing": "offload"}, "update.keep_attention is true"),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_its_knob(make, options, line):
    adapter = {"r": 2} if "tiled_mlp" in options else None
    config = GRPOConfig(update=options, adapter=adapter)
    with pytest.raises(InputError) as error:
        build_policy(config, make(), None)
    assert line in str(error.value), error.value
    assert "\n" not in str(error.value)


def tiny_mamba():
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4)
    )


def tiny_moe():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=1,
        pad_token_id=0,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def test_a_mixture_of_experts_keeps_its_experts_and_gives_the_same():
    batch = bins()
    results = [
        gradients(Policy(tiny_moe(), fused_kernels=fused, activation_checkpointing="recompute"), batch)
        for fused in (False, True)
    ]
    for name, wanted in results[0].items():
        assert relative_error(results[1][name], wanted) < 1e-4, name
