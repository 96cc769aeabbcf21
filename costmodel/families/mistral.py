"""Mistral 7B, Nemo, Small and Large."""

from __future__ import annotations

from costmodel.families._shared import (
    decoder,
    equal_layers,
    gated_mlp,
    llama_attention,
    num_layers,
    rms_norm,
)
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.families._windows import FULL, SLIDING, window_size
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _windows(config: HFConfig) -> list[str] | None:
    """Read whether all layers have the window, or ``layer_types`` names only full attention."""
    kinds = config.layer_types()
    if window_size(config) is None:
        # transformers gives a config with layer_types a mask that needs a window.
        if "layer_types" in config.raw:
            raise config.refusal("sliding_window", None, "a number beside layer_types")
        return None
    is_on = not kinds or SLIDING in kinds
    return [SLIDING if is_on else FULL] * num_layers(config)


def mistral_layer(config: HFConfig) -> LayerSpec:
    """Read a layer of Mistral."""
    return LayerSpec(
        attention=llama_attention(config, takes_null=("head_dim",)),
        mlp=gated_mlp(config),
        norm=rms_norm(config),
    )


def mistral_decoder(config: HFConfig, layer: LayerSpec) -> ModelSpec:
    """Make a model of equal layers, with the windows of Mistral."""
    return decoder(config, equal_layers(config, layer), windows=_windows(config))


def _describe(config: HFConfig) -> ModelSpec:
    return mistral_decoder(config, mistral_layer(config))


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
