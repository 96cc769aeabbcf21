"""Phi 1, 1.5 and 2: parallel halves with one norm, biases everywhere, half of each head rotated."""

from __future__ import annotations

from costmodel.families._shared import (
    absent,
    decoder,
    equal_layers,
    layer_norm,
    llama_attention,
    plain_mlp,
)
from costmodel.families._tables import LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    layer = LayerSpec(
        attention=llama_attention(
            config,
            takes_null=("num_key_value_heads", *absent(config, "head_dim")),
            rotary_share=0.5,
            qk_norm="head" if config.flag("qk_layernorm") else "none",
            qkv_bias=True,
            output_bias=True,
        ),
        mlp=plain_mlp(config, has_bias=True),
        norm=layer_norm(config),
        is_parallel=True,
        shares_norm=True,
    )
    return decoder(
        config, equal_layers(config, layer), final_norm=layer.norm, head_bias=True, dtype="float16"
    )


FAMILY = Family(
    defaults={
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "qk_layernorm": False,
    },
    describe=_describe,
    modules={
        "tokens": ("embed_tokens",),
        "attention_norm": ("layers.{layer}.input_layernorm",),
        "qkv": LLAMA_MODULES["qkv"],
        "q_norm": ("layers.{layer}.self_attn.q_layernorm",),
        "k_norm": ("layers.{layer}.self_attn.k_layernorm",),
        "output": ("layers.{layer}.self_attn.dense",),
        "up": ("layers.{layer}.mlp.fc1",),
        "down": ("layers.{layer}.mlp.fc2",),
        "final_norm": ("final_layernorm",),
    },
    tokenizer_class="GPT2Tokenizer",
)
