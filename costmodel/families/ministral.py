"""Ministral: Mistral in which the config says which layers have the window."""

from __future__ import annotations

from costmodel.families._shared import decoder, equal_layers, gated_mlp, llama_attention, rms_norm
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.families._windows import SLIDING
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    # transformers makes the mask of windows even where no layer has one.
    config.whole("sliding_window")
    layer = LayerSpec(
        attention=llama_attention(config, takes_null=("num_key_value_heads",)),
        mlp=gated_mlp(config),
        norm=rms_norm(config),
    )
    layers = equal_layers(config, layer)
    return decoder(config, layers, windows=config.layer_types() or [SLIDING] * len(layers))


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
