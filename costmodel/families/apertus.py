"""Apertus: Llama with norms of heads, and xIELU without a gate."""

from __future__ import annotations

from costmodel.families._rotary import with_rotary_keys
from costmodel.families._shared import (
    absent,
    decoder,
    equal_layers,
    llama_attention,
    plain_mlp,
    rms_norm,
)
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.model.family import ROTARY_BUFFERS, Family
from costmodel.model.feed_forward_spec import MlpSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

THETA = 12000000.0
ROTARY_KEYS = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _mlp(config: HFConfig) -> MlpSpec:
    if config.get("hidden_act") != "xielu":
        return plain_mlp(config, has_bias=False)
    size = config.whole("intermediate_size")
    return MlpSpec(size=size, activation="xielu", is_gated=False)


def _describe(config: HFConfig) -> ModelSpec:
    has_bias = config.flag("attention_bias")
    layer = LayerSpec(
        attention=llama_attention(
            with_rotary_keys(config, ROTARY_KEYS),
            takes_null=("num_key_value_heads", *absent(config, "head_dim")),
            theta=THETA,
            qk_norm="head",
            qkv_bias=has_bias,
            output_bias=has_bias,
        ),
        mlp=_mlp(config),
        norm=rms_norm(config),
    )
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={
        **{key: value for key, value in LLAMA_DEFAULTS.items() if key != "head_dim"},
        "vocab_size": 131072,
        "intermediate_size": 14336,
        "hidden_act": "xielu",
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
    },
    describe=_describe,
    modules={
        **LLAMA_MODULES,
        "attention_norm": ("layers.{layer}.attention_layernorm",),
        "mlp_norm": ("layers.{layer}.feedforward_layernorm",),
        "up": ("layers.{layer}.mlp.up_proj",),
        "xielu.positive": ("layers.{layer}.mlp.act_fn.alpha_p",),
        "xielu.negative": ("layers.{layer}.mlp.act_fn.alpha_n",),
    },
    # Constants of xIELU, which checkpoints store in each layer.
    unread=(ROTARY_BUFFERS, r".*\.mlp\.act_fn\.(beta|eps)"),
)
