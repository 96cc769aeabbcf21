"""Persimmon: LayerNorm everywhere, norms of queries and keys, half of each head rotated."""

from __future__ import annotations

from costmodel.families._plain import equal_heads
from costmodel.families._rotary import rotary
from costmodel.families._shared import decoder, equal_layers, heads_in_groups, layer_norm, plain_mlp
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    heads, head_dim = equal_heads(config)
    if config.whole("head_dim", instead_of_null=head_dim) != head_dim:
        raise config.refusal("head_dim", config.get("head_dim"), f"{head_dim}, hidden_size / heads")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            rotary=rotary(config, head_dim=head_dim, share=0.5),
            qk_norm="head" if config.flag("qk_layernorm") else "none",
            qkv_bias=True,
            output_bias=True,
        ),
        mlp=plain_mlp(config, has_bias=True),
        norm=layer_norm(config),
    )
    return decoder(config, equal_layers(config, layer), final_norm=layer.norm)


FAMILY = Family(
    defaults={
        "vocab_size": 262144,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "hidden_act": "relu2",
        "max_position_embeddings": 16384,
        "layer_norm_eps": 1e-5,
        "qk_layernorm": True,
        "tie_word_embeddings": False,
    },
    describe=_describe,
    modules={
        "tokens": ("embed_tokens",),
        "attention_norm": ("layers.{layer}.input_layernorm",),
        "qkv": ("layers.{layer}.self_attn.query_key_value",),
        "q_norm": ("layers.{layer}.self_attn.q_layernorm",),
        "k_norm": ("layers.{layer}.self_attn.k_layernorm",),
        "output": ("layers.{layer}.self_attn.dense",),
        "mlp_norm": ("layers.{layer}.post_attention_layernorm",),
        "up": ("layers.{layer}.mlp.dense_h_to_4h",),
        "down": ("layers.{layer}.mlp.dense_4h_to_h",),
        "final_norm": ("final_layernorm",),
    },
    row_blocks={"qkv": heads_in_groups},
    fixes_tokenizer_class=True,
)
