"""What the planner counts with: the widths of a model, and the bytes that lie on the card whatever a step does.

Widths are read from the model's modules on the meta device, built from its configuration, so no weight is read and
nothing is looked up by architecture name. Sizes are in bytes; `e` is the size of an element of the model's dtype.
    weights     Σ numel·e; in 4 bit the linear layers but the head: n/2 + n/64 + 4·n/(64·256) + tables (kernels/nf4.py)
    adapter     numel · size of adapter.dtype;  copies: numel·e, the ones that the fused kernels read (model/surgery.py)
    optimizer   optim.state_bytes
Left out: mixtures of experts and layers of another form than Llama's (their working set is an estimate, and said so).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grpo.config import AdapterConfig, ModelConfig, RunConfig
from grpo.errors import InputError
from grpo.model.adapter import add_adapter, base_of
from grpo.model.load import meta_model
from grpo.model.policy import checkpointable_layers
from grpo.optim import state_bytes

Parts = dict[str, int]  # bytes by the name of what takes them

CUBLAS_WORKSPACE = 32 * 2**20  # torch's on Hopper and newer; 8.1 MiB on older cards
CUDA_GRAPHS = "CUDA graphs"  # a part that torch's allocator does not count
CUDA_CONTEXT = 600 * 2**20  # context and loaded kernels, outside torch's count: 450 to 600 MiB on an H100
_NF4_TABLES = 16 * 4 + 256 * 4 + 4  # code, absmax_code, offset of one matrix


@dataclass(frozen=True)
class Widths:
    """One decoder layer, per token: elements of its queries, keys (or values), MLP; and the model around it.

    `known` is false where a layer is not built like Llama's: then only `hidden`, `mlp` and parameter counts hold.
    """

    hidden: int
    queries: int
    keys: int
    head: int
    mlp: int
    layers: int
    vocabulary: int
    has_head_norms: bool
    tied: bool
    known: bool

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return max(1, self.queries // self.head)

    @property
    def num_key_heads(self) -> int:
        """Key (and value) heads."""
        return max(1, self.keys // self.head)


@dataclass(frozen=True)
class Counts:
    """Numbers of elements: of all parameters, of the matrices that 4 bit packs, of the trained parts."""

    parameters: int
    packed: tuple[int, ...]
    trained: int
    trained_of_a_layer: int
    embedding: int
    state: dict[str, int]  # bytes of optimizer state by optimizer.name

    def nf4_bytes(self) -> int:
        """Of the packed matrices."""
        return sum(nf4_bytes(count) for count in self.packed)


@dataclass(frozen=True)
class ModelFacts:
    """Everything the planner takes from a model and its adapter."""

    widths: Widths
    counts: Counts
    element: int  # e
    adapter_element: int  # size of an adapter's element, 0 without an adapter

    @property
    def adapted(self) -> bool:
        """Whether only an adapter is trained."""
        return self.adapter_element > 0


class Facts:
    """Reads `ModelFacts`; a model is built on the meta device once for each adapter asked for."""

    def __init__(self, hf_config: Any) -> None:
        self.hf_config = hf_config
        self._found: dict[str, ModelFacts] = {}

    def of(self, config: RunConfig) -> ModelFacts:
        """Raises `InputError` where the architecture is no causal LM or `adapter.target_modules` matches nothing."""
        key = f"{config.adapter!r} {config.model.dtype}"
        if key not in self._found:
            self._found[key] = read_facts(self.hf_config, config.model, config.adapter)
        return self._found[key]


def read_facts(hf_config: Any, config: ModelConfig, adapter: AdapterConfig | None) -> ModelFacts:
    """Widths and counts of `hf_config` with `adapter`."""
    model: Any = meta_model(hf_config, config)
    element = getattr(torch, config.dtype).itemsize
    whole = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    packed = tuple(m.weight.numel() for m in model.modules() if type(m) is nn.Linear and m is not head)
    widths = _widths(model)
    if adapter is not None:
        with torch.device("meta"):
            model = add_adapter(model, adapter)
    layers = checkpointable_layers(base_of(model))
    counts = Counts(
        parameters=whole,
        packed=packed,
        trained=_trained(model),
        trained_of_a_layer=max((_trained(layer) for layer in layers), default=0),
        embedding=base_of(model).get_input_embeddings().weight.numel(),
        state=_states(model),
    )
    return ModelFacts(widths, counts, element, 0 if adapter is None else getattr(torch, adapter.dtype).itemsize)


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _states(model: nn.Module) -> dict[str, int]:
    from grpo.config import OptimizerConfig

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
    return {name: state_bytes(trained, OptimizerConfig(name=name)) for name in names}


def _widths(model: Any) -> Widths:
    config = model.config.get_text_config()
    layers = checkpointable_layers(model)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is None:
        raise InputError(f"{type(model).__name__} has no LM head (want a causal language model)")
    hidden = embedding.shape[1]
    first: Any = layers[0] if layers else None
    attention, mlp = (getattr(first, name, None) for name in ("self_attn", "mlp"))
    q: Any = getattr(attention, "q_proj", None)
    k: Any = getattr(attention, "k_proj", None)
    gate: Any = getattr(mlp, "gate_proj", None)
    known = all(isinstance(linear, nn.Linear) for linear in (q, k, gate))
    heads = getattr(config, "num_attention_heads", 1)
    queries, keys = (q.out_features, k.out_features) if known else (hidden, hidden)
    inner = gate.out_features if known else getattr(config, "intermediate_size", None) or 4 * hidden
    return Widths(
        hidden=hidden,
        queries=queries,
        keys=keys,
        head=getattr(attention, "head_dim", None) or getattr(config, "head_dim", None) or max(1, hidden // heads),
        mlp=inner,
        layers=len(layers) or getattr(config, "num_hidden_layers", 1),
        vocabulary=head.weight.shape[0],
        has_head_norms=getattr(attention, "q_norm", None) is not None,
        tied=head.weight is embedding,
        known=known,
    )


# --- bytes that stay -------------------------------------------------------------------------------------------------


def nf4_bytes(count: int) -> int:
    """A matrix of `count` weights in NF4 with double quantisation."""
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256) + _NF4_TABLES


def weight_bytes(facts: ModelFacts, config: RunConfig) -> int:
    """Base weights as `model.load_in_4bit` and `model.dtype` have them."""
    counts = facts.counts
    if not config.model.load_in_4bit:
        return counts.parameters * facts.element
    return (counts.parameters - sum(counts.packed)) * facts.element + counts.nf4_bytes()


def resident_parts(facts: ModelFacts, config: RunConfig) -> Parts:
    """On the card from loading to the end, before the first optimizer step."""
    counts, update = facts.counts, config.update
    fused = bool(update.fused_kernels) and (config.adapter is None or config.adapter.dropout == 0)
    parts = {"weights": weight_bytes(facts, config), "cuBLAS workspace": CUBLAS_WORKSPACE}
    if facts.adapted:
        parts["adapter"] = counts.trained * facts.adapter_element
        if fused and update.activation_checkpointing != "none":
            parts["adapter in the model's dtype"] = counts.trained * facts.element
    if not facts.adapted and getattr(getattr(config, "objective", None), "beta", 0) > 0:
        parts["reference copy"] = parts["weights"]
    if config.model.load_in_4bit:
        parts["NF4 scratch"] = max(counts.packed, default=0) * facts.element
    return parts


def trained_element(facts: ModelFacts) -> int:
    """Size of an element of what is trained, and of its gradient."""
    return facts.adapter_element or facts.element


def gradient_bytes(facts: ModelFacts) -> int:
    """Gradients of everything that is trained."""
    return facts.counts.trained * trained_element(facts)


def optimizer_bytes(facts: ModelFacts, config: RunConfig) -> int:
    """State once every parameter has had a step."""
    return facts.counts.state[config.optimizer.name]


def optimizer_scratch(facts: ModelFacts, config: RunConfig) -> int:
    """What the step itself takes: torch's AdamW forms √v of all parameters at once, bitsandbytes goes one by one."""
    return gradient_bytes(facts) if config.optimizer.name == "adamw" else 0


def kv_bytes_per_token(hf_config: Any, dtype: str | torch.dtype = "bfloat16") -> int:
    """2 · layers · key heads · head size · bytes of `dtype`: the KV cache of one token of one sequence.

    A bound from above where layers attend to a window or share their cache.
    """
    config = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    element = (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize
    return int(2 * config.num_hidden_layers * keys * size * element)
