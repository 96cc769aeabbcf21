"""Hunyuan, dense: Llama with norms of queries and keys after the rotation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from costmodel.families._rotary import DEFAULT_THETA
from costmodel.families._shared import (
    LLAMA_DEFAULTS,
    LLAMA_MODULES,
    decoder,
    equal_layers,
    gated_mlp,
    llama_attention,
    rms_norm,
)
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _with_stretched_base(config: HFConfig) -> HFConfig:
    """Return a config whose base of the rotation has the factor that ``alpha`` gives it.

    Checkpoints name the kind ``dynamic``, although the base is fixed (NTK-aware scaling).
    """
    for key in ("rope_scaling", "rope_parameters"):
        keys = config.raw.get(key)
        # As elsewhere, the older key wins where it says anything.
        if not keys or not isinstance(keys, Mapping):
            continue
        alpha = keys.get("alpha")
        if not alpha or keys.get("rope_type", keys.get("type")) != "dynamic":
            return config
        dim = config.whole("head_dim", least=4)
        base = keys.get("rope_theta", config.raw.get("rope_theta", DEFAULT_THETA))
        stretched = config.positive("rope_theta", base) * config.positive("alpha", alpha) ** (
            dim / (dim - 2)
        )
        made = {**keys, "rope_type": "default", "rope_theta": stretched}
        return replace(config, raw={**config.raw, key: made})
    return config


def _describe(config: HFConfig) -> ModelSpec:
    has_bias = config.flag("attention_bias")
    layer = LayerSpec(
        attention=llama_attention(
            _with_stretched_base(config),
            takes_null=("num_key_value_heads",),
            qk_norm="head",
            norms_rotated=True,
            qkv_bias=has_bias,
            output_bias=has_bias,
        ),
        mlp=gated_mlp(config),
        norm=rms_norm(config),
    )
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 290943,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
    },
    describe=_describe,
    modules={
        **LLAMA_MODULES,
        "q_norm": ("layers.{layer}.self_attn.query_layernorm",),
        "k_norm": ("layers.{layer}.self_attn.key_layernorm",),
    },
)
