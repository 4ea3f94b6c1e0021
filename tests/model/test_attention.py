"""Packed attention against a loop over rows in float64, and inside transformers' models."""

import itertools
import math

import pytest
import torch

from grpo.model import attention
from grpo.model.attention import NAME, PackedAttention, packed_attention
from grpo.model.policy import Policy
from grpo.packing import Document, pack_documents, segments
from tests.tiny import tiny_model
from tests.tolerances import PACKING, relative_error

LAYOUTS = {
    "one": ([9], None),
    "three": ([5, 1, 7], None),
    "shared": ([6, 3, 5, 4], [(0, 0), (0, 6), (0, 6), (0, 0)]),
    "two groups": ([2, 3, 1, 4, 2], [(0, 0), (0, 2), (0, 2), (0, 0), (6, 4)]),
}


def slow(query, key, value, layout, *, scale, window=None, softcap=None):
    """Row by row: the keys it may see, by the definition of Segments."""
    rows = []
    starts = [0, *itertools.accumulate(layout.lengths)]
    for start, length, (first, count) in zip(starts, layout.lengths, layout.prefixes, strict=False):
        for t in range(length):
            seen = [*range(first, first + count), *range(start, start + t + 1)]
            seen = seen[-window:] if window else seen
            for head in range(query.shape[1]):
                group = head // (query.shape[1] // key.shape[1])
                scores = scale * key[seen, group] @ query[start + t, head]
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                rows.append(scores.softmax(0) @ value[seen, group])
    return torch.stack(rows).view(query.shape)


def heads(num_rows, dtype=torch.float64, num_heads=4, num_groups=2, width=8, seed=0):
    torch.manual_seed(seed)
    shapes = ((num_rows, n, width) for n in (num_heads, num_groups, num_groups))
    return [torch.randn(*shape, dtype=dtype).mul(1.5).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("block", [2, 1024])
@pytest.mark.parametrize(
    "settings", [{}, {"window": 3}, {"window": 50}, {"softcap": 2.0}, {"softcap": 2.0, "window": 2}]
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_values_and_gradients_of_every_layout(name, settings, block, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    lengths, prefixes = LAYOUTS[name]
    layout = segments(lengths, prefixes)
    inputs = heads(sum(lengths))
    out = packed_attention(*inputs, layout, scale=0.4, **settings)
    wanted = slow(*inputs, layout, scale=0.4, **settings)
    assert relative_error(out.detach(), wanted.detach()) < PACKING["float64"]
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), inputs)
    for gradient, correct in zip(found, torch.autograd.grad((wanted * weights).sum(), inputs), strict=True):
        assert relative_error(gradient, correct) < PACKING["float64"]


def test_runs_of_short_documents_stay_together_and_long_ones_stand_alone():
    assert attention._runs((3, 2, 9, 8, 1), long=8) == [(0, 2, False), (2, 3, True), (3, 4, True), (4, 5, False)]
    assert attention._runs((3, 2), long=8) == [(0, 2, False)]


def test_the_model_is_switched_inside_the_block_alone_even_after_an_error():
    model = tiny_model("llama")
    switch = PackedAttention(model.model)
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="inside"), switch.on():
        assert model.config._attn_implementation == NAME
        raise RuntimeError("inside")
    assert model.config._attn_implementation == before


def test_a_call_without_segments_is_refused():
    model = tiny_model("llama")
    with PackedAttention(model.model).on(), pytest.raises(ValueError, match="without segments"):
        model(torch.arange(5)[None])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "granite", "cohere"])
@pytest.mark.parametrize("window", [None, 4])
def test_packed_documents_equal_documents_alone_in_every_family(family, window):
    windows = {"mistral": {"sliding_window": window}, "gemma2": {"sliding_window": window or 512}}
    windows["gemma3"] = {"sliding_window": window or 512}
    if window is not None and family not in windows:
        pytest.skip("no sliding window in this family's tiny model")
    model = tiny_model(family, attn_implementation="eager", **windows.get(family, {})).double().eval()
    policy = Policy(model, fused_kernels=False)
    assert policy.packs
    torch.manual_seed(1)
    lengths = [11, 3, 7]
    ids = torch.randint(2, 60, (sum(lengths),))
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        packed = policy._backbone(ids, positions, segments(lengths))
        alone = [model.model(row[None], use_cache=False).last_hidden_state[0] for row in ids.split(lengths)]
    # Their eager softmax is float32 in a float64 model too.
    assert relative_error(packed, torch.cat(alone)) < 1e-6


def test_a_shared_prompt_gives_what_each_whole_document_gives():
    model = tiny_model("qwen3").double().eval()
    policy = Policy(model, fused_kernels=False)
    torch.manual_seed(2)
    prompt, tails = torch.randint(2, 60, (6,)), [torch.randint(2, 60, (n,)) for n in (3, 5)]
    layout = segments([6, 3, 5], [(0, 0), (0, 6), (0, 6)])
    positions = torch.cat([torch.arange(6), torch.arange(6, 9), torch.arange(6, 11)])
    with torch.no_grad():
        packed = policy._backbone(torch.cat([prompt, *tails]), positions, layout).split([6, 3, 5])
        for tail, found in zip(tails, packed[1:], strict=True):
            whole = model.model(torch.cat([prompt, tail])[None], use_cache=False).last_hidden_state[0]
            assert relative_error(found, whole[6:]) < PACKING["float64"]
            assert relative_error(packed[0], whole[:6]) < PACKING["float64"]


def test_no_square_of_the_bin_is_ever_allocated():
    """Largest tensor autograd keeps grows with T, not T²."""
    largest = []
    for count in (4, 16):
        layout = segments([16] * count)
        inputs = heads(16 * count, torch.float32)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # noqa: B023
            packed_attention(*inputs, layout, scale=0.4)
        largest.append(max(sizes))
    assert largest[1] <= 4 * largest[0]


@pytest.mark.parametrize("length", [19, 24])
def test_rows_added_for_a_long_document_change_nothing(length, monkeypatch):
    """The way of a GPU's long document, with plain attention in cuDNN's place."""
    seen = []

    def cudnn(query, key, value, scale, keeper):
        seen.append(query.shape[0])
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    batch = pack_documents([Document(0, list(range(2, 7)), list(range(7, 7 + length - 4)))], 100)[0]
    assert batch.input_ids.shape[0] == length
    policy = Policy(tiny_model("qwen3").double())

    def run():
        policy.module.zero_grad()
        logprobs = policy.logprobs(batch, 1.0).logprobs
        logprobs.sum().backward()
        return logprobs.detach(), [p.grad.clone() for p in policy.trainable().values()]

    wanted, gradients = run()
    hidden = policy.hidden_states(batch)
    monkeypatch.setattr(attention, "_on_tensor_cores", lambda _: True)
    monkeypatch.setattr(attention, "_cudnn", cudnn)
    monkeypatch.setattr(attention, "CUDNN_FROM", 16)
    monkeypatch.setattr(attention, "CUDNN_MULTIPLE", 8)
    found, other = run()
    assert seen == [24] * len(policy.backbone.layers)
    assert relative_error(found, wanted) < 1e-12
    for a, b in zip(other, gradients, strict=True):
        assert relative_error(a, b) < 1e-12
    assert relative_error(policy.hidden_states(batch), hidden) < 1e-12


def test_further_rows_are_kept_out_of_the_flash_call(monkeypatch):
    def flash(query, key, value, layout, scale, window):
        return slow(query, key, value, layout, scale=scale, window=window)

    monkeypatch.setattr(attention, "_on_tensor_cores", lambda _: True)
    monkeypatch.setattr(attention, "_flash", flash)
    layout, inputs = segments([9]), heads(12)
    out = packed_attention(*inputs, layout, scale=0.4, window=4)
    wanted = slow(*(x[:9] for x in inputs), layout, scale=0.4, window=4)
    assert out.shape == inputs[0].shape
    assert relative_error(out[:9].detach(), wanted.detach()) < PACKING["float64"]
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert not gradient[9:].any()


def sdpa_backward(gradient, query, key, value, out, lse):
    """The whole backward pass by autograd; held to the statistics it is given, as a kernel would use them."""
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    again = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True)
    assert torch.equal(again, out)
    wanted = (query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3) * 0.3).tril()
    wanted = wanted.masked_fill(torch.ones_like(wanted).triu(1).bool(), -torch.inf).logsumexp(-1)
    assert torch.allclose(lse, wanted, rtol=1e-12)
    return torch.autograd.grad(again, inputs, gradient)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_some_heads_at_a_time_is_all_heads_at_once(groups):
    q, k, v = (x.detach().transpose(0, 1)[None] for x in heads(11, num_heads=8, num_groups=4))
    gradient = torch.randn_like(q)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3)) * 0.3
    lse = scores.masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf).logsumexp(-1)
    found = attention.by_head_groups(sdpa_backward, groups, gradient, q, k, v, out, lse)
    for part, whole in zip(found, sdpa_backward(gradient, q, k, v, out, lse), strict=True):
        assert part.shape == whole.shape
        assert relative_error(part, whole) < 1e-14


def test_turns_are_as_many_as_keep_the_kernels_memory_small():
    """8B shape: 32 heads of 128 in 16 bits, 8 key heads: 5 × 8,192 bytes a row."""
    turns = [attention.head_groups(rows, 8192, 8) for rows in (2048, 20_480, 26_214, 26_240, 102_400, 1_000_000)]
    assert turns == [1, 1, 1, 2, 4, 8]
    assert attention.head_groups(10**6, 8192, 6) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[2048], [2500], [5000, 300]], ids=str)
def test_gpu_head_groups(lengths, monkeypatch):
    """In turns and at once, the same call in bfloat16."""
    layout = segments(lengths).to("cuda")
    inputs = [x.detach().cuda().bfloat16() for x in heads(sum(lengths), torch.float32, width=64)]
    weights = torch.randn_like(inputs[0])
    results = []
    for size in (2**30, 2**10):
        monkeypatch.setattr(attention, "GROUP_BYTES", size)
        tensors = [x.clone().requires_grad_() for x in inputs]
        out = packed_attention(*tensors, layout, scale=0.125)
        results.append([out, *torch.autograd.grad((out * weights).sum(), tensors)])
    for found, reference in zip(*results, strict=True):
        assert relative_error(found, reference) < PACKING["bfloat16"] / 2


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize(
    "lengths",
    [[100], [2048], [2500], [5000, 300, 17, 2100, 1], [40] * 30],
    ids=str,
)
def test_gpu_back_ends_against_float32(lengths, width):
    """cuDNN (padded and not), flash and their mixtures in bfloat16."""
    layout = segments(lengths)
    inputs = [x.detach().cuda() for x in heads(sum(lengths), torch.float32, width=width)]
    weights = torch.randn_like(inputs[0])

    def run(dtype, where):
        tensors = [x.to(dtype).requires_grad_() for x in inputs]
        out = packed_attention(*tensors, where, scale=1 / math.sqrt(width))
        return out, torch.autograd.grad((out.float() * weights).sum(), tensors)

    out, gradients = run(torch.bfloat16, layout.to("cuda"))
    wanted, correct = run(torch.float32, layout.to("cuda"))
    assert relative_error(out, wanted) < PACKING["bfloat16"]
    for found, reference in zip(gradients, correct, strict=True):
        assert relative_error(found, reference) < 2 * PACKING["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_gpu_shared_prefixes_and_windows(window):
    lengths, prefixes = [700, 300, 500, 90], [(0, 0), (0, 700), (0, 700), (0, 0)]
    layout = segments(lengths, prefixes)
    inputs = [x.detach().cuda() for x in heads(sum(lengths), torch.float32, width=64)]
    weights = torch.randn_like(inputs[0])
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        tensors = [x.to(dtype).requires_grad_() for x in inputs]
        out = packed_attention(*tensors, layout.to("cuda"), scale=0.125, window=window)
        results.append([out, *torch.autograd.grad((out.float() * weights).sum(), tensors)])
    for found, reference in zip(*results, strict=True):
        assert relative_error(found, reference) < 2 * PACKING["bfloat16"]
