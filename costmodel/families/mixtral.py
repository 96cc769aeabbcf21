"""Mixtral 8x7B and 8x22B."""

from __future__ import annotations

from costmodel.families._shared import decoder, equal_layers, experts, llama_attention, rms_norm
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.families._windows import only_window
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    layer = LayerSpec(
        attention=llama_attention(config, takes_null=("head_dim",), theta=1e6),
        experts=experts(
            config,
            count_keys=("num_experts", "num_local_experts"),
            size_key="intermediate_size",
            router=RouterSpec(rounds_weights=False),
        ),
        norm=rms_norm(config),
    )
    return decoder(config, equal_layers(config, layer), windows=only_window(config))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
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
