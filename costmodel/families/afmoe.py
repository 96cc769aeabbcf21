"""Arcee's Trinity: windows with rotary positions, full layers without, gated attention."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._shared import (
    decoder,
    experts,
    gated_mlp,
    llama_attention,
    num_layers,
    rms_norm,
)
from costmodel.families._tables import LLAMA_DEFAULTS
from costmodel.families._v3_mixture import V3_MODULES
from costmodel.families._windows import SLIDING, full_every
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import ExpertsSpec, RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec

SIZE = "moe_intermediate_size"


def _experts(config: HFConfig) -> ExpertsSpec:
    return experts(
        config,
        count_keys=("num_experts",),
        size_key=SIZE,
        router=RouterSpec(
            score="sigmoid",
            scale=config.number("route_scale"),
            has_bias=True,
            rounds_weights=False,
        ),
        shared=gated_mlp(config, SIZE, times=config.whole("num_shared_experts")),
    )


def _describe(config: HFConfig) -> ModelSpec:
    has_bias, norm = config.flag("attention_bias"), rms_norm(config)
    rotated = llama_attention(
        config,
        takes_null=("num_key_value_heads",),
        qk_norm="head",
        qkv_bias=has_bias,
        output_bias=has_bias,
        has_output_gate=True,
    )
    kinds = full_every(config, config.whole("global_attn_every_n_layers"))
    dense, mixture = gated_mlp(config), _experts(config)
    first = config.whole("num_dense_layers", least=0)
    layers = [
        LayerSpec(
            attention=rotated if kinds[i] == SLIDING else replace(rotated, rotary=None),
            mlp=dense if i < first else None,
            experts=None if i < first else mixture,
            norm=norm,
            norm_places=("before", "after"),
        )
        for i in range(num_layers(config))
    ]
    is_scaled = config.flag("mup_enabled")
    scale = config.whole("hidden_size") ** 0.5 if is_scaled else 1.0
    return decoder(config, layers, windows=kinds, embedding=EmbeddingSpec(scale=scale))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 200192,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "head_dim": 128,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "moe_intermediate_size": 1408,
        "num_dense_layers": 1,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "num_shared_experts": 2,
        "route_scale": 1.0,
        "global_attn_every_n_layers": 4,
        "sliding_window": 1024,
        "layer_types": None,
        "mup_enabled": False,
    },
    describe=_describe,
    modules={
        **V3_MODULES,
        "attention_gate": ("layers.{layer}.self_attn.gate_proj",),
        "attention_output_norm": ("layers.{layer}.post_attention_layernorm",),
        "mlp_norm": ("layers.{layer}.pre_mlp_layernorm",),
        "mlp_output_norm": ("layers.{layer}.post_mlp_layernorm",),
        "router": ("layers.{layer}.mlp.router.gate",),
        "router.bias": ("layers.{layer}.mlp.expert_bias",),
    },
)
