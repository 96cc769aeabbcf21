"""ERNIE 4.5, dense: Llama with neighbours rotated in pairs."""

from __future__ import annotations

from costmodel.families._shared import decoder, equal_layers, gated_mlp, llama_attention, rms_norm
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

THETA = 500000.0


def _describe(config: HFConfig) -> ModelSpec:
    has_bias = config.flag("use_bias")
    layer = LayerSpec(
        attention=llama_attention(
            config,
            takes_null=("num_key_value_heads", "head_dim"),
            theta=THETA,
            is_interleaved=True,
            qkv_bias=has_bias,
            output_bias=has_bias,
        ),
        mlp=gated_mlp(config, has_bias=has_bias),
        norm=rms_norm(config),
    )
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 103424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    describe=_describe,
    modules=LLAMA_MODULES,
    fixes_tokenizer_class=True,
)
