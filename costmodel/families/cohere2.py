"""Command A and R7B: as Command R, but three of four layers have a window, and only they rotate."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._shared import absent, decoder, gated_mlp, layer_norm, llama_attention
from costmodel.families._tables import LLAMA_MODULES
from costmodel.families._windows import FULL, SLIDING, patterned
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    has_bias = config.flag("attention_bias")
    sliding = LayerSpec(
        attention=llama_attention(
            config,
            takes_null=("num_key_value_heads", *absent(config, "head_dim")),
            is_interleaved=True,
            qkv_bias=has_bias,
            output_bias=has_bias,
        ),
        mlp=gated_mlp(config),
        norm=layer_norm(config, has_bias=False),
        is_parallel=True,
        shares_norm=True,
    )
    full = replace(sliding, attention=replace(sliding.attention, rotary=None))
    kinds = patterned(config, 4)
    layers = {SLIDING: sliding, FULL: full}
    return decoder(
        config,
        [layers[kind] for kind in kinds],
        windows=kinds,
        final_norm=sliding.norm,
        logit_scale=config.number("logit_scale"),
    )


FAMILY = Family(
    defaults={
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
        "sliding_window": 4096,
    },
    describe=_describe,
    modules=LLAMA_MODULES,
    tokenizer_class="CohereTokenizer",
)
