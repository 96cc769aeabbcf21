"""What both Hunyuan families share: norms after the rotation, whose base ``alpha`` stretches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from costmodel.families._rotary import rope_keys
from costmodel.families._shared import llama_attention
from costmodel.families._tables import LLAMA_MODULES
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.hf_config import HFConfig

HUNYUAN_MODULES: Mapping[str, tuple[str, ...]] = {
    **LLAMA_MODULES,
    "q_norm": ("layers.{layer}.self_attn.query_layernorm",),
    "k_norm": ("layers.{layer}.self_attn.key_layernorm",),
}


def hunyuan_attention(
    config: HFConfig, takes_null: Sequence[str] = ("num_key_value_heads",)
) -> AttentionSpec:
    """Read the attention of both families.

    Their ``dynamic`` scaling has a fixed ``alpha``: the base of the rotation is that of a context
    ``alpha`` times as long, whatever the length.
    """
    has_bias = config.flag("attention_bias")
    attention = llama_attention(
        config,
        takes_null=takes_null,
        qk_norm="head",
        norms_rotated=True,
        qkv_bias=has_bias,
        output_bias=has_bias,
    )
    found, rotary = rope_keys(config), attention.rotary
    alpha, kind = found.get("alpha"), found.get("rope_type", found.get("type"))
    if not alpha or kind != "dynamic" or rotary is None:
        return attention
    dim = attention.head_dim
    stretch = config.positive("alpha", alpha) ** (dim / (dim - 2))
    return replace(attention, rotary=replace(rotary, theta=rotary.theta * stretch))
