"""Phi 3 and 4: Llama with projections that are stored together, and long contexts by longrope."""

from __future__ import annotations

from costmodel.families._shared import (
    absent,
    decoder,
    equal_layers,
    gated_mlp,
    llama_attention,
    rms_norm,
)
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.families._windows import only_window
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

# "su" is an early name of longrope.
KINDS = {"default": "default", "longrope": "longrope", "su": "longrope"}


def _describe(config: HFConfig) -> ModelSpec:
    takes_null = ("num_key_value_heads", *absent(config, "head_dim"))
    attention = llama_attention(config, takes_null=takes_null, rotary_kinds=KINDS)
    layer = LayerSpec(attention=attention, mlp=gated_mlp(config), norm=rms_norm(config))
    return decoder(config, equal_layers(config, layer), windows=only_window(config))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    describe=_describe,
    modules={
        **LLAMA_MODULES,
        "qkv": ("layers.{layer}.self_attn.qkv_proj",),
        "gate_up": ("layers.{layer}.mlp.gate_up_proj",),
    },
    fixes_tokenizer_class=True,
)
