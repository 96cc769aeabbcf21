"""gpt-oss: sinks, windows in every second layer, and experts with biases and a clamped gate."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._rotary import with_rotary_keys
from costmodel.families._shared import decoder, equal_layers, experts, llama_attention, rms_norm
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.families._windows import FULL, SLIDING
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec
from costmodel.model.stacked import StackedTensor

THETA = 150000.0
# What an absent ``rope_parameters`` means.
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _describe(config: HFConfig) -> ModelSpec:
    config = with_rotary_keys(config, YARN)
    has_bias = config.flag("attention_bias")
    mixture = experts(
        config,
        count_keys=("num_experts", "num_local_experts"),
        size_key="intermediate_size",
        router=RouterSpec(
            selects_first=True, renormalises=False, has_bias=True, bias_in_logits=True
        ),
    )
    expert = replace(
        mixture.expert,
        activation="silu",
        has_bias=True,
        swiglu_limit=config.number("swiglu_limit"),
        swiglu_alpha=config.number("swiglu_alpha"),
    )
    layer = LayerSpec(
        attention=llama_attention(
            config,
            theta=THETA,
            has_sinks=True,
            qkv_bias=has_bias,
            output_bias=has_bias,
        ),
        experts=replace(mixture, expert=expert),
        norm=rms_norm(config),
    )
    layers = equal_layers(config, layer)
    kinds = config.layer_types() or [FULL if i % 2 else SLIDING for i in range(len(layers))]
    return decoder(config, layers, windows=kinds)


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "layer_types": None,
        "num_experts_per_tok": 4,
        "num_local_experts": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "attention_bias": True,
    },
    describe=_describe,
    modules={
        **LLAMA_MODULES,
        "attention.sinks": ("layers.{layer}.self_attn.sinks",),
        "router": ("layers.{layer}.mlp.router",),
        "expert_gate_up.weight": ("layers.{layer}.mlp.experts.gate_up_proj",),
        "expert_gate_up.bias": ("layers.{layer}.mlp.experts.gate_up_proj_bias",),
        "expert_down.weight": ("layers.{layer}.mlp.experts.down_proj",),
        "expert_down.bias": ("layers.{layer}.mlp.experts.down_proj_bias",),
    },
    stacked={
        "expert_gate_up.weight": StackedTensor(is_transposed=True, is_interleaved=True),
        "expert_gate_up.bias": StackedTensor(is_interleaved=True),
        "expert_down.weight": StackedTensor(is_transposed=True),
        "expert_down.bias": StackedTensor(),
    },
)
