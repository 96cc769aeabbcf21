"""Mistral 7B, Nemo, Small and Large."""

from __future__ import annotations

from costmodel.families._shared import (
    LLAMA_DEFAULTS,
    LLAMA_MODULES,
    decoder,
    equal_layers,
    gated_mlp,
    llama_attention,
    mistral_window,
    rms_norm,
)
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    layer = LayerSpec(
        attention=llama_attention(config, takes_null=("head_dim",)),
        mlp=gated_mlp(config),
        norm=rms_norm(config),
    )
    return decoder(config, equal_layers(config, layer), window=mistral_window(config))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    describe=_describe,
    modules=LLAMA_MODULES,
    fixes_tokenizer_class=True,
)
