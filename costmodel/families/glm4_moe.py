"""GLM-4.5 to 4.7: a sigmoid router with a bias for the choice, dense layers first."""

from __future__ import annotations

from costmodel.families._shared import (
    absent,
    decoder,
    experts,
    gated_mlp,
    llama_attention,
    num_layers,
    rms_norm,
)
from costmodel.families._tables import EXPERTS_MODULES, GLM_DEFAULTS
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    norm = rms_norm(config)
    attention = llama_attention(
        config,
        takes_null=absent(config, "head_dim"),
        rotary_share=0.5,
        qk_norm="head" if config.flag("use_qk_norm") else "none",
        qkv_bias=config.flag("attention_bias"),
    )
    dense = LayerSpec(attention=attention, mlp=gated_mlp(config), norm=norm)
    shared = gated_mlp(config, "moe_intermediate_size", times=config.whole("n_shared_experts"))
    sparse = LayerSpec(
        attention=attention,
        experts=experts(
            config,
            count_keys=("n_routed_experts",),
            size_key="moe_intermediate_size",
            router=RouterSpec(
                score="sigmoid",
                renormalises=config.flag("norm_topk_prob"),
                scale=config.number("routed_scaling_factor"),
                has_bias=True,
                num_groups=config.whole("n_group"),
                groups_per_token=config.whole("topk_group"),
                in_float32=True,
                rounds_weights=False,
            ),
            shared=shared,
        ),
        norm=norm,
    )
    first = config.whole("first_k_dense_replace", least=0)
    return decoder(config, [dense if i < first else sparse for i in range(num_layers(config))])


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
    modules={
        **EXPERTS_MODULES,
        "router.bias": ("layers.{layer}.mlp.gate.e_score_correction_bias",),
        "shared_gate_up": (
            "layers.{layer}.mlp.shared_experts.gate_proj",
            "layers.{layer}.mlp.shared_experts.up_proj",
        ),
        "shared_down": ("layers.{layer}.mlp.shared_experts.down_proj",),
    },
    # The layer of multi-token prediction stands behind the others.
    ignores_later_layers=True,
    fixes_tokenizer_class=True,
)
