"""FlexOlmo: OLMoE's experts with norms after each half, as in OLMo 2."""

from __future__ import annotations

from costmodel.families._shared import (
    decoder,
    equal_layers,
    rms_norm,
)
from costmodel.families._tables import EXPERTS_MODULES, LLAMA_DEFAULTS, OLMO2_MODULES
from costmodel.families.olmo2 import olmo2_attention
from costmodel.families.olmoe import olmoe_experts
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

THETA = 500000.0


def _describe(config: HFConfig) -> ModelSpec:
    layer = LayerSpec(
        attention=olmo2_attention(config, THETA),
        experts=olmoe_experts(config),
        norm=rms_norm(config),
        norm_places=("after",),
    )
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 100352,
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "num_experts_per_tok": 5,
        "num_experts": 7,
        "norm_topk_prob": False,
    },
    describe=_describe,
    modules={**EXPERTS_MODULES, **OLMO2_MODULES},
    fixes_tokenizer_class=True,
)
