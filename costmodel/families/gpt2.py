"""GPT-2: learned positions, LayerNorm, an MLP without a gate, matrices stored transposed."""

from __future__ import annotations

from costmodel.families._plain import GPT2_ALIASES, equal_heads, gpt2_mlp
from costmodel.families._shared import decoder, equal_layers, layer_norm, require
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    require(config, add_cross_attention=False, scale_attn_by_inverse_layer_idx=False)
    heads, head_dim = equal_heads(config)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            scale=None if config.flag("scale_attn_weights") else 1.0,
            qkv_bias=True,
            output_bias=True,
        ),
        mlp=gpt2_mlp(config),
        norm=layer_norm(config, "layer_norm_epsilon"),
    )
    return decoder(
        config,
        equal_layers(config, layer),
        embedding=EmbeddingSpec(has_positions=True),
        final_norm=layer.norm,
        dtype="float32",
    )


FAMILY = Family(
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    aliases=GPT2_ALIASES,
    describe=_describe,
    modules={
        "tokens": ("wte",),
        "positions": ("wpe",),
        "attention_norm": ("h.{layer}.ln_1",),
        "qkv": ("h.{layer}.attn.c_attn",),
        "output": ("h.{layer}.attn.c_proj",),
        "mlp_norm": ("h.{layer}.ln_2",),
        "up": ("h.{layer}.mlp.c_fc",),
        "down": ("h.{layer}.mlp.c_proj",),
        "final_norm": ("ln_f",),
    },
    transposed=("qkv", "output", "up", "down"),
    prefix="transformer.",
    # The mask and its value, as old versions saved them.
    unread=(r".*\.attn\.(bias|masked_bias)",),
    tokenizer_class="GPT2Tokenizer",
)
