"""Solar Open: Llama's attention with the experts of DeepSeek-V3 in every layer."""

from __future__ import annotations

from costmodel.families._shared import decoder, equal_layers, llama_attention, rms_norm
from costmodel.families._tables import LLAMA_DEFAULTS
from costmodel.families._v3_mixture import V3_MODULES, v3_experts
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

THETA = 1000000.0


def _describe(config: HFConfig) -> ModelSpec:
    layer = LayerSpec(
        attention=llama_attention(config, theta=THETA, qkv_bias=config.flag("attention_bias")),
        experts=v3_experts(config),
        norm=rms_norm(config),
    )
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={
        **{k: v for k, v in LLAMA_DEFAULTS.items() if k != "intermediate_size"},
        "vocab_size": 196608,
        "num_hidden_layers": 48,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "moe_intermediate_size": 1280,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    describe=_describe,
    modules=V3_MODULES,
)
