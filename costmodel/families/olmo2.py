"""OLMo 2: norms after each half of a layer, and one norm over all heads of queries or keys."""

from __future__ import annotations

from costmodel.families._rotary import DEFAULT_THETA
from costmodel.families._shared import (
    absent,
    decoder,
    equal_layers,
    gated_mlp,
    llama_attention,
    rms_norm,
)
from costmodel.families._tables import LLAMA_DEFAULTS, OLMO2_MODULES
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def olmo2_attention(config: HFConfig, theta: float = DEFAULT_THETA) -> AttentionSpec:
    """Read attention with one norm over all heads of the queries, and one over those of the keys.

    ``theta`` is the base of the rotation where the config names none.
    """
    has_bias = config.flag("attention_bias")
    return llama_attention(
        config,
        takes_null=("num_key_value_heads", *absent(config, "head_dim")),
        theta=theta,
        qk_norm="projection",
        qkv_bias=has_bias,
        output_bias=has_bias,
    )


def _describe(config: HFConfig) -> ModelSpec:
    layer = LayerSpec(
        attention=olmo2_attention(config),
        mlp=gated_mlp(config),
        norm=rms_norm(config),
        norm_places=("after",),
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
