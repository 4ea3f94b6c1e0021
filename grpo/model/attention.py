"""Attention over packed segments, without a mask: each segment sees its shared prefix and, causally, itself.

    out_t = Σ_j softmax_j(cap(q_t·k_j·scale))·v_j,   j: prefix rows, and own rows ≤ t, within the window

Which back end runs a segment depends on lengths the host knows, dtype and device alone:
- CUDA, 16 bits: long documents one cuDNN call each, the runs between them one variable-length flash call each;
- elsewhere, and under a softcap: `scaled_dot_product_attention` or the formula itself, segment by segment in blocks of
  query rows, so that no [T, T] tensor exists.
cuDNN builds a plan for every new length (0.2 s on a Hopper GPU), and lengths never repeat in RL: a long document is
padded at its end to a multiple of 512, which under a causal mask no real query sees; for one that has a bin to itself
the policy adds those rows to the bin (`spare_rows`), which saves the copies. Its backward pass takes five times the
queries' memory for itself, so over very long documents it goes head group by head group (`head_groups`). It is not
bitwise repeatable on a GPU, nor is flash's.

`PackedAttention` puts this into any transformers model that looks its attention up by name: under a name without a
mask-registry entry the model builds no mask at all. The name is set while our own forward or recomputation runs and is
taken back after it, so that generation, and the user, find the model as it was.
Left out: attention dropout, sinks, ALiBi and position biases, bidirectional layers (refused; the policy's probe then
runs documents one by one).
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from grpo.batch import Segments

NAME = "grpo_packed"
CUDNN_FROM = 2048  # tokens: shorter documents are faster in flash
CUDNN_MULTIPLE = 512
CUDNN_MAX_HEAD_DIM = 128
KERNEL_MEMORY = 5  # cuDNN's own in a backward pass, × the bytes of the queries (deduced from measured peaks)
GROUP_BYTES = 2**30
QUERY_BLOCK = 1024  # rows of scores that exist at once where a mask or a softcap is spelled out


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    keeper: Keeper | None = None,
) -> Tensor:
    """[T, Hq, D] attention of one bin.

    Args:
        query: [T, Hq, D]; key, value: [T, Hk, D], Hq a multiple of Hk. A bin of one segment may have further rows
            (`spare_rows`); theirs in the result mean nothing.
        segments: on the same device.
        scale: what q·k is multiplied by.
        window: a row sees itself and the window − 1 rows before it; None: all.
        softcap: scores become softcap·tanh(score / softcap) (Gemma 2).
        keeper: keeps what the long documents' cuDNN calls gave until the layer is recomputed.
    """
    if window is not None and window >= max(segments.key_lengths):
        window = None
    if softcap is not None or not _on_tensor_cores(query):
        return _by_segment(query, key, value, segments, partial(_attend, scale=scale, window=window, softcap=softcap))
    if segments.key_index is not None:
        return _flash(query, key, value, segments, scale, window)
    long = window is None and query.shape[-1] <= CUDNN_MAX_HEAD_DIM
    runs = _runs(segments.lengths, CUDNN_FROM if long else max(segments.lengths) + 1)
    if len(runs) == 1 and runs[0][2]:
        return _cudnn(query, key, value, scale, keeper)
    total = sum(segments.lengths)
    if query.shape[0] > total:  # flash would leave the gradient of the further rows unwritten
        out = packed_attention(query[:total], key[:total], value[:total], segments, scale=scale, window=window)
        return F.pad(out, (0, 0, 0, 0, 0, query.shape[0] - total))
    if len(runs) == 1:
        return _flash(query, key, value, segments, scale, window)
    sizes = [sum(segments.lengths[first:last]) for first, last, _ in runs]
    outputs = []
    parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
    for (first, last, alone), (q, k, v) in zip(runs, parts, strict=True):
        if alone:
            outputs.append(_cudnn(q, k, v, scale, keeper))
        else:
            bounds = segments.cu_seqlens[first : last + 1]
            piece = Segments(segments.lengths[first:last], ((0, 0),) * (last - first), bounds - bounds[0])
            outputs.append(_flash(q, k, v, piece, scale, window))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def spare_rows(segments: Segments, like: Tensor) -> int:
    """Rows to add to a bin of one long document, so that its cuDNN call takes the bin as it is; else 0.

    `like` is any tensor on the model's device in its dtype.
    """
    alone = len(segments.lengths) == 1 and segments.lengths[0] >= CUDNN_FROM
    return -segments.lengths[0] % CUDNN_MULTIPLE if alone and _on_tensor_cores(like) else 0


def _on_tensor_cores(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


def _runs(lengths: tuple[int, ...], long: int) -> list[tuple[int, int, bool]]:
    """(first, last, stands alone): segments of at least `long` rows one by one, those between them together."""
    runs = []
    first = 0
    for is_long, group in itertools.groupby(lengths, key=lambda length: length >= long):
        count = len(list(group))
        runs += [(first + i, first + i + 1, True) for i in range(count)] if is_long else [(first, first + count, False)]
        first += count
    return runs


def _flash(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds = segments.cu_seqlens if segments.key_cu_seqlens is None else segments.key_cu_seqlens
    if segments.key_index is not None:  # keys are gathered, queries are not; backward sums over the group
        key, value = key.index_select(0, segments.key_index), value.index_select(0, segments.key_index)
    # A newer torch wants to be told of grouped heads; an older one takes them as they are.
    grouped: dict[str, Any] = {"enable_gqa": True} if _takes_gqa_flag() and query.shape[1] != key.shape[1] else {}
    out: Any = varlen_attn(
        query,
        key,
        value,
        segments.cu_seqlens,
        bounds,
        max(segments.lengths),
        max(segments.key_lengths),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),  # (·, 0): causal, aligned at the end of the keys
        **grouped,
    )
    return out


@functools.cache
def _takes_gqa_flag() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float, keeper: Keeper | None) -> Tensor:
    length = query.shape[0]
    if missing := -length % CUDNN_MULTIPLE:
        query, key, value = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (query, key, value))
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    groups = head_groups(q.shape[2], q.shape[1] * q.shape[3] * q.element_size(), k.shape[1])
    if keeper is not None or groups > 1:
        out = _Cudnn.apply(q, k, v, scale, keeper, groups)
    else:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    out = out.squeeze(0).transpose(0, 1)
    return out[:length] if missing else out


def head_groups(rows: int, row_bytes: int, num_key_heads: int) -> int:
    """In how many turns the backward pass goes over the heads, so that cuDNN's own memory stays near `GROUP_BYTES`.

    Args:
        rows: of the document. row_bytes: of the queries of one row. num_key_heads: what is divided.
    """
    wanted = KERNEL_MEMORY * rows * row_bytes / GROUP_BYTES
    return next((n for n in range(1, num_key_heads + 1) if num_key_heads % n == 0 and n >= wanted), num_key_heads)


class Keeper(Protocol):
    """Holds results of a layer's forward pass until it is recomputed; first in, first out."""

    recomputing: bool

    def keep(self, *tensors: Tensor | None) -> None:
        """Called in the forward pass."""

    def take(self) -> tuple[Any, ...]:
        """Called in the recomputation: the same tensors, exact."""


class _Cudnn(torch.autograd.Function):
    """The cuDNN call. With a keeper, its result and log-sum-exp are not computed again when the layer is; in several
    groups, its backward pass takes some heads at a time (no head knows of another, so the numbers are the same)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, keeper: Keeper | None, groups: int
    ) -> Tensor:
        if keeper is not None and keeper.recomputing:
            rows_first, *rest = keeper.take()
            out = rows_first.transpose(1, 2)
        else:
            out, lse, *_, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                query, key, value, None, True, 0.0, True, scale=scale
            )
            rest = [lse, seed, offset]
            if keeper is not None:
                keeper.keep(out.transpose(1, 2), *rest)
        ctx.scale, ctx.groups = scale, groups
        ctx.save_for_backward(query, key, value, out, *rest)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, out, lse, seed, offset = ctx.saved_tensors

        def call(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> Any:
            shared = gradient, query, key, value, out, lse, seed, offset, None, None, None
            return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                *shared, query.shape[2], key.shape[2], 0.0, True, scale=ctx.scale
            )

        return *by_head_groups(call, ctx.groups, gradient, query, key, value, out, lse), None, None, None


def by_head_groups(  # what an attention's backward pass takes
    call: Callable[..., Any], groups: int, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dQ, dK, dV) of `call(gradient, query, key, value, out, lse)`, over `groups` equal parts of the heads in turn.

    All [1, heads, T, D] (lse [1, heads, T, …]); Hq a multiple of Hk, Hk of `groups`.
    """
    if groups == 1:
        return tuple(call(gradient, query, key, value, out, lse))
    # Rows first in memory, as the projections' gradients are read.
    found = tuple(torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
    many, few = query.shape[1] // groups, key.shape[1] // groups
    for group in range(groups):
        heads, key_heads = slice(group * many, (group + 1) * many), slice(group * few, (group + 1) * few)
        parts = call(
            gradient[:, heads], query[:, heads], key[:, key_heads], value[:, key_heads], out[:, heads], lse[:, heads]
        )
        for whole, part, place in zip(found, parts, (heads, key_heads, key_heads), strict=True):
            whole[:, place] = part
    return found  # type: ignore[return-value]


def _by_segment(query: Tensor, key: Tensor, value: Tensor, segments: Segments, attend: Any) -> Tensor:
    key_parts: Any = key.split(segments.lengths)
    value_parts: Any = value.split(segments.lengths)
    outputs = []
    parts = zip(query.split(segments.lengths), key_parts, value_parts, segments.prefixes, strict=True)
    for q, k, v, (first, count) in parts:
        if count:
            k = torch.cat([key[first : first + count], k])
            v = torch.cat([value[first : first + count], v])
        outputs.append(attend(q, k, v))
    return torch.cat(outputs)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """One segment: [t, Hq, D] queries are the last t of the [K, Hk, D] keys."""
    num_queries, num_keys = query.shape[0], key.shape[0]
    if softcap is None and num_queries == num_keys and (window is None or window >= num_keys):
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)
    outputs = []
    offset = num_keys - num_queries
    for start in range(0, num_queries, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, num_queries)
        low = 0 if window is None else max(0, offset + start - window + 1)
        places = torch.arange(low, offset + end, device=query.device)
        distance = torch.arange(offset + start, offset + end, device=query.device)[:, None] - places
        visible = (distance >= 0) & (distance < (window or num_keys))
        block = query[start:end], key[low : offset + end], value[low : offset + end], visible
        run = partial(_spelled_out, scale=scale, softcap=softcap)
        # Scores of one block at a time exist in backward too.
        outputs.append(checkpoint(run, *block, use_reentrant=False) if num_queries > QUERY_BLOCK else run(*block))
    return torch.cat(outputs)


def _spelled_out(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, *, scale: float, softcap: float | None
) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)
    group = query.shape[1] // key.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    precise = torch.promote_types(query.dtype, torch.float32)
    scores = softcap * torch.tanh((q @ k.transpose(2, 3)).to(precise) * (scale / softcap))
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).to(query.dtype)
    return (weights @ v).squeeze(0).transpose(0, 1)


# --- inside a transformers model -----------------------------------------------------------------------------------


def _interface(  # noqa: PLR0913 transformers fixes the signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    segments: Segments | None = None,
    record: list[dict[str, Any]] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, Hq, T, D] and so on → ([1, T, Hq, D], None).

    `record` is told what the module asked for.
    """
    if segments is None:
        raise ValueError("packed attention: called without segments (its model was left switched to it)")
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError("packed attention: a mask or a batch of rows was given (want one bin)")
    unknown = [name for name in ("s_aux", "position_bias", "sinks") if others.get(name) is not None]
    if unknown or dropout or others.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ValueError(f"packed attention: {unknown or 'dropout or a bidirectional layer'} is not supported")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if record is not None:
        record.append({"scale": scale, "window": sliding_window, "softcap": softcap})
    out = packed_attention(q, k, v, segments, scale=scale, window=sliding_window, softcap=softcap)
    return out[None], None


class PackedAttention:
    """Switches one transformers model over to `packed_attention`, and back."""

    def __init__(self, model: nn.Module) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, _interface)  # a new name in their registry: nobody else's changes
        configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
        self._configs = [c for c in configs.values() if hasattr(c, "_attn_implementation")]

    @contextmanager
    def on(self) -> Iterator[None]:
        """Packed attention until the block ends; every call needs `segments=…`."""
        before = [config._attn_implementation for config in self._configs]
        for config in self._configs:
            config._attn_implementation = NAME
        try:
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name
