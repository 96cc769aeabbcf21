"""Granite with experts and windows: sinks, and a base of the rotation for each layer."""

from __future__ import annotations

from costmodel.families._granite_moe import (
    GRANITE_MOE_MODULES,
    granite_moe_layer,
    shared_expert,
)
from costmodel.families.granite_swa import THETAS_KEY, with_sinks
from costmodel.families.granitemoeshared import FAMILY as SHARED
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    return with_sinks(config, granite_moe_layer(config, shared_expert(config)))


FAMILY = Family(
    defaults={**SHARED.defaults, "sliding_window": 128, THETAS_KEY: None},
    describe=_describe,
    modules={
        **GRANITE_MOE_MODULES,
        "shared_gate_up": ("layers.{layer}.shared_mlp.input_linear",),
        "shared_down": ("layers.{layer}.shared_mlp.output_linear",),
        "attention.sinks": ("layers.{layer}.self_attn.sinks",),
        "router": ("layers.{layer}.block_sparse_moe.router",),
        "expert_gate_up.weight": ("layers.{layer}.block_sparse_moe.experts.gate_up_proj",),
        "expert_down.weight": ("layers.{layer}.block_sparse_moe.experts.down_proj",),
    },
    stacked=SHARED.stacked,
)
