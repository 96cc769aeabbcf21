"""Hunyuan 3: sigmoids with a bias for the choice, norms of heads, the first layer dense."""

from __future__ import annotations

from costmodel.families._layer_kinds import listed_sparse_layers
from costmodel.families._shared import decoder, experts, gated_mlp, llama_attention, rms_norm
from costmodel.families._tables import EXPERTS_MODULES, LLAMA_DEFAULTS
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import ExpertsSpec, RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

THETA = 11158840.0
SIZE = "moe_intermediate_size"


def _experts(config: HFConfig) -> ExpertsSpec:
    return experts(
        config,
        count_keys=("num_local_experts", "num_experts"),
        size_key=SIZE,
        router=RouterSpec(
            score="sigmoid",
            scale=config.number("router_scaling_factor"),
            has_bias=True,
            in_float32=True,
            rounds_weights=False,
        ),
        shared=gated_mlp(
            config,
            SIZE,
            times=config.whole("num_shared_experts"),
            has_bias=config.flag("mlp_bias"),
        ),
    )


def _describe(config: HFConfig) -> ModelSpec:
    has_bias, norm = config.flag("attention_bias"), rms_norm(config)
    attention = llama_attention(
        config, theta=THETA, qk_norm="head", qkv_bias=has_bias, output_bias=has_bias
    )
    mlp = gated_mlp(config, has_bias=config.flag("mlp_bias"))
    dense = LayerSpec(attention=attention, mlp=mlp, norm=norm)
    sparse = LayerSpec(attention=attention, experts=_experts(config), norm=norm)
    kinds = listed_sparse_layers(config, num_dense=1)
    return decoder(config, [sparse if is_sparse else dense for is_sparse in kinds])


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 120832,
        "intermediate_size": 13312,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "num_experts": 192,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "moe_intermediate_size": 1536,
        "router_scaling_factor": 2.826,
        "mlp_layer_types": None,
    },
    describe=_describe,
    modules={
        **EXPERTS_MODULES,
        "router": ("layers.{layer}.mlp.router.gate",),
        "router.bias": ("layers.{layer}.mlp.expert_bias",),
        "shared_gate_up": (
            "layers.{layer}.mlp.shared_mlp.gate_proj",
            "layers.{layer}.mlp.shared_mlp.up_proj",
        ),
        "shared_down": ("layers.{layer}.mlp.shared_mlp.down_proj",),
    },
    # The layer of multi-token prediction follows the others.
    ignores_later_layers=True,
)
