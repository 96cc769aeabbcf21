"""Shapes of published mixtures of experts, and of one with a few layers."""

from __future__ import annotations

import functools

from costmodel.families import spec_from_config
from costmodel.model.spec import ModelSpec

# What a config does not say is the default of its family, which is the published model.
MIXTURES: dict[str, dict[str, object]] = {
    "mixtral-8x7b": {"model_type": "mixtral", "dtype": "bfloat16"},
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "head_dim": 128,
        "norm_topk_prob": True,
        "dtype": "bfloat16",
    },
    "olmoe-1b-7b": {"model_type": "olmoe", "dtype": "bfloat16"},
    "qwen1.5-moe-a2.7b": {"model_type": "qwen2_moe", "dtype": "bfloat16"},
    "dense first": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 8,
        "mlp_only_layers": [0, 1],
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "head_dim": 64,
        "dtype": "bfloat16",
    },
}


@functools.cache
def mixture(name: str) -> ModelSpec:
    """Return one of ``MIXTURES``."""
    return spec_from_config(MIXTURES[name], name=name)
