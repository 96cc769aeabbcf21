"""OLMoE: one norm over all heads of the queries, and one over those of the keys."""

from __future__ import annotations

from costmodel.families._shared import (
    decoder,
    equal_layers,
    experts,
    rms_norm,
)
from costmodel.families._tables import EXPERTS_MODULES, LLAMA_DEFAULTS
from costmodel.families.olmo2 import olmo2_attention
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import ExpertsSpec, RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def olmoe_experts(config: HFConfig) -> ExpertsSpec:
    """Read the mixture of experts."""
    return experts(
        config,
        count_keys=("num_local_experts", "num_experts"),
        size_key="intermediate_size",
        router=RouterSpec(renormalises=config.flag("norm_topk_prob")),
    )


def _describe(config: HFConfig) -> ModelSpec:
    if config.get("clip_qkv") is not None:
        raise config.refusal("clip_qkv", config.get("clip_qkv"), "null")
    attention = olmo2_attention(config)
    hidden = config.whole("hidden_size")
    if attention.query_size != hidden:
        raise config.refusal("hidden_size", hidden, "num_attention_heads times head_dim")
    layer = LayerSpec(
        attention=attention,
        experts=olmoe_experts(config),
        norm=rms_norm(config),
    )
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts_per_tok": 8,
        "num_experts": 64,
        "norm_topk_prob": False,
    },
    describe=_describe,
    modules=EXPERTS_MODULES,
    tokenizer_class="GPTNeoXTokenizer",
)
