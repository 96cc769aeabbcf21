"""Sarvam 30B: GLM-4.5 with whole heads rotated, and queries, keys and values in one tensor."""

from __future__ import annotations

from costmodel.families._shared import decoder, llama_attention, rms_norm
from costmodel.families._tables import GLM_DEFAULTS
from costmodel.families._v3_mixture import V3_MODULES, v3_experts, v3_layers
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec

THETA = 8000000.0


def _describe(config: HFConfig) -> ModelSpec:
    attention = llama_attention(
        config,
        theta=THETA,
        qk_norm="head" if config.flag("use_qk_norm") else "none",
        qkv_bias=config.flag("use_qkv_bias"),
    )
    mixture = v3_experts(
        config, ("num_local_experts", "num_experts", "n_routed_experts"), "num_shared_experts"
    )
    return decoder(config, v3_layers(config, attention, mixture, rms_norm(config)))


FAMILY = Family(
    defaults={
        **GLM_DEFAULTS,
        "vocab_size": 262144,
        "intermediate_size": 8192,
        "num_hidden_layers": 19,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "moe_intermediate_size": 1024,
        "num_experts_per_tok": 6,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": True,
    },
    aliases={"num_shared_experts": "n_shared_experts", "use_qkv_bias": "attention_bias"},
    describe=_describe,
    modules={
        **V3_MODULES,
        "tokens": ("word_embeddings",),
        "qkv": ("layers.{layer}.attention.query_key_value",),
        "q_norm": ("layers.{layer}.attention.query_layernorm",),
        "k_norm": ("layers.{layer}.attention.key_layernorm",),
        "output": ("layers.{layer}.attention.dense",),
        "router.bias": ("layers.{layer}.mlp.gate.expert_bias",),
    },
    # The layer of multi-token prediction follows the others.
    ignores_later_layers=True,
)
