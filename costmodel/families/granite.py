"""Granite 3: Llama with four multipliers."""

from __future__ import annotations

from collections.abc import Sequence

from costmodel.families._shared import (
    absent,
    decoder,
    equal_layers,
    gated_mlp,
    llama_attention,
    rms_norm,
)
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec

MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)


def granite_layer(config: HFConfig, experts: ExpertsSpec | None = None) -> LayerSpec:
    """Read a layer of Granite, with an MLP or with ``experts``."""
    has_bias = config.flag("attention_bias")
    return LayerSpec(
        attention=llama_attention(
            config,
            takes_null=("num_key_value_heads", *absent(config, "head_dim")),
            scale=config.positive("attention_multiplier", config.get("attention_multiplier")),
            qkv_bias=has_bias,
            output_bias=has_bias,
        ),
        mlp=None if experts else gated_mlp(config, has_bias=config.flag("mlp_bias")),
        experts=experts,
        norm=rms_norm(config),
        residual_scale=config.positive("residual_multiplier", config.get("residual_multiplier")),
    )


def granite_decoder(
    config: HFConfig, layers: Sequence[LayerSpec], *, windows: Sequence[str] | None = None
) -> ModelSpec:
    """Make a model of its layers, with the multipliers of embedding and logits."""
    embedding, logits = (
        config.positive(key, config.get(key)) for key in ("embedding_multiplier", "logits_scaling")
    )
    return decoder(
        config,
        layers,
        windows=windows,
        embedding=EmbeddingSpec(scale=embedding),
        logit_scale=1 / logits,
    )


def _describe(config: HFConfig) -> ModelSpec:
    return granite_decoder(config, equal_layers(config, granite_layer(config)))


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
