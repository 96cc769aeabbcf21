"""BLOOM: ALiBi, a norm of the embedding, LayerNorm, biases, an MLP without a gate."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._alibi import alibi_slopes
from costmodel.families._plain import equal_heads
from costmodel.families._shared import decoder, equal_layers, heads_in_groups, layer_norm, require
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import MlpSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec

# The context in training, for configs that name none.
MAX_POSITIONS = 2048


def _describe(config: HFConfig) -> ModelSpec:
    if config.raw.get("n_embed") is not None:
        # The old name wins in transformers.
        config = replace(config, raw={**config.raw, "hidden_size": config.raw["n_embed"]})
    require(config, apply_residual_connection_post_layernorm=False)
    heads, head_dim = equal_heads(config)
    norm = layer_norm(config, "layer_norm_epsilon")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            qkv_bias=True,
            output_bias=True,
            alibi_slopes=alibi_slopes(heads),
        ),
        mlp=MlpSpec(
            size=4 * heads * head_dim, activation="gelu_tanh", is_gated=False, has_bias=True
        ),
        norm=norm,
    )
    return decoder(
        replace(config, defaults={**config.defaults, "seq_length": MAX_POSITIONS}),
        equal_layers(config, layer),
        embedding=EmbeddingSpec(norm=norm),
        final_norm=norm,
    )


FAMILY = Family(
    defaults={
        "vocab_size": 250880,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 8,
        "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
    },
    aliases={
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "seq_length",
    },
    describe=_describe,
    modules={
        "tokens": ("word_embeddings",),
        "embedding_norm": ("word_embeddings_layernorm",),
        "attention_norm": ("h.{layer}.input_layernorm",),
        "qkv": ("h.{layer}.self_attention.query_key_value",),
        "output": ("h.{layer}.self_attention.dense",),
        "mlp_norm": ("h.{layer}.post_attention_layernorm",),
        "up": ("h.{layer}.mlp.dense_h_to_4h",),
        "down": ("h.{layer}.mlp.dense_4h_to_h",),
        "final_norm": ("ln_f",),
    },
    row_blocks={"qkv": heads_in_groups},
    prefix="transformer.",
)
