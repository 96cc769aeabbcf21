"""Hunyuan, dense: Llama with norms of queries and keys after the rotation."""

from __future__ import annotations

from costmodel.families._hunyuan import HUNYUAN_MODULES, hunyuan_attention
from costmodel.families._shared import decoder, equal_layers, gated_mlp, rms_norm
from costmodel.families._tables import LLAMA_DEFAULTS
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    layer = LayerSpec(
        attention=hunyuan_attention(config), mlp=gated_mlp(config), norm=rms_norm(config)
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
    modules=HUNYUAN_MODULES,
)
