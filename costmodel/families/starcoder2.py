"""StarCoder 2: LayerNorm, biases, an MLP without a gate."""

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
from costmodel.families._windows import only_window
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    has_bias = config.flag("use_bias")
    layer = LayerSpec(
        attention=llama_attention(
            config, takes_null=absent(config, "head_dim"), qkv_bias=has_bias, output_bias=has_bias
        ),
        mlp=plain_mlp(config, has_bias=has_bias),
        norm=layer_norm(config, "norm_epsilon"),
    )
    layers = equal_layers(config, layer)
    return decoder(config, layers, windows=only_window(config), final_norm=layer.norm)


FAMILY = Family(
    defaults={
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "sliding_window": None,
        "use_bias": True,
        "tie_word_embeddings": True,
    },
    describe=_describe,
    modules={
        **LLAMA_MODULES,
        "up": ("layers.{layer}.mlp.c_fc",),
        "down": ("layers.{layer}.mlp.c_proj",),
    },
    tokenizer_class="GPT2Tokenizer",
)
