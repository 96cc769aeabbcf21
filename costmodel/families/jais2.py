"""Jais 2: Llama with LayerNorm, biases, and a squared ReLU without a gate."""

from __future__ import annotations

from costmodel.families._llama import llama_layer
from costmodel.families._shared import decoder, equal_layers, layer_norm, plain_mlp
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    norm = layer_norm(config)
    mlp = plain_mlp(config, has_bias=config.flag("mlp_bias"))
    layer = llama_layer(config, mlp, norm=norm, has_bias=config.flag("attention_bias"))
    return decoder(config, equal_layers(config, layer), final_norm=norm)


FAMILY = Family(
    defaults={
        **{key: value for key, value in LLAMA_DEFAULTS.items() if key != "rms_norm_eps"},
        "vocab_size": 150272,
        "hidden_size": 3328,
        "intermediate_size": 26624,
        "num_attention_heads": 26,
        "hidden_act": "relu2",
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "attention_bias": True,
        "mlp_bias": True,
    },
    describe=_describe,
    modules={**LLAMA_MODULES, "up": ("layers.{layer}.mlp.up_proj",)},
    tokenizer_class="GPT2Tokenizer",
)
