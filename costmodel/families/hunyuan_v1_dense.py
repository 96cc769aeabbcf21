"""Hunyuan, dense: Llama with norms of queries and keys after the rotation."""

from __future__ import annotations

from costmodel.families._shared import (
    LLAMA_DEFAULTS,
    LLAMA_MODULES,
    decoder,
    equal_layers,
    gated_mlp,
    llama_attention,
    rms_norm,
)
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    has_bias = config.flag("attention_bias")
    layer = LayerSpec(
        attention=llama_attention(
            config,
            takes_null=("num_key_value_heads",),
            qk_norm="head",
            norms_rotated=True,
            qkv_bias=has_bias,
            output_bias=has_bias,
        ),
        mlp=gated_mlp(config),
        norm=rms_norm(config),
    )
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 290943,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
    },
    describe=_describe,
    modules={
        **LLAMA_MODULES,
        "q_norm": ("layers.{layer}.self_attn.query_layernorm",),
        "k_norm": ("layers.{layer}.self_attn.key_layernorm",),
    },
)
