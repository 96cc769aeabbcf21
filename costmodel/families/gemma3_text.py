"""Gemma 3 without images: five of six layers have a window, and a rotation of their own."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._rotary import rotary_keys_of
from costmodel.families._shared import (
    decoder,
    gated_mlp,
    llama_attention,
    require,
    rms_norm,
    soft_cap,
)
from costmodel.families._tables import GEMMA_MODULES, LLAMA_DEFAULTS
from costmodel.families._windows import FULL, SLIDING, patterned
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec

# By kind of layer: the key of the base of its rotation, and the base where there is none.
THETAS = {FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)}


def _attention(config: HFConfig, kind: str) -> AttentionSpec:
    # Like transformers, this does not read ``attn_logit_softcapping``.
    has_bias = config.flag("attention_bias")
    return llama_attention(
        rotary_keys_of(config, kind, *THETAS[kind], is_scaled=kind == FULL),
        scale=config.whole("query_pre_attn_scalar") ** -0.5,
        qk_norm="head",
        qkv_bias=has_bias,
        output_bias=has_bias,
    )


def _describe(config: HFConfig) -> ModelSpec:
    if config.get("use_bidirectional_attention") is not None:
        require(config, use_bidirectional_attention=False)
    norm = replace(rms_norm(config), adds_one=True)
    kinds = patterned(config, 6)
    layers = {
        kind: LayerSpec(
            attention=_attention(config, kind),
            mlp=gated_mlp(config, activation_key="hidden_activation"),
            norm=norm,
            norm_places=("before", "after"),
        )
        for kind in (FULL, SLIDING)
    }
    return decoder(
        config,
        [layers[kind] for kind in kinds],
        windows=kinds,
        embedding=EmbeddingSpec(scale=config.whole("hidden_size") ** 0.5, rounds_scale=True),
        final_norm=norm,
        soft_cap=soft_cap(config, "final_logit_softcapping"),
    )


FAMILY = Family(
    defaults={
        **{key: value for key, value in LLAMA_DEFAULTS.items() if key != "hidden_act"},
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    describe=_describe,
    modules=GEMMA_MODULES,
    tokenizer_class="GemmaTokenizer",
)
