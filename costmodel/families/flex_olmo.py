"""FlexOlmo: OLMoE's experts with norms after each half, as in OLMo 2."""

from __future__ import annotations

from costmodel.families._shared import (
    absent,
    decoder,
    equal_layers,
    experts,
    llama_attention,
    rms_norm,
)
from costmodel.families._tables import EXPERTS_MODULES, LLAMA_DEFAULTS, OLMO2_MODULES
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

THETA = 500000.0


def _describe(config: HFConfig) -> ModelSpec:
    has_bias = config.flag("attention_bias")
    layer = LayerSpec(
        attention=llama_attention(
            config,
            takes_null=("num_key_value_heads", *absent(config, "head_dim")),
            theta=THETA,
            qk_norm="projection",
            qkv_bias=has_bias,
            output_bias=has_bias,
        ),
        experts=experts(
            config,
            count_keys=("num_local_experts", "num_experts"),
            size_key="intermediate_size",
            router=RouterSpec(renormalises=config.flag("norm_topk_prob")),
        ),
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
