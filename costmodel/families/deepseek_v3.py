"""DeepSeek V3 and R1: latent attention, a sigmoid router with groups, dense layers first."""

from __future__ import annotations

from costmodel.families._latent import LATENT_DEFAULTS, latent_attention, latent_modules
from costmodel.families._shared import decoder, rms_norm
from costmodel.families._v3_mixture import v3_experts, v3_layers
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec

# What the original code makes of these keys, the only ones that transformers reads as well.
ONLY = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}


def describe(config: HFConfig) -> ModelSpec:
    """Describe a model with the keys of DeepSeek V3."""
    for key, value in ONLY.items():
        if config.raw.get(key, value) != value:
            raise config.refusal(key, config.raw[key], str(value))
    attention = latent_attention(
        config,
        is_interleaved=config.flag("rope_interleave"),
        takes_null=("num_key_value_heads",),
    )
    return decoder(config, v3_layers(config, attention, v3_experts(config), rms_norm(config)))


FAMILY = Family(
    defaults={
        **LATENT_DEFAULTS,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "max_position_embeddings": 4096,
        "rope_interleave": True,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
    },
    describe=describe,
    modules=latent_modules,
    # The layers of multi-token prediction follow the others.
    ignores_later_layers=True,
)
