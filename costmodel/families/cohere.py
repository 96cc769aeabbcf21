"""Command R: parallel halves with one LayerNorm without bias, neighbours rotated in pairs; norms of
queries and keys in Command R+."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from costmodel.families._shared import (
    absent,
    decoder,
    equal_layers,
    gated_mlp,
    layer_norm,
    llama_attention,
)
from costmodel.families._tables import LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

THETA = 500000.0


COHERE_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "logit_scale": 0.0625,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
}


def cohere_layer(config: HFConfig, **attention: Any) -> LayerSpec:
    """Read a layer; ``attention`` is what the family adds to its attention."""
    has_bias = config.flag("attention_bias")
    return LayerSpec(
        attention=llama_attention(
            config,
            takes_null=("num_key_value_heads", *absent(config, "head_dim")),
            is_interleaved=True,
            qkv_bias=has_bias,
            output_bias=has_bias,
            **attention,
        ),
        mlp=gated_mlp(config),
        norm=layer_norm(config, has_bias=False),
        is_parallel=True,
        shares_norm=True,
    )


def _describe(config: HFConfig) -> ModelSpec:
    qk_norm = "heads" if config.flag("use_qk_norm") else "none"
    layer = cohere_layer(config, theta=THETA, qk_norm=qk_norm)
    return decoder(
        config,
        equal_layers(config, layer),
        final_norm=layer.norm,
        logit_scale=config.number("logit_scale"),
    )


FAMILY = Family(
    defaults={**COHERE_DEFAULTS, "use_qk_norm": False},
    describe=_describe,
    modules=LLAMA_MODULES,
    by_head=("q_norm", "k_norm"),
    tokenizer_class="CohereTokenizer",
)
