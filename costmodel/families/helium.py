"""Helium: Llama with neighbours rotated in pairs."""

from __future__ import annotations

from costmodel.families._shared import decoder, equal_layers, gated_mlp, llama_attention, rms_norm
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    layer = LayerSpec(
        attention=llama_attention(
            config,
            theta=100000.0,
            is_interleaved=True,
            qkv_bias=config.flag("attention_bias"),
        ),
        mlp=gated_mlp(config, has_bias=config.flag("mlp_bias")),
        norm=rms_norm(config),
    )
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 48000,
        "hidden_size": 2560,
        "intermediate_size": 7040,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-8,
        "attention_bias": False,
        "mlp_bias": False,
    },
    describe=_describe,
    modules=LLAMA_MODULES,
)
