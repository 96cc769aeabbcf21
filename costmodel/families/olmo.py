"""OLMo 1: LayerNorm without weights; queries, keys and values may be clipped."""

from __future__ import annotations

from costmodel.families._shared import absent, decoder, equal_layers, gated_mlp, llama_attention
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.norm_spec import NormSpec
from costmodel.model.spec import ModelSpec

NORM = NormSpec(kind="layer", eps=1e-5, has_weight=False, has_bias=False)


def _describe(config: HFConfig) -> ModelSpec:
    has_bias, clip = config.flag("attention_bias"), config.get("clip_qkv")
    attention = llama_attention(
        config,
        takes_null=("num_key_value_heads", *absent(config, "head_dim")),
        clip=None if clip is None else config.number("clip_qkv"),
        qkv_bias=has_bias,
        output_bias=has_bias,
    )
    layer = LayerSpec(attention=attention, mlp=gated_mlp(config), norm=NORM)
    return decoder(config, equal_layers(config, layer), final_norm=NORM)


FAMILY = Family(
    defaults={
        **{key: value for key, value in LLAMA_DEFAULTS.items() if key != "rms_norm_eps"},
        "vocab_size": 50304,
        "attention_bias": False,
        "clip_qkv": None,
    },
    describe=_describe,
    modules={name: parts for name, parts in LLAMA_MODULES.items() if not name.endswith("norm")},
    tokenizer_class="GPTNeoXTokenizer",
)
