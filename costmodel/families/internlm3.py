"""InternLM 3: Llama, whose config has two names for the flags of biases."""

from __future__ import annotations

from costmodel.families._llama import llama_layer
from costmodel.families._shared import decoder, equal_layers, gated_mlp
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    config = config.renamed({"qkv_bias": "attention_bias", "bias": "mlp_bias"})
    has_bias = config.flag("attention_bias")
    if config.flag("mlp_bias") != has_bias:
        raise config.refusal("mlp_bias", not has_bias, f"{str(has_bias).lower()} as attention_bias")
    layer = llama_layer(config, gated_mlp(config, has_bias=has_bias), has_bias=has_bias)
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 128512,
        "intermediate_size": 10240,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    describe=_describe,
    modules=LLAMA_MODULES,
    fixes_tokenizer_class=True,
)
