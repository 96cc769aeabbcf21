"""Phi-3.5-MoE: LayerNorm, and two experts that are chosen one after the other."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._rotary import rope_keys
from costmodel.families._shared import (
    absent,
    decoder,
    equal_layers,
    experts,
    layer_norm,
    llama_attention,
)
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.families._windows import only_window
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

THETA = 1000000.0
CHOSEN = 2


def _attention(config: HFConfig) -> AttentionSpec:
    has_bias = config.flag("attention_bias")
    attention = llama_attention(
        config,
        takes_null=absent(config, "head_dim"),
        theta=THETA,
        rotary_kinds={"default": "default", "longrope": "longrope"},
        qkv_bias=has_bias,
        output_bias=has_bias,
    )
    rotary = attention.rotary
    if rotary is None or rotary.kind != "longrope":
        return attention
    found = rope_keys(config)
    short, long = (config.positive(key, found.get(key)) for key in ("short_mscale", "long_mscale"))
    if short != long:
        raise config.refusal("long_mscale", long, f"{short}, as short_mscale")
    # Unlike in Phi 3, transformers has the short factors at any length.
    return replace(
        attention,
        rotary=replace(rotary, long_factors=rotary.short_factors, attention_factor=short),
    )


def _describe(config: HFConfig) -> ModelSpec:
    chosen = config.whole("num_experts_per_tok")
    if chosen != CHOSEN:
        raise config.refusal("num_experts_per_tok", chosen, str(CHOSEN))
    norm = layer_norm(config, "rms_norm_eps")
    layer = LayerSpec(
        attention=_attention(config),
        experts=experts(
            config,
            count_keys=("num_local_experts",),
            size_key="intermediate_size",
            router=RouterSpec(renormalises=False, jitter=config.number("router_jitter_noise")),
        ),
        norm=norm,
    )
    return decoder(
        config,
        equal_layers(config, layer),
        windows=only_window(config),
        final_norm=norm,
        head_bias=config.flag("lm_head_bias"),
    )


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 32064,
        "intermediate_size": 6400,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 16,
        "router_jitter_noise": 0.01,
        "attention_bias": False,
        "lm_head_bias": False,
    },
    describe=_describe,
    modules={
        **LLAMA_MODULES,
        "router": ("layers.{layer}.block_sparse_moe.gate",),
        "expert_gate_up": (
            "layers.{layer}.block_sparse_moe.experts.{expert}.w1",
            "layers.{layer}.block_sparse_moe.experts.{expert}.w3",
        ),
        "expert_down": ("layers.{layer}.block_sparse_moe.experts.{expert}.w2",),
    },
    fixes_tokenizer_class=True,
)
