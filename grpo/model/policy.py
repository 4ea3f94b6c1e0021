"""The policy: one causal LM, its backbone apart from its LM head, and the reference it is held against.

Hidden states come from the backbone, log-probs from `kernels.token_logprobs`, so no [T, V] logits ever exist. How the
head turns hidden states into logits (bias, scale, softcap) and whether the backbone keeps packed documents apart is
not looked up by name: both are probed at start against the model's own logits, and a model that fits neither is
refused in one line. Left out: encoder-decoders and models with several heads.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.batch import Segments, TokenBatch
from grpo.errors import InputError
from grpo.kernels import TokenLogprobs, resolve_backend, token_logprobs
from grpo.model.adapter import adapter_off, base_of, is_adapted
from grpo.model.attention import PackedAttention, spare_rows
from grpo.model.offload import Checkpointer
from grpo.model.surgery import Surgery, patch, unpatch
from grpo.packing import segments

# Relative error of hidden states or logits that rounding alone can cause between two orders of the same sums. Some
# models take norms, rotations and softmax in float32 whatever their weights are.
_PROBE_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 5e-2}
_PROBE_LIMIT = 0.3  # documents that see each other differ by more, whatever rounding does


@dataclass(frozen=True)
class Head:
    """logits = softcap((h·Wᵀ + b)·scale), weight [V, H], bias [V] or None."""

    module: Any
    softcap: float | None = None
    scale: float = 1.0

    @property
    def weight(self) -> Tensor:
        """[V, H] in the model's dtype."""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """[V] or None."""
        return getattr(self.module, "bias", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, H] → [B, V], at least float32: for the few rows of a decode step, never for a whole sequence."""
        precise = torch.promote_types(hidden.dtype, torch.float32)
        if hidden.is_cuda and hidden.dtype == torch.bfloat16:
            logits = torch.mm(hidden, self.weight.t(), out_dtype=precise)
        else:
            logits = hidden.to(precise) @ self.weight.to(precise).t()
        if self.bias is not None:
            logits = logits + self.bias.to(precise)
        logits = logits * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


class Policy:
    """A causal LM ready for the update path.

    Args:
        module: the model, possibly wrapped by peft.
        keep_reference: full fine-tuning with beta > 0: keep a frozen copy of the weights as they are now.
        activation_checkpointing: "none", "recompute" (a layer keeps its input) or "offload" (in pinned host memory).
        chunk_mb: size of the logit tile of the head, MiB.
        fused_kernels: swap modules of this instance for fused ones (surgery.py); `surgery.restore()` undoes it.
        keep_attention: offload attention outputs of long documents too instead of computing them again.
        tiled_mlp: MLPs in slices of about hidden_size tokens.

    Raises:
        InputError: the head or the backbone is not understood (see the module's docstring).
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        keep_reference: bool = False,
        activation_checkpointing: Literal["none", "recompute", "offload"] = "none",
        chunk_mb: int = 512,
        fused_kernels: bool = True,
        keep_attention: bool = False,
        tiled_mlp: bool = False,
    ) -> None:
        self.module = module
        self.causal_lm: Any = base_of(module)
        self.backbone: Any = self.causal_lm.base_model
        self.chunk_mb = chunk_mb
        unpatch(self.causal_lm)  # an earlier trainer may have prepared this very model
        self._accepts: set[str] = set(inspect.signature(self.backbone.forward).parameters)
        self.attention = PackedAttention(self.backbone)
        self.head = self._probe_head()
        self._packing_note = ""
        self.packs = self._probe_packing()
        self._reference: Any = copy.deepcopy(self.causal_lm).requires_grad_(False) if keep_reference else None
        self.checkpointer: Checkpointer | None = None
        self.layers = checkpointable_layers(self.backbone)
        for layer in self.layers:
            # Whoever switched checkpointing on before: a recomputation of theirs would run outside our attention.
            vars(layer).pop("gradient_checkpointing", None)
            vars(layer).pop("_gradient_checkpointing_func", None)
        layers = self.layers if self.causal_lm.supports_gradient_checkpointing else []
        self.lacks_checkpointing = activation_checkpointing != "none" and not layers
        if activation_checkpointing != "none" and layers:
            self.checkpointer = Checkpointer(
                activation_checkpointing, context=self._switched, keep_attention=keep_attention
            )
            self.checkpointer.install(layers)
        self.surgery: Surgery | None = None
        if fused_kernels:
            self.surgery = patch(
                self.causal_lm, self.attention if self.packs else None, self.checkpointer, tiled_mlp=tiled_mlp
            )
            if self._reference is not None:
                attention = PackedAttention(self._reference.base_model)
                patch(self._reference, attention if self.packs else None, tiled_mlp=tiled_mlp)

    @property
    def device(self) -> torch.device:
        """Where the head, and so the log-probs, live."""
        return self.head.weight.device

    @property
    def takes_positions(self) -> bool:
        """Whether the backbone can be told positions."""
        return "position_ids" in self._accepts

    @property
    def cache_name(self) -> str:
        """What the backbone calls its KV cache, as argument and in its output (renamed within transformers 5.x)."""
        return "cache" if "cache" in self._accepts else "past_key_values"

    @property
    def adapted(self) -> bool:
        """Whether only an adapter is trained."""
        return is_adapted(self.module)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name → parameter, for every parameter that is trained (a tied one once)."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def notes(self) -> list[str]:
        """What the probes found and the user should know, one line each."""
        total = sum(p.numel() for p in self.module.parameters())
        trained = sum(p.numel() for p in self.trainable().values())
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in self.module.parameters()}))
        lines = [
            f"{type(self.causal_lm).__name__}: {total:,} parameters ({dtypes}), {trained:,} trained, on {self.device}"
        ]
        backend, reason = resolve_backend("auto", self.device, self.head.weight.dtype)
        lines.append(f"log-prob head: {backend} ({reason}), tile of {self.chunk_mb} MiB")
        if self.surgery is not None:
            lines += self.surgery.summary() or [
                "fused kernels: nothing in this architecture is of a known form (it runs as it is)"
            ]
        if self.checkpointer is not None and self.checkpointer.mode == "offload" and self.device.type != "cuda":
            lines.append(f"offload: on {self.device} layer inputs stay where they are (there is no other memory)")
        if self.lacks_checkpointing:
            lines.append("this architecture has no activation checkpointing: every layer's activations are kept")
        if not self.packs:
            lines.append(
                "this architecture does not keep packed documents apart: documents run one by one, slower"
                f"{self._packing_note}"
            )
        if not self.adapted and any(p.dtype == torch.bfloat16 for p in self.trainable().values()):
            lines.append(
                "full fine-tuning in bfloat16: updates below 1/256 of a weight round away (float32 keeps them)"
            )
        return lines

    def hidden_states(self, batch: TokenBatch) -> Tensor:
        """[T, H] hidden states of one bin, before the LM head."""
        return self._rows(batch)[: batch.input_ids.shape[0]]

    def _rows(self, batch: TokenBatch) -> Tensor:
        """[T, H], and perhaps some rows more that belong to nothing."""
        layout = batch.segments
        if self.packs:
            spare = spare_rows(layout, self.head.weight)
            ids, positions = (F.pad(x, (0, spare)) if spare else x for x in (batch.input_ids, batch.positions))
            return self._backbone(ids, positions, layout)
        if any(count for _, count in layout.prefixes):
            raise InputError("update.share_prompts is true (want false: this architecture cannot share prompts)")
        documents = zip(batch.input_ids.split(layout.lengths), batch.positions.split(layout.lengths), strict=True)
        return torch.cat([self._backbone(ids, positions) for ids, positions in documents])

    def logprobs(self, batch: TokenBatch, temperature: float, return_entropy: Any = False) -> TokenLogprobs:
        """Log-probs [N] (float32) of the scored tokens of a bin; differentiable outside `torch.no_grad()`."""
        with self.checkpointer.tail() if self.checkpointer else nullcontext():
            hidden = self._rows(batch).index_select(0, batch.scored_index)
            return token_logprobs(
                hidden,
                self.head.weight,
                batch.targets.index_select(0, batch.scored_index),
                bias=self.head.bias,
                temperature=temperature,
                softcap=self.head.softcap,
                logit_scale=self.head.scale,
                return_entropy=return_entropy,
                chunk_mb=self.chunk_mb,
            )

    @contextmanager
    def reference(self) -> Iterator[Policy]:
        """The reference policy: this one with its adapter off, or the frozen copy. Evaluation mode, no gradient.

        Raises:
            RuntimeError: full fine-tuning without `keep_reference`.
        """
        with self.evaluating(), torch.no_grad():
            if self.adapted:
                with adapter_off(self.module):
                    yield self
            elif self._reference is None:
                raise RuntimeError("no reference was kept (Policy(keep_reference=True))")
            else:
                frozen = copy.copy(self)
                frozen.module = frozen.causal_lm = self._reference.eval()
                frozen.backbone = self._reference.base_model
                frozen.attention = PackedAttention(frozen.backbone)
                frozen.head = Head(self._reference.get_output_embeddings(), self.head.softcap, self.head.scale)
                yield frozen

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode (no dropout, no checkpointing) until the block ends; then the mode it had."""
        training = self.module.training
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(training)

    # --- probes ----------------------------------------------------------------------------------------------

    def _switched(self) -> AbstractContextManager[None]:
        return self.attention.on() if self.packs else nullcontext()

    def _backbone(self, input_ids: Tensor, positions: Tensor, segments: Segments | None = None) -> Tensor:
        # One document alone needs no mask, and neither mask nor cache is given: transformers then builds none.
        arguments: dict[str, Any] = {"input_ids": input_ids[None], "use_cache": False}
        if self.takes_positions:
            arguments["position_ids"] = positions[None]
        if segments is None:
            return self.backbone(**arguments).last_hidden_state.squeeze(0)
        with self.attention.on():
            return self.backbone(**arguments, segments=segments).last_hidden_state.squeeze(0)

    def _probe_head(self) -> Head:
        module = self.causal_lm.get_output_embeddings()
        name = type(self.causal_lm).__name__
        if module is None or not isinstance(getattr(module, "weight", None), Tensor):
            raise InputError(f"{name} has no LM head (want a causal language model)")
        if hasattr(module, "base_layer"):
            raise InputError("adapter.target_modules reaches the LM head (want it left out)")
        if not module.weight.is_floating_point():
            raise InputError(f"the LM head of {name} is quantised (want it left in 16 or 32 bits)")
        ids = _probe_ids(self.causal_lm, 8)
        with self.evaluating(), torch.no_grad():
            hidden = self._backbone(ids, torch.arange(8, device=ids.device))
            wanted = self.causal_lm(input_ids=ids[None], use_cache=False).logits[0]
        heads = _possible_heads(module, self.causal_lm.config)
        errors = [_relative_error(head.logits(hidden), wanted) for head in heads]
        best = min(range(len(heads)), key=errors.__getitem__)
        if not errors[best] <= _PROBE_TOLERANCE[hidden.dtype]:
            raise InputError(
                f"{name}: logits are not softcap((h·Wᵀ + b)·scale) of its backbone (relative error {errors[best]:.1e})"
            )
        return heads[best]

    def _probe_packing(self) -> bool:
        """Whether two documents and a shared prefix in one bin give what each document gives alone."""
        if not self.takes_positions:
            return False
        ids = _probe_ids(self.causal_lm, 12)
        positions = torch.cat([torch.arange(7), torch.arange(5), torch.arange(7, 9)]).to(ids.device)
        with self.evaluating(), torch.no_grad():
            first, second = self._backbone(ids[:7], positions[:7]), self._backbone(ids[7:], positions[7:12])
            longer = self._backbone(torch.cat([ids[:7], ids[:2]]), torch.arange(9, device=ids.device))
            try:
                layout = segments([7, 5, 2], [(0, 0), (0, 0), (0, 7)]).to(ids.device)
                packed = self._backbone(torch.cat([ids, ids[:2]]), positions, layout)
            except (TypeError, ValueError):  # it does not pass the segments on, or asks for what they cannot say
                return False
            rounding = self._rounding(ids[:7], positions[:7], first)
        error = _relative_error(packed, torch.cat([first, second, longer[7:]]))
        allowed = min(max(_PROBE_TOLERANCE[packed.dtype], 4 * rounding), _PROBE_LIMIT)
        self._packing_note = f" (relative error {error:.1e}; rounding accounts for {allowed:.1e})"
        return error <= allowed

    def _rounding(self, input_ids: Tensor, positions: Tensor, hidden: Tensor) -> float:
        """Relative error of the hidden states [T, H] when the embeddings [T, H] are off by one unit in the last place:
        how far this model's depth and width carry what another order of the same sums does anyway."""
        embeddings = self.causal_lm.get_input_embeddings()(input_ids)
        moved = embeddings * (1 + torch.finfo(embeddings.dtype).eps)
        arguments: dict[str, Any] = {"inputs_embeds": moved[None], "position_ids": positions[None], "use_cache": False}
        if "inputs_embeds" not in self._accepts:
            return 0.0
        return _relative_error(self.backbone(**arguments).last_hidden_state.squeeze(0), hidden)


def checkpointable_layers(backbone: nn.Module) -> list[nn.Module]:
    """Decoder layers in the order in which they run."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]


def _probe_ids(model: Any, count: int) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    return (torch.arange(count, device=device) * 7 + 3) % vocabulary


def _possible_heads(module: nn.Module, hf_config: Any) -> list[Head]:
    config = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    scales = {1.0}
    for name in ("logit_scale", "logits_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            scales |= {float(value), 1.0 / float(value)}
    cap = getattr(config, "final_logit_softcapping", None)
    return [Head(module, cap, scale) for scale in sorted(scales, key=lambda s: s != 1.0)]


def _relative_error(value: Tensor, wanted: Tensor) -> float:
    difference = (value.detach().double() - wanted.detach().double()).norm()
    return float(difference / wanted.detach().double().norm().clamp_min(1e-30))
