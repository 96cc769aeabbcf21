"""Gemma 1: norms scale by their weight plus one, and embeddings by the root of their size."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._shared import (
    decoder,
    equal_layers,
    gated_mlp,
    llama_attention,
    require,
    rms_norm,
)
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    if config.get("use_bidirectional_attention") is not None:
        require(config, use_bidirectional_attention=False)
    has_bias = config.flag("attention_bias")
    norm = replace(rms_norm(config), adds_one=True)
    mlp = gated_mlp(config)
    layer = LayerSpec(
        attention=llama_attention(config, qkv_bias=has_bias, output_bias=has_bias),
        # Checkpoints say "gelu" and mean its approximation.
        mlp=replace(mlp, activation="gelu_tanh") if mlp.activation == "gelu" else mlp,
        norm=norm,
    )
    return decoder(
        config,
        equal_layers(config, layer),
        embedding=EmbeddingSpec(scale=config.whole("hidden_size") ** 0.5, rounds_scale=True),
        final_norm=norm,
    )


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_bidirectional_attention": None,
    },
    describe=_describe,
    modules=LLAMA_MODULES,
    tokenizer_class="GemmaTokenizer",
)
