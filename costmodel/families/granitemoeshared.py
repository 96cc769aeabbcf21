"""Granite with experts, and a shared expert beside them."""

from __future__ import annotations

from costmodel.families._granite_moe import (
    GRANITE_MOE_DEFAULTS,
    GRANITE_MOE_MODULES,
    GRANITE_MOE_STACKED,
    granite_moe,
    shared_expert,
)
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    return granite_moe(config, shared_expert(config))


FAMILY = Family(
    defaults={**GRANITE_MOE_DEFAULTS, "shared_intermediate_size": 0},
    describe=_describe,
    modules={
        **GRANITE_MOE_MODULES,
        "shared_gate_up": ("layers.{layer}.shared_mlp.input_linear",),
        "shared_down": ("layers.{layer}.shared_mlp.output_linear",),
    },
    stacked=GRANITE_MOE_STACKED,
    fixes_tokenizer_class=True,
)
