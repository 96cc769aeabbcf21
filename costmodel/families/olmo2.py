"""OLMo 2: norms after each half of a layer, and one norm over all heads of queries or keys."""

from __future__ import annotations

from costmodel.families._shared import (
    absent,
    decoder,
    equal_layers,
    gated_mlp,
    llama_attention,
    rms_norm,
)
from costmodel.families._tables import LLAMA_DEFAULTS, OLMO2_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    has_bias = config.flag("attention_bias")
    attention = llama_attention(
        config,
        takes_null=("num_key_value_heads", *absent(config, "head_dim")),
        qk_norm="projection",
        qkv_bias=has_bias,
        output_bias=has_bias,
    )
    layer = LayerSpec(
        attention=attention, mlp=gated_mlp(config), norm=rms_norm(config), norm_places=("after",)
    )
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 50304,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
    },
    describe=_describe,
    modules=OLMO2_MODULES,
    fixes_tokenizer_class=True,
)
