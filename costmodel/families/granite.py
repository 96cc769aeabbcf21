"""Granite 3: Llama with four multipliers."""

from __future__ import annotations

from costmodel.families._shared import (
    LLAMA_DEFAULTS,
    LLAMA_MODULES,
    absent,
    decoder,
    equal_layers,
    gated_mlp,
    llama_attention,
    rms_norm,
)
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec

MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)


def _describe(config: HFConfig) -> ModelSpec:
    embedding, attention, residual, logits = (
        config.positive(key, config.get(key)) for key in MULTIPLIERS
    )
    has_bias = config.flag("attention_bias")
    layer = LayerSpec(
        attention=llama_attention(
            config,
            takes_null=("num_key_value_heads", *absent(config, "head_dim")),
            scale=attention,
            qkv_bias=has_bias,
            output_bias=has_bias,
        ),
        mlp=gated_mlp(config, has_bias=config.flag("mlp_bias")),
        norm=rms_norm(config),
        residual_scale=residual,
    )
    return decoder(
        config,
        equal_layers(config, layer),
        embedding=EmbeddingSpec(scale=embedding),
        logit_scale=1 / logits,
    )


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "attention_bias": False,
        "mlp_bias": False,
        **dict.fromkeys(MULTIPLIERS, 1.0),
    },
    describe=_describe,
    modules=LLAMA_MODULES,
    fixes_tokenizer_class=True,
)
