"""Llama 2 and 3, and the many models with their config: Yi, SmolLM, TinyLlama and others."""

from __future__ import annotations

from costmodel.families._shared import decoder, equal_layers, gated_mlp, llama_attention, rms_norm
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    if hidden % heads:
        raise config.refusal("hidden_size", hidden, f"a multiple of the {heads} heads")
    has_bias = config.flag("attention_bias")
    attention = llama_attention(
        config,
        takes_null=("num_key_value_heads", "head_dim"),
        qkv_bias=has_bias,
        output_bias=has_bias,
    )
    mlp = gated_mlp(config, has_bias=config.flag("mlp_bias"))
    layer = LayerSpec(attention=attention, mlp=mlp, norm=rms_norm(config))
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={**LLAMA_DEFAULTS, "attention_bias": False, "mlp_bias": False},
    describe=_describe,
    modules=LLAMA_MODULES,
)
