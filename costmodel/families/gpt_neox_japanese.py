"""GPT-NeoX Japanese: GPT-NeoX without biases, except one after the last attention."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._plain import equal_heads
from costmodel.families._rotary import DEFAULT_THETA, rotary
from costmodel.families._shared import activation, decoder, heads_in_groups, layer_norm, num_layers
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import ACTIVATIONS, MlpSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _attention(config: HFConfig) -> AttentionSpec:
    heads, head_dim = equal_heads(config)
    for key in ("rope_theta", "partial_rotary_factor", "head_dim"):
        if key in config.raw:
            # transformers reads only the family's own names here.
            raise config.refusal(key, config.raw[key], "rotary_emb_base, rotary_pct")
    base = config.raw.get("rotary_emb_base", DEFAULT_THETA)
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        rotary=rotary(
            config,
            config.positive("rotary_emb_base", base),
            head_dim=head_dim,
            share=config.positive("rotary_pct", config.raw.get("rotary_pct", 1.0)),
        ),
    )


def _describe(config: HFConfig) -> ModelSpec:
    times = config.whole("intermediate_multiple_size")
    layer = LayerSpec(
        attention=_attention(config),
        mlp=MlpSpec(
            size=config.whole("hidden_size") * times,
            activation=activation(config, "hidden_act", ACTIVATIONS),
            is_gated=False,
        ),
        norm=layer_norm(config),
    )
    last = replace(layer, attention=replace(layer.attention, output_bias=True))
    layers = [layer] * (num_layers(config) - 1) + [last]
    return decoder(config, layers, final_norm=layer.norm, dtype="float16")


FAMILY = Family(
    defaults={
        "vocab_size": 32000,
        "hidden_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_multiple_size": 4,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    describe=_describe,
    modules={
        "tokens": ("embed_in",),
        "attention_norm": ("layers.{layer}.input_layernorm",),
        "qkv": ("layers.{layer}.attention.query_key_value",),
        "output": ("layers.{layer}.attention.dense",),
        "output.bias": ("layers.{layer}.attention.dense_bias",),
        "mlp_norm": ("layers.{layer}.post_attention_layernorm",),
        "up": ("layers.{layer}.mlp.dense_h_to_4h",),
        "down": ("layers.{layer}.mlp.dense_4h_to_h",),
        "final_norm": ("final_layer_norm",),
    },
    row_blocks={"qkv": heads_in_groups},
    prefix="gpt_neox_japanese.",
    head="embed_out",
    tokenizer_class="GPTNeoXJapaneseTokenizer",
)
