"""Llama 2 and 3, and the many models with their config: Yi, SmolLM, TinyLlama and others."""

from __future__ import annotations

from costmodel.families._llama import llama_layer
from costmodel.families._shared import decoder, equal_layers, gated_mlp
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    mlp = gated_mlp(config, has_bias=config.flag("mlp_bias"))
    layer = llama_layer(config, mlp, has_bias=config.flag("attention_bias"))
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={**LLAMA_DEFAULTS, "attention_bias": False, "mlp_bias": False},
    describe=_describe,
    modules=LLAMA_MODULES,
)
