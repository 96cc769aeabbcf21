"""Qwen 2 and 2.5: biases on queries, keys and values, which no key of the config turns off."""

from __future__ import annotations

from costmodel.families._shared import (
    absent,
    decoder,
    equal_layers,
    gated_mlp,
    llama_attention,
    rms_norm,
)
from costmodel.families._tables import LLAMA_MODULES, QWEN2_DEFAULTS
from costmodel.families._windows import qwen_windows
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    takes_null = ["num_key_value_heads", *absent(config, "head_dim")]
    layer = LayerSpec(
        attention=llama_attention(config, takes_null=takes_null, qkv_bias=True),
        mlp=gated_mlp(config),
        norm=rms_norm(config),
    )
    return decoder(config, equal_layers(config, layer), windows=qwen_windows(config))


FAMILY = Family(
    defaults=QWEN2_DEFAULTS,
    describe=_describe,
    modules=LLAMA_MODULES,
    tokenizer_class="Qwen2Tokenizer",
    fixes_tokenizer_class=True,
)
