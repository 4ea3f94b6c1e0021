"""Tiny real models of several families, and a tokenizer, made in memory."""

import torch
import transformers

from grpo.demo import make_tokenizer

VOCABULARY = 61
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 512, "final_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 512,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
}


def tiny_model(family="qwen3", *, vocab_size=VOCABULARY, dtype=torch.float32, seed=0, **changes):
    """A two-layer model of `family` with random weights large enough that logits are far from uniform."""
    name, extra = FAMILIES[family]
    values = dict(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    kind = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{kind}Config")(**{**values, **extra, **changes})
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)


def tiny_gpt2(seed=0):
    """Another shape of everything: learned positions, Conv1D, layer norms, tied head."""
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=256,
            bos_token_id=None,
            eos_token_id=1,
            initializer_range=0.3,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


tokenizer = make_tokenizer
