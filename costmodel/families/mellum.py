"""Mellum 2: Qwen 3 with experts, with windows, and a rotation of their own in layers with one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from costmodel.families._layer_kinds import listed_sparse_layers
from costmodel.families._rotary import rotary_keys_of
from costmodel.families._shared import (
    absent,
    decoder,
    experts,
    gated_mlp,
    llama_attention,
    num_layers,
    rms_norm,
)
from costmodel.families._tables import EXPERTS_MODULES
from costmodel.families._windows import FULL, SLIDING
from costmodel.families.qwen3_moe import FAMILY as QWEN3_MOE
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import ROTARY_BUFFERS, Family
from costmodel.model.feed_forward_spec import RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

THETAS = {FULL: 500000.0, SLIDING: 10000.0}
# Keys of Qwen 3 that this family does not have.
ABSENT = ("use_sliding_window", "decoder_sparse_step", "mlp_only_layers", "head_dim")


def _attention(config: HFConfig, kind: str) -> AttentionSpec:
    if "rope_scaling" in config.raw:
        raise config.refusal("rope_scaling", config.raw["rope_scaling"], "rope_parameters instead")
    nested = config.raw.get("rope_parameters")
    if nested is not None and not (
        isinstance(nested, Mapping)
        and isinstance(nested.get(kind), Mapping)
        and {"rope_type", "rope_theta"} <= set(nested[kind])
    ):
        raise config.refusal("rope_parameters", nested, f"rope_type and rope_theta of {kind}")
    has_bias = config.flag("attention_bias")
    return llama_attention(
        rotary_keys_of(config, kind, None, THETAS[kind], is_scaled=False),
        takes_null=absent(config, "head_dim"),
        qk_norm="head",
        qkv_bias=has_bias,
        output_bias=has_bias,
    )


def _describe(config: HFConfig) -> ModelSpec:
    kinds = config.layer_types() or [FULL] * num_layers(config)
    attention = {kind: _attention(config, kind) for kind in set(kinds)}
    dense = LayerSpec(attention=attention[kinds[0]], mlp=gated_mlp(config), norm=rms_norm(config))
    sparse = replace(
        dense,
        mlp=None,
        experts=experts(
            config,
            count_keys=("num_local_experts", "num_experts"),
            size_key="moe_intermediate_size",
            router=RouterSpec(renormalises=config.flag("norm_topk_prob")),
        ),
    )
    listed = listed_sparse_layers(config, num_dense=0)
    layers = [
        replace(sparse if is_sparse else dense, attention=attention[kind])
        for kind, is_sparse in zip(kinds, listed, strict=True)
    ]
    return decoder(config, layers, windows=kinds)


FAMILY = Family(
    defaults={
        **{key: value for key, value in QWEN3_MOE.defaults.items() if key not in ABSENT},
        "vocab_size": 98304,
        "hidden_size": 2304,
        "intermediate_size": 7168,
        "num_hidden_layers": 28,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
        "moe_intermediate_size": 896,
        "num_experts": 64,
        "norm_topk_prob": True,
        "mlp_layer_types": None,
    },
    describe=_describe,
    modules=EXPERTS_MODULES,
    # The layer of multi-token prediction.
    unread=(ROTARY_BUFFERS, r"mtp\..*"),
)
