"""NanoChat: norms without weights, rotations backwards, and a squared ReLU without a gate."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._shared import (
    absent,
    decoder,
    equal_layers,
    llama_attention,
    plain_mlp,
    rms_norm,
    soft_cap,
)
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    has_bias = config.flag("attention_bias")
    norm = replace(rms_norm(config), has_weight=False)
    attention = llama_attention(
        config,
        takes_null=("num_key_value_heads", *absent(config, "head_dim")),
        qk_norm="head",
        norms_rotated=True,
        qkv_bias=has_bias,
        output_bias=has_bias,
    )
    assert attention.rotary is not None
    layer = LayerSpec(
        attention=replace(attention, rotary=replace(attention.rotary, is_inverse=True)),
        mlp=plain_mlp(config, has_bias=False),
        norm=norm,
    )
    return decoder(
        config,
        equal_layers(config, layer),
        embedding=EmbeddingSpec(norm=norm),
        final_norm=norm,
        soft_cap=soft_cap(config, "final_logit_softcapping"),
    )


FAMILY = Family(
    defaults={
        **{key: value for key, value in LLAMA_DEFAULTS.items() if key != "head_dim"},
        "vocab_size": 50304,
        "hidden_size": 768,
        "intermediate_size": 8192,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "hidden_act": "relu2",
        "final_logit_softcapping": 15.0,
        "attention_bias": False,
    },
    describe=_describe,
    modules={
        **LLAMA_MODULES,
        "up": ("layers.{layer}.mlp.fc1",),
        "down": ("layers.{layer}.mlp.fc2",),
    },
)
