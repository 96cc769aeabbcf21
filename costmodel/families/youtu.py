"""Youtu-LLM: latent attention as in DeepSeek V3, without experts."""

from __future__ import annotations

from costmodel.families._latent import LATENT_DEFAULTS, latent_attention, latent_modules
from costmodel.families._shared import decoder, equal_layers, gated_mlp, rms_norm
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    layer = LayerSpec(
        attention=latent_attention(config, is_interleaved=config.flag("rope_interleave")),
        mlp=gated_mlp(config),
        norm=rms_norm(config),
    )
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={
        **LATENT_DEFAULTS,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_interleave": True,
    },
    describe=_describe,
    modules=latent_modules,
)
