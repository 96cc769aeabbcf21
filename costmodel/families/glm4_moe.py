"""GLM-4.5 to 4.7: a sigmoid router with a bias for the choice, dense layers first."""

from __future__ import annotations

from costmodel.families._shared import absent, decoder, llama_attention, rms_norm
from costmodel.families._tables import GLM_DEFAULTS
from costmodel.families._v3_mixture import V3_MODULES, v3_experts, v3_layers
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    attention = llama_attention(
        config,
        takes_null=absent(config, "head_dim"),
        rotary_share=0.5,
        qk_norm="head" if config.flag("use_qk_norm") else "none",
        qkv_bias=config.flag("attention_bias"),
    )
    mixture = v3_experts(config, ("n_routed_experts",))
    return decoder(config, v3_layers(config, attention, mixture, rms_norm(config)))


FAMILY = Family(
    defaults={
        **GLM_DEFAULTS,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
    },
    describe=_describe,
    modules=V3_MODULES,
    # The layer of multi-token prediction follows the others.
    ignores_later_layers=True,
    fixes_tokenizer_class=True,
)
