"""Arcee: Llama with a squared ReLU and no gate."""

from __future__ import annotations

from costmodel.families._llama import llama_layer
from costmodel.families._shared import decoder, equal_layers, plain_mlp
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    mlp = plain_mlp(config, has_bias=config.flag("mlp_bias"))
    layer = llama_layer(config, mlp, has_bias=config.flag("attention_bias"))
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "hidden_size": 2560,
        "intermediate_size": 18432,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    describe=_describe,
    modules={**LLAMA_MODULES, "up": ("layers.{layer}.mlp.up_proj",)},
)
