"""Nemotron 3 and 4: LayerNorm scales by its weight plus one; squared ReLU without a gate."""

from __future__ import annotations

from costmodel.families._shared import decoder, equal_layers, layer_norm, llama_attention, plain_mlp
from costmodel.families._tables import LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    has_bias = config.flag("attention_bias")
    layer = LayerSpec(
        attention=llama_attention(
            config,
            takes_null=("num_key_value_heads", "head_dim"),
            rotary_share=0.5,
            qkv_bias=has_bias,
            output_bias=has_bias,
        ),
        mlp=plain_mlp(config, has_bias=config.flag("mlp_bias")),
        norm=layer_norm(config, "norm_eps", adds_one=True),
    )
    return decoder(config, equal_layers(config, layer), final_norm=layer.norm)


FAMILY = Family(
    defaults={
        "vocab_size": 256000,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 32,
        "num_attention_heads": 48,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    describe=_describe,
    modules={**LLAMA_MODULES, "up": ("layers.{layer}.mlp.up_proj",)},
    fixes_tokenizer_class=True,
)
