"""Hidden states, head and reference against the model's own logits."""

import peft
import pytest
import torch
from torch import nn

from grpo.config import AdapterConfig, ModelConfig
from grpo.errors import InputError
from grpo.model import attention
from grpo.model import policy as policy_module
from grpo.model.adapter import add_adapter
from grpo.model.load import load_model
from grpo.model.policy import Policy
from grpo.packing import Document, pack_documents
from tests.tiny import FAMILIES, tiny_gpt2, tiny_model
from tests.tolerances import PACKING, relative_error

DOCUMENTS = [
    Document(0, [5, 6, 7], [8, 9, 1]),
    Document(1, [9], [0, 0, 4, 4, 1]),
    Document(2, [3, 3, 3, 3, 3, 3, 3], [2]),
]


def slow_logprobs(model, document, temperature=1.0):
    """float64 log-softmax over full logits, one unpadded document."""
    tokens = [*document.prompt_ids, *document.completion_ids]
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].double() / temperature
    start = len(document.prompt_ids)
    return torch.stack([logits[t - 1].log_softmax(-1)[tokens[t]] for t in range(start, len(tokens))])


def model_of(family, **changes):
    return tiny_gpt2() if family == "gpt2" else tiny_model(family, **changes)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logprobs_are_the_models_own(family, temperature):
    model = model_of(family).eval()
    policy = Policy(model)
    assert policy.packs
    (batch,) = pack_documents(DOCUMENTS, 100)
    got = policy.logprobs(batch, temperature).logprobs
    wanted = torch.cat([slow_logprobs(model, DOCUMENTS[row], temperature) for row in batch.row_ids.tolist()])
    assert torch.allclose(got.double(), wanted, atol=PACKING["float32"], rtol=PACKING["float32"])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("capacity", [1, 9, 100])
def test_gradients_of_any_packing(family, capacity):
    model = model_of(family).eval()
    policy = Policy(model)
    weights = torch.tensor([0.3, -1.2, 0.8, 0.5, 2.0, -0.7, 0.1, 1.0, -0.4])
    starts = [0, 3, 8, 9]
    wanted = gradients(
        model,
        sum((slow_logprobs(model, d) * weights[starts[d.row_id] : starts[d.row_id + 1]]).sum() for d in DOCUMENTS),
    )
    model.zero_grad()
    for batch in pack_documents(DOCUMENTS, capacity):
        own = torch.cat([weights[starts[row] : starts[row + 1]] for row in batch.row_ids.tolist()])
        (policy.logprobs(batch, 1.0).logprobs * own).sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(got) == set(wanted)
    assert max(relative_error(got[name], wanted[name]) for name in wanted) < PACKING["float32"]


def test_changing_one_document_changes_no_other_bit():
    policy = Policy(tiny_model().eval())
    changed = [DOCUMENTS[0], Document(1, [9], [0, 7, 4, 4, 1]), DOCUMENTS[2]]
    (a,), (b,) = pack_documents(DOCUMENTS, 100), pack_documents(changed, 100)
    with torch.no_grad():
        first, second = policy.logprobs(a, 1.0).logprobs, policy.logprobs(b, 1.0).logprobs
    for index, row in enumerate(a.row_ids.tolist()):
        start, end = a.completion_cu_seqlens[index : index + 2].tolist()
        assert torch.equal(first[start:end], second[start:end]) == (row != 1)


class NoPositions(nn.Module):
    """A backbone that cannot be told positions, so it cannot keep packed documents apart."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, use_cache=False):
        return self.inner(input_ids=input_ids, use_cache=use_cache)


def test_a_backbone_that_leaks_runs_document_by_document():
    model = tiny_model().eval()
    policy = Policy(model)
    policy.backbone = NoPositions(model.model)
    policy._accepts = {"input_ids", "use_cache"}
    policy.packs = policy._probe_packing()
    assert not policy.packs
    (batch,) = pack_documents(DOCUMENTS, 100)
    wanted = torch.cat([slow_logprobs(model, DOCUMENTS[row]) for row in batch.row_ids.tolist()])
    assert torch.allclose(policy.logprobs(batch, 1.0).logprobs.double(), wanted, atol=1e-5)
    assert any("one by one" in line for line in policy.notes())


def test_a_head_that_is_not_understood_is_refused():
    model = tiny_model()
    forward = model.forward

    def odd(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits**2
        return output

    model.forward = odd
    with pytest.raises(InputError, match="logits are not softcap"):
        Policy(model)


def test_adapter_off_is_the_reference_bit_for_bit():
    model = tiny_model()
    (batch,) = pack_documents(DOCUMENTS, 100)
    with torch.no_grad():
        base = Policy(model.eval()).logprobs(batch, 1.0).logprobs
    adapted = add_adapter(model, AdapterConfig(r=4, dropout=0.5))
    policy = Policy(adapted)
    for name, parameter in policy.trainable().items():
        assert "lora" in name
        nn.init.normal_(parameter, std=0.2)
    adapted.train()
    with policy.reference() as reference:
        assert torch.equal(reference.logprobs(batch, 1.0).logprobs, base)
    assert adapted.training
    assert not torch.allclose(policy.logprobs(batch, 1.0).logprobs, base, atol=1e-2)


def test_the_frozen_copy_stays_when_the_policy_moves():
    model = tiny_model("gemma2").eval()
    policy = Policy(model, keep_reference=True)
    (batch,) = pack_documents(DOCUMENTS, 100)
    with torch.no_grad():
        before = policy.logprobs(batch, 1.0).logprobs
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    with policy.reference() as reference:
        assert torch.equal(reference.logprobs(batch, 1.0).logprobs, before)
        assert not torch.equal(policy.logprobs(batch, 1.0).logprobs, before)
    assert all(not p.requires_grad for p in policy._reference.parameters())


def test_recomputation_changes_no_bit():
    (batch,) = pack_documents(DOCUMENTS, 100)
    results = []
    for mode in ("none", "recompute"):
        model = add_adapter(tiny_model(), AdapterConfig(r=4))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
        policy = Policy(model, activation_checkpointing=mode)
        model.train()
        calls = []
        layer = policy.backbone.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        results.append((gradients(model, policy.logprobs(batch, 1.0).logprobs.sum()), len(calls)))
    (plain, once), (recomputed, twice) = results
    assert (once, twice) == (1, 2)  # it really recomputes
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_a_model_without_checkpointing_says_so():
    model = tiny_model()
    type(model).supports_gradient_checkpointing, before = False, type(model).supports_gradient_checkpointing
    try:
        assert any(
            "no activation checkpointing" in line
            for line in Policy(model, activation_checkpointing="recompute").notes()
        )
    finally:
        type(model).supports_gradient_checkpointing = before
    assert not any(
        "checkpointing" in line for line in Policy(tiny_model(), activation_checkpointing="recompute").notes()
    )


def test_a_saved_adapter_is_merged_at_load_and_starts_the_next_stage(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = load_model(ModelConfig(name_or_path=str(tmp_path / "base"), dtype="float32", device="cpu"))
    adapted = add_adapter(base, AdapterConfig(r=4))
    for parameter in Policy(adapted).trainable().values():
        nn.init.normal_(parameter, std=0.2)
    (batch,) = pack_documents(DOCUMENTS, 100)
    with torch.no_grad():
        wanted = Policy(adapted.eval()).logprobs(batch, 1.0).logprobs
    adapted.save_pretrained(tmp_path / "adapter")
    merged = load_model(ModelConfig(name_or_path=str(tmp_path / "adapter"), dtype="float32", device="cpu"))
    policy = Policy(add_adapter(merged, AdapterConfig(r=2)).eval())
    with policy.reference() as reference:
        assert torch.allclose(reference.logprobs(batch, 1.0).logprobs, wanted, atol=1e-5)
    assert all("lora" in name for name in policy.trainable())


def test_users_own_peft_config_and_its_limits():
    policy = Policy(add_adapter(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")))
    assert len(policy.trainable()) == 4
    with pytest.raises(InputError, match="target_modules"):
        add_adapter(tiny_model(), AdapterConfig(target_modules=["nothing_of_that_name"]))
    with pytest.raises(InputError, match="LM head"):
        Policy(add_adapter(tiny_model(), AdapterConfig(target_modules=["lm_head"])))


@pytest.mark.parametrize(("noise", "packs"), [(2**-8, True), (0.5, False)])
def test_the_packing_probe_allows_what_rounding_does_in_this_model_and_no_more(monkeypatch, noise, packs):
    """Another kernel rounds each layer's attention otherwise by a unit in the last place; that is no leak."""
    exact = attention.packed_attention
    generator = torch.Generator().manual_seed(0)

    def other_kernel(*inputs, **options):
        out = exact(*inputs, **options)
        return out * (1 + noise * torch.randn(out.shape, generator=generator)).to(out.dtype)

    monkeypatch.setattr(attention, "packed_attention", other_kernel)
    # The head's own probe needs that much; for the packing probe rounding decides.
    monkeypatch.setitem(policy_module._PROBE_TOLERANCE, torch.bfloat16, 3e-3)
    policy = Policy(tiny_model(dtype=torch.bfloat16, num_hidden_layers=8), fused_kernels=False)
    assert policy.packs is packs
    assert any("relative error" in line for line in policy.notes()) is not packs
