"""What both Granite mixtures share: four multipliers, and one tensor for all experts of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from costmodel.families._shared import equal_layers, experts, gated_mlp
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.families.granite import MULTIPLIERS, granite_decoder, granite_layer
from costmodel.model.feed_forward_spec import MlpSpec, RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec
from costmodel.model.stacked import StackedTensor

GRANITE_MOE_DEFAULTS: Mapping[str, Any] = {
    **LLAMA_DEFAULTS,
    "attention_bias": False,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    **dict.fromkeys(MULTIPLIERS, 1.0),
}
GRANITE_MOE_MODULES: Mapping[str, tuple[str, ...]] = {
    **LLAMA_MODULES,
    "router": ("layers.{layer}.block_sparse_moe.router.layer",),
    "expert_gate_up": ("layers.{layer}.block_sparse_moe.input_linear",),
    "expert_down": ("layers.{layer}.block_sparse_moe.output_linear",),
}
GRANITE_MOE_STACKED = {
    "expert_gate_up.weight": StackedTensor(),
    "expert_down.weight": StackedTensor(),
}


def granite_moe_layer(config: HFConfig, shared: MlpSpec | None = None) -> LayerSpec:
    """Read a layer of a Granite mixture; ``shared`` is its shared expert."""
    mixture = experts(
        config,
        count_keys=("num_local_experts",),
        size_key="intermediate_size",
        router=RouterSpec(selects_first=True, renormalises=False),
        shared=shared,
    )
    return granite_layer(config, mixture)


def granite_moe(config: HFConfig, shared: MlpSpec | None = None) -> ModelSpec:
    """Read a Granite mixture; ``shared`` is its shared expert."""
    return granite_decoder(config, equal_layers(config, granite_moe_layer(config, shared)))


def shared_expert(config: HFConfig) -> MlpSpec | None:
    """Read the shared expert; a size of zero is none."""
    key = "shared_intermediate_size"
    return gated_mlp(config, key) if config.whole(key, least=0) else None
