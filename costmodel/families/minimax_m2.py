"""MiniMax-M2: a sigmoid router with a bias for the choice; one norm over all heads of queries."""

from __future__ import annotations

from costmodel.families._shared import decoder, equal_layers, experts, llama_attention, rms_norm
from costmodel.families._tables import EXPERTS_MODULES, LLAMA_DEFAULTS
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

THETA = 5000000.0


def _describe(config: HFConfig) -> ModelSpec:
    head_dim = config.whole("head_dim")
    layer = LayerSpec(
        attention=llama_attention(
            config,
            theta=THETA,
            # The checkpoints of its makers say how many elements are rotated.
            rotary_share=config.whole("rotary_dim", instead_of_null=head_dim) / head_dim,
            qk_norm="projection",
        ),
        experts=experts(
            config,
            count_keys=("num_experts", "num_local_experts"),
            size_key="intermediate_size",
            router=RouterSpec(score="sigmoid", has_bias=True, rounds_weights=False),
        ),
        norm=rms_norm(config),
    )
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 196608,
        "num_experts_per_tok": 8,
        "num_local_experts": 256,
    },
    describe=_describe,
    modules={
        **EXPERTS_MODULES,
        "router": ("layers.{layer}.block_sparse_moe.gate",),
        "router.bias": ("layers.{layer}.block_sparse_moe.e_score_correction_bias",),
        "expert_gate_up": (
            "layers.{layer}.block_sparse_moe.experts.{expert}.w1",
            "layers.{layer}.block_sparse_moe.experts.{expert}.w3",
        ),
        "expert_down": ("layers.{layer}.block_sparse_moe.experts.{expert}.w2",),
    },
    fixes_tokenizer_class=True,
)
