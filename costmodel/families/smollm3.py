"""SmolLM3: Llama in which every fourth layer has no positions."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._shared import (
    absent,
    decoder,
    gated_mlp,
    llama_attention,
    num_layers,
    rms_norm,
)
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

THETA = 2000000.0


def _describe(config: HFConfig) -> ModelSpec:
    has_bias = config.flag("attention_bias")
    attention = llama_attention(
        config,
        takes_null=("num_key_value_heads", *absent(config, "head_dim")),
        theta=THETA,
        qkv_bias=has_bias,
        output_bias=has_bias,
    )
    layer = LayerSpec(
        attention=attention,
        mlp=gated_mlp(config, has_bias=config.flag("mlp_bias")),
        norm=rms_norm(config),
    )
    without = replace(layer, attention=replace(attention, rotary=None))
    return decoder(config, [layer if rotates else without for rotates in _rotating(config)])


def _rotating(config: HFConfig) -> list[bool]:
    """Read which layers rotate; the key says so in spite of its name."""
    count = num_layers(config)
    listed = config.wholes("no_rope_layers")
    if not listed:
        step = config.whole("no_rope_layer_interval")
        return [(layer + 1) % step != 0 for layer in range(count)]
    if len(listed) != count:
        raise config.refusal("no_rope_layers", listed, f"a list of {count}, one for each layer")
    return [flag != 0 for flag in listed]


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "attention_bias": False,
        "mlp_bias": False,
    },
    describe=_describe,
    modules=LLAMA_MODULES,
)
