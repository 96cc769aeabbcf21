"""K-EXAONE: windows with rotary positions, full layers without, the experts of DeepSeek-V3."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._layer_kinds import listed_sparse_layers
from costmodel.families._shared import (
    absent,
    decoder,
    gated_mlp,
    llama_attention,
    rms_norm,
)
from costmodel.families._tables import LLAMA_DEFAULTS
from costmodel.families._v3_mixture import V3_MODULES, v3_experts
from costmodel.families._windows import SLIDING, patterned
from costmodel.model.family import ROTARY_BUFFERS, Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    rotated = llama_attention(config, takes_null=absent(config, "head_dim"), qk_norm="head")
    # transformers makes the mask of windows even where no layer has one.
    config.whole("sliding_window")
    norm, kinds = rms_norm(config), patterned(config)
    dense = gated_mlp(config)
    mixture = v3_experts(config, ("num_experts",), "num_shared_experts")
    sparse = listed_sparse_layers(config, config.whole("first_k_dense_replace", least=0))
    layers = [
        LayerSpec(
            attention=rotated if kind == SLIDING else replace(rotated, rotary=None),
            mlp=None if is_sparse else dense,
            experts=mixture if is_sparse else None,
            norm=norm,
        )
        for kind, is_sparse in zip(kinds, sparse, strict=True)
    ]
    return decoder(config, layers, windows=kinds)


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 102400,
        "intermediate_size": 16384,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
        "mlp_layer_types": None,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1024,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
    },
    describe=_describe,
    modules={**V3_MODULES, "router.bias": ("layers.{layer}.mlp.e_score_correction_bias",)},
    # Layers of multi-token prediction.
    unread=(ROTARY_BUFFERS, r"(model\.)?mtp.*"),
)
