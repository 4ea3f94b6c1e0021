"""Bytes of a forward and a backward pass over one bin: what autograd keeps, and what one layer takes while it runs.

T rows, e bytes an element, H hidden, Q and K widths of queries and of keys (values alike), I of the MLP, L layers,
V vocabulary, a bytes of an adapter's element. With activation checkpointing, fused, LoRA (model/surgery.py):
    one layer recomputed   n₁ H, q k v Q + 2K (before head norms also Q + K), attention out Q, h H, n₂ H, e g 2I
    backward of its MLP    + dY H, + dh I (tiled: 3I of one slice and dX H)
    backward of attention  dY H, n₁, q k v, out, d_out Q, dq dk dv Q + 2K, and the kernel's own memory (`head_groups`)
    layer inputs           recompute: L·H;  offload: the last layer's, the next one on its way back, and the two whose
                           copies are not yet known to be over (model/offload.py: `_sources`), H each
    log-prob head          final norm's input H, hidden H, u H, and the tile (kernels/logprobs_tiles.py)
times T·e, and float32 statistics beside them: log-sum-exp per head, ρ per norm. Full fine-tuning keeps h = act(e)·g too
and has gradients of the weights. Where several long documents share a bin, each is padded to 512 rows and copied.
Left out: memory of less than a row per token. Paths that are not fused are counted from transformers' and peft's
code and come out within about 10 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo.config import RunConfig
from grpo.kernels.logprobs_tiles import tile_shape
from grpo.model.attention import CUDNN_FROM, CUDNN_MAX_HEAD_DIM, CUDNN_MULTIPLE, KERNEL_MEMORY, head_groups
from grpo.model.host_arena import ALIGNMENT
from grpo.model.offload import MIN_BYTES
from grpo.plan_parts import ModelFacts, Parts, gradient_bytes, trained_element

_PER_TOKEN = 64 + 20 * 4  # ids, positions, index, advantages and the like; the objective's float32 vectors
_UNKNOWN_LAYER = 34  # bytes per token and width of a layer of unknown form (Korthikanti et al. 2022, equation 2)


@dataclass(frozen=True)
class Bin:
    """A bin by the lengths of its documents, as attention sees it on a GPU."""

    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """T without spare rows."""
        return sum(self.lengths)

    @property
    def rows(self) -> int:
        """T: one long document gets the rows that its attention call wants."""
        alone = len(self.lengths) == 1 and self.tokens >= CUDNN_FROM
        return self.tokens + (-self.tokens % CUDNN_MULTIPLE if alone else 0)

    @staticmethod
    def full(tokens: int, longest: int) -> Bin:
        """As many documents of `longest` tokens as fit into `tokens`, and the rest."""
        count, rest = divmod(tokens, longest)
        return Bin((longest,) * count + ((rest,) if rest else ()))


@dataclass(frozen=True)
class Path:
    """How a layer runs, and how its inputs are kept.

    `fused`: attention and MLP are one Function each with adapters inside; `glued`: only norms, RoPE and act(e)·g are
    fused (full fine-tuning, LoRA dropout); neither: stock layers.
    """

    checkpointing: str
    fused_attention: bool
    fused_mlp: bool
    glued: bool
    tiled: bool
    keep_attention: bool
    chunk_mb: float
    entropy_gradient: bool = False
    dropout: bool = False

    @staticmethod
    def of(config: RunConfig, facts: ModelFacts) -> Path:
        """What surgery does to a model of this form."""
        update, adapter = config.update, config.adapter
        glued = bool(update.fused_kernels) and facts.widths.known
        fused = glued and adapter is not None and adapter.dropout == 0
        return Path(
            update.activation_checkpointing,
            fused,
            fused,
            glued,
            update.tiled_mlp and fused,
            update.keep_attention,
            update.logprob_chunk_mb,
            bool(getattr(getattr(config, "objective", None), "entropy_coef", 0.0)),
            adapter is not None and adapter.dropout > 0,
        )


@dataclass(frozen=True)
class Pass:
    """One bin through one model on one path. All methods return bytes."""

    facts: ModelFacts
    path: Path
    bin: Bin

    # --- one layer -------------------------------------------------------------------------------------------

    def of_width(self, width: float) -> int:
        """[T, width] in the model's dtype."""
        return int(self.bin.rows * width * self.facts.element)

    def attention_kept(self) -> int:
        """What a layer's attention, with the norm before it, keeps for its backward pass."""
        w = self.facts.widths
        kept = self._qkv_kept() + self._out_kept()
        kept += self._projection_inputs(w.hidden, 3, shared=True) + self._projection_inputs(w.queries, 1, shared=False)
        if w.has_head_norms:
            kept += self._norm(w.queries + w.keys, (w.num_heads + w.num_key_heads), own_input=True)
        return kept + self._norm(w.hidden, 1, own_input=False) + self.bin.rows * w.num_heads * 4

    def mlp_kept(self) -> int:
        """The same of the MLP with the norm before it, and of the residual sum h that the norm reads."""
        w, path = self.facts.widths, self.path
        if not w.known:
            return _UNKNOWN_LAYER * self.bin.rows * w.hidden * self.facts.element // 2
        kept = self._norm(w.hidden, 1, own_input=True)
        if path.fused_mlp:
            return kept + self.of_width(w.hidden) + (0 if path.tiled else self.of_width(2 * w.mlp))
        kept += self._projection_inputs(w.hidden, 2, shared=True)
        kept += self.of_width((2 if path.glued else 3) * w.mlp)  # e, g; stock: act(e) too
        if self._casts() or self.path.dropout:
            return kept + self._copied_input(w.mlp)
        return kept + self.of_width(w.mlp)  # h, of which down's gradient is made

    def mlp_backward(self) -> int:
        """Beyond what was kept, at the worst moment: its backward, or the layer's sum at the end of recomputation."""
        w = self.facts.widths
        if self.path.tiled:
            tiles = -(-self.bin.rows // w.hidden)
            tile = 3 * -(-self.bin.rows // tiles) * w.mlp * self.facts.element
            return max(self.of_width(2 * w.hidden), tile + self.of_width(w.hidden))
        if self.path.fused_mlp:
            inner = self.of_width(w.mlp)
        elif self._casts():
            inner = self.bin.rows * w.mlp * (self.facts.adapter_element + 2 * self.facts.element)
        else:
            inner = self.of_width(2 * w.mlp)  # gradients of h, e and g, when h is gone
        return max(self.of_width(2 * w.hidden), inner)

    def attention_backward(self) -> int:
        """Beyond what attention kept: gradients of its output, of q, k, v, and the kernel's own memory."""
        w = self.facts.widths
        if not w.known:
            return 0
        element = self.facts.element
        rows = self._longest_call()
        turns = head_groups(rows, w.queries * element, w.num_key_heads) if self._calls()[1] else 1
        kernel = KERNEL_MEMORY * rows * w.queries * element // turns
        inputs = self.of_width(w.queries + 2 * w.keys)  # gradients of q, k, v
        found = self.of_width(w.queries) + inputs + kernel
        if self._calls()[1]:  # after the last call they are put together, when the output's gradient is gone
            found = max(found, 2 * inputs)
        return found if self.path.fused_attention else found - self._casts() * self.bin.rows * w.queries * 4

    def layer_forward(self) -> int:
        """A layer without a graph, beyond its input."""
        w = self.facts.widths
        if not w.known:
            return _UNKNOWN_LAYER * self.bin.rows * w.hidden * self.facts.element // 4
        attention = self.of_width(w.hidden) + self._qkv_kept() + self._out_kept()
        rows = self.bin.rows
        if self.path.tiled:
            inner = 2 * -(-rows // -(-rows // w.hidden)) * w.mlp * self.facts.element
        else:
            inner = self.of_width((2 if self.path.fused_mlp else 3) * w.mlp)
        return max(attention, self.of_width(3 * w.hidden) + inner)

    def layer_input(self) -> int:
        """[T, H]."""
        return self.of_width(self.facts.widths.hidden)

    # --- the whole pass --------------------------------------------------------------------------------------

    def inputs_on_gpu(self) -> int:
        """Layer inputs on the card when the backward pass begins."""
        layers = self.facts.widths.layers
        if self.offloads:
            return (min(1, layers) + min(1, layers - 1) + min(2, layers - 1)) * self.layer_input()
        return layers * self.layer_input()

    @property
    def offloads(self) -> bool:
        """Whether layer inputs are worth a copy to the host."""
        return self.path.checkpointing == "offload" and self.layer_input() >= MIN_BYTES

    def host_bytes(self) -> int:
        """Pinned host memory of the arena."""
        if not self.offloads:
            return 0
        w = self.facts.widths
        tensors = [self.layer_input()]
        if self.path.keep_attention:
            tensors += [self.of_width(w.queries), self.bin.rows * w.num_heads * 4]
        aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in tensors if size >= MIN_BYTES]
        return (w.layers - 1) * sum(aligned)

    def per_token(self) -> int:
        """The bin's own vectors, and the rotary tables."""
        return self.bin.rows * _PER_TOKEN + self.of_width(2 * self.facts.widths.head)

    def head(self, *, gradient: bool = True) -> Parts:
        """Around the LM head: the final norm's input, the hidden states, their gradient and the tile."""
        w = self.facts.widths
        parts = {"hidden states": self.of_width(2 * w.hidden)}
        trains = gradient and not self.facts.adapted
        keeps_u = gradient and not trains and not self.path.entropy_gradient
        tile = tile_bytes(self.facts, self.path.chunk_mb, self.bin.tokens, with_product=keeps_u or gradient)
        if gradient:
            parts["gradient of hidden states"] = self.of_width(w.hidden)
        if trains:
            matrix = w.vocabulary * w.hidden
            parts["gradient of the head"] = matrix * 4
            tile = max(tile, matrix * self.facts.element)  # the tile is gone when the gradient takes the weight's dtype
        return parts | {"log-prob tile": tile}

    def forward(self, *, gradient: bool = True) -> Parts:
        """The larger of a layer at the end of the forward pass and the head."""
        inputs = self._kept_by_layers() if gradient else self.layer_input()
        layer = {"layer inputs": inputs, "one layer": self.layer_forward()}
        head = {}
        if gradient:  # the one that comes back from the host does so when the head is done
            coming = self.layer_input() if self.offloads and self.facts.widths.layers > 1 else 0
            head = {"layer inputs": self._kept_by_layers() - coming}
        return self._larger(layer, head | self.head(gradient=gradient))

    def backward(self, *, earlier_bins: bool) -> Parts:
        """The worst moment of the backward pass: the last layer (most layer inputs) or the first (most gradients).

        `earlier_bins`: gradients of everything stand already, those of a layer are made beside them.
        """
        own = self.facts.counts.trained_of_a_layer * trained_element(self.facts)
        whole = gradient_bytes(self.facts)
        head = 0 if self.facts.adapted else self.facts.counts.embedding * self.facts.element
        attention, mlp = self.attention_kept(), self.mlp_kept()
        first = {
            "gradients": whole + own + (head if self.facts.widths.tied else 0) if earlier_bins else own + head,
            "layer inputs": self._kept_by_layers(),
        }
        last = {
            "gradients": whole + own if earlier_bins else whole,
            "layer inputs": (2 if self.offloads else 1) * self.layer_input(),
        }
        if self.path.checkpointing == "none":
            first["layer inputs"] -= attention + mlp  # of the layer that runs: they are named apart
        layer = self.layer_input() + max(attention + mlp + self.mlp_backward(), attention + self.attention_backward())
        ends = [start | {"one layer": layer} for start in (first, last)]
        if not self.facts.adapted:  # the embedding's gradient, and where it is the head's too, their sum
            ends.append({"gradients": last["gradients"] + (2 if self.facts.widths.tied else 1) * head})
        return self._larger(*ends)

    def _kept_by_layers(self) -> int:
        if self.path.checkpointing == "none":
            kept = self.attention_kept() + self.mlp_kept()
            return self.facts.widths.layers * (self.layer_input() + kept)
        return self.inputs_on_gpu()

    def _larger(self, *moments: Parts) -> Parts:
        return max(moments, key=lambda parts: sum(parts.values())) | {"bin": self.per_token()}

    # --- pieces ----------------------------------------------------------------------------------------------

    def _casts(self) -> bool:
        """Whether stock peft layers keep a copy of their input in the adapter's dtype."""
        return self.facts.adapted and self.facts.adapter_element != self.facts.element

    def _projection_inputs(self, width: int, count: int, *, shared: bool) -> int:
        """Inputs that `count` projections of one input keep. `shared`: nobody else keeps it."""
        if not self.path.fused_attention and (self._casts() or self.path.dropout):
            return count * self._copied_input(width)
        return self.of_width(width) if shared else 0

    def _copied_input(self, width: int) -> int:
        """What one stock peft layer keeps: its input in the adapter's dtype, under dropout a mask of bytes too."""
        return self.bin.rows * width * (self.facts.adapter_element + self.path.dropout)

    def _norm(self, width: int, statistics: int, *, own_input: bool) -> int:
        """A norm's input (unless it is the layer's own) and ρ. Stock norms keep the input in float32 instead, and
        beside it what a trained weight is multiplied with."""
        kept = self.bin.rows * statistics * 4
        if self.path.glued or self.facts.element == 4:
            kept += self.of_width(width) if own_input else 0
        else:
            kept += self.bin.rows * width * 4
        return kept + (0 if self.path.glued or self.facts.adapted else self.of_width(width))

    def _calls(self) -> tuple[int, int, bool]:
        """(rows padded and copied, rows of calls that stand alone, whether any call reads q, k, v in place)."""
        w = self.facts.widths
        long = [n for n in self.bin.lengths if n >= CUDNN_FROM and w.head <= CUDNN_MAX_HEAD_DIM]
        if self.facts.element != 2 or not long or len(self.bin.lengths) == 1:
            return 0, 0, True
        padded = sum(n + -n % CUDNN_MULTIPLE for n in long if n % CUDNN_MULTIPLE)
        return padded, sum(long), len(long) < len(self.bin.lengths) or any(n % CUDNN_MULTIPLE == 0 for n in long)

    def _qkv_kept(self) -> int:
        w = self.facts.widths
        padded, _, in_place = self._calls()
        width = w.queries + 2 * w.keys
        return width * padded * self.facts.element + (self.of_width(width) if in_place else 0)

    def _out_kept(self) -> int:
        """What attention gave, call by call, and put together again where there was more than one call."""
        w = self.facts.widths
        padded, alone, _ = self._calls()
        together = self.of_width(w.queries) if alone else 0
        copied = sum(n for n in self.bin.lengths if n >= CUDNN_FROM and n % CUDNN_MULTIPLE) if padded else 0
        return self.of_width(w.queries) + together + (padded - copied) * w.queries * self.facts.element

    def _longest_call(self) -> int:
        """Rows of the largest attention call."""
        _, alone, _ = self._calls()
        if not alone:
            return self.bin.rows
        return max(max(n + -n % CUDNN_MULTIPLE for n in self.bin.lengths), self.bin.tokens - alone)


def tile_bytes(facts: ModelFacts, chunk_mb: float, rows: int, *, with_product: bool) -> int:
    """Scratch memory of one call of the log-prob head: tile, and with a product to follow E, the sum and W_y."""
    w, operand = facts.widths, facts.element
    height, columns = tile_shape(w.hidden, w.vocabulary, chunk_mb, 4 + operand)
    height = min(height, rows)
    found = height * (4 * columns + 16)
    return found + height * (operand * columns + (4 + operand) * w.hidden) if with_product else found
