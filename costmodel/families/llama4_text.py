"""Llama 4, the text model: attention in chunks, layers without positions, one expert a token."""

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
from costmodel.families._tables import EXPERTS_MODULES, LLAMA_DEFAULTS
from costmodel.families._windows import FULL
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec
from costmodel.model.stacked import StackedTensor

THETA = 500000.0
CHUNKED = "chunked_attention"


def _rotated_layers(config: HFConfig) -> list[bool]:
    """Read which layers have rotary positions."""
    count, step = num_layers(config), config.whole("no_rope_layer_interval")
    found = config.wholes("no_rope_layers") or [int((i + 1) % step != 0) for i in range(count)]
    if len(found) < count:
        raise config.refusal("no_rope_layers", found, f"a list of at least {count} numbers")
    return [bool(number) for number in found[:count]]


def _chunked_layers(config: HFConfig, is_rotated: list[bool]) -> list[bool]:
    """Read which layers attend in chunks."""
    found = config.raw.get("layer_types")
    if found is None:
        has_chunks = config.get("attention_chunk_size") is not None
        return [has_chunks and rotated for rotated in is_rotated]
    if not isinstance(found, list) or len(found) != len(is_rotated):
        count = len(is_rotated)
        raise config.refusal("layer_types", found, f"a list of {count}, one for each layer")
    for kind in found:
        if kind not in (CHUNKED, FULL):
            raise config.refusal("layer_types", kind, f"{CHUNKED}, {FULL}")
    return [kind == CHUNKED for kind in found]


def _attentions(config: HFConfig) -> list[AttentionSpec]:
    """Read the attention of each layer."""
    has_bias = config.flag("attention_bias")
    plain = llama_attention(
        config, theta=THETA, is_interleaved=True, qkv_bias=has_bias, output_bias=has_bias
    )
    normed = config.flag("use_qk_norm")
    rotated = replace(
        plain,
        qk_norm="head" if normed else "none",
        qk_norm_spec=replace(rms_norm(config), has_weight=False),
        norms_rotated=True,
    )
    floor, strength = config.whole("floor_scale"), config.number("attn_scale")
    tuned = replace(
        plain,
        rotary=None,
        temperature_floor=floor if config.flag("attn_temperature_tuning") else None,
        temperature_strength=strength,
    )
    is_rotated = _rotated_layers(config)
    is_chunked = _chunked_layers(config, is_rotated)
    window = config.whole("attention_chunk_size") if any(is_chunked) else None
    if window is None or window >= config.whole("max_position_embeddings"):
        return [rotated if turned else tuned for turned in is_rotated]
    return [
        replace(rotated if turned else tuned, window=window, is_chunked=True)
        if chunked
        else (rotated if turned else tuned)
        for turned, chunked in zip(is_rotated, is_chunked, strict=True)
    ]


def _sparse_layers(config: HFConfig) -> set[int]:
    """Read the numbers of the layers with experts."""
    if config.get("moe_layers") is not None:
        return set(config.wholes("moe_layers"))
    step = config.whole("interleave_moe_layer_step")
    return set(range(step - 1, num_layers(config), step))


def _describe(config: HFConfig) -> ModelSpec:
    norm, dense = rms_norm(config), gated_mlp(config, "intermediate_size_mlp")
    mixture = experts(
        config,
        count_keys=("num_local_experts",),
        size_key="intermediate_size",
        router=RouterSpec(
            score="sigmoid", selects_first=True, renormalises=False, scales_input=True
        ),
        shared=gated_mlp(config),
    )
    sparse = _sparse_layers(config)
    layers = [
        LayerSpec(attention=attention, experts=mixture, norm=norm)
        if i in sparse
        else LayerSpec(attention=attention, mlp=dense, norm=norm)
        for i, attention in enumerate(_attentions(config))
    ]
    # Chunks are no windows.
    return decoder(config, layers, windows=[FULL] * len(layers))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "moe_layers": None,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "layer_types": None,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "attention_bias": False,
    },
    describe=_describe,
    modules={
        **EXPERTS_MODULES,
        "gate_up": (
            "layers.{layer}.feed_forward.gate_proj",
            "layers.{layer}.feed_forward.up_proj",
        ),
        "down": ("layers.{layer}.feed_forward.down_proj",),
        "router": ("layers.{layer}.feed_forward.router",),
        "shared_gate_up": (
            "layers.{layer}.feed_forward.shared_expert.gate_proj",
            "layers.{layer}.feed_forward.shared_expert.up_proj",
        ),
        "shared_down": ("layers.{layer}.feed_forward.shared_expert.down_proj",),
        "expert_gate_up.weight": ("layers.{layer}.feed_forward.experts.gate_up_proj",),
        "expert_down.weight": ("layers.{layer}.feed_forward.experts.down_proj",),
    },
    stacked={
        "expert_gate_up.weight": StackedTensor(is_transposed=True),
        "expert_down.weight": StackedTensor(is_transposed=True),
    },
)
