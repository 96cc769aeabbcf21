"""Qwen 3: each head of queries and keys is normalised by itself."""

from __future__ import annotations

from costmodel.families._shared import decoder, equal_layers, gated_mlp, llama_attention, rms_norm
from costmodel.families._tables import LLAMA_MODULES, QWEN2_DEFAULTS
from costmodel.families._windows import qwen_windows
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    has_bias = config.flag("attention_bias")
    attention = llama_attention(
        config,
        takes_null=("num_key_value_heads",),
        qk_norm="head",
        qkv_bias=has_bias,
        output_bias=has_bias,
    )
    layer = LayerSpec(attention=attention, mlp=gated_mlp(config), norm=rms_norm(config))
    return decoder(config, equal_layers(config, layer), windows=qwen_windows(config))


FAMILY = Family(
    defaults={**QWEN2_DEFAULTS, "head_dim": 128, "attention_bias": False},
    describe=_describe,
    modules=LLAMA_MODULES,
    tokenizer_class="Qwen2Tokenizer",
)
