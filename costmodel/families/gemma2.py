"""Gemma 2: every second layer has a window, scores and logits have soft caps, halves two norms."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._shared import (
    decoder,
    equal_layers,
    gated_mlp,
    llama_attention,
    require,
    rms_norm,
    soft_cap,
)
from costmodel.families._tables import GEMMA_MODULES, LLAMA_DEFAULTS
from costmodel.families._windows import full_every
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec


def gemma2_layer(config: HFConfig) -> LayerSpec:
    """Read a layer of Gemma 2."""
    if config.get("use_bidirectional_attention") is not None:
        require(config, use_bidirectional_attention=False)
    has_bias = config.flag("attention_bias")
    return LayerSpec(
        attention=llama_attention(
            config,
            scale=config.whole("query_pre_attn_scalar") ** -0.5,
            soft_cap=soft_cap(config, "attn_logit_softcapping"),
            qkv_bias=has_bias,
            output_bias=has_bias,
        ),
        mlp=gated_mlp(config, activation_key="hidden_activation"),
        norm=replace(rms_norm(config), adds_one=True),
        norm_places=("before", "after"),
    )


def gemma2_decoder(config: HFConfig, layer: LayerSpec) -> ModelSpec:
    """Make a model of equal layers; the first one has a window, the second sees all tokens."""
    return decoder(
        config,
        equal_layers(config, layer),
        windows=full_every(config, 2),
        embedding=EmbeddingSpec(scale=config.whole("hidden_size") ** 0.5, rounds_scale=True),
        final_norm=layer.norm,
        soft_cap=soft_cap(config, "final_logit_softcapping"),
    )


def _describe(config: HFConfig) -> ModelSpec:
    return gemma2_decoder(config, gemma2_layer(config))


FAMILY = Family(
    defaults={
        **{key: value for key, value in LLAMA_DEFAULTS.items() if key != "hidden_act"},
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "use_bidirectional_attention": None,
    },
    describe=_describe,
    modules=GEMMA_MODULES,
    tokenizer_class="GemmaTokenizer",
)
