"""IQuest-Coder: Llama with other defaults."""

from __future__ import annotations

from costmodel.families._llama import llama_layer
from costmodel.families._shared import decoder, equal_layers, gated_mlp
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    # Keys of the original code, which transformers refuses too.
    for key, off in (("clip_qkv", None), ("use_sliding_window", False)):
        if config.raw.get(key, off) is not off:
            raise config.refusal(key, config.raw[key], "null" if off is None else "false")
    mlp = gated_mlp(config, has_bias=config.flag("mlp_bias"))
    layer = llama_layer(config, mlp, has_bias=config.flag("attention_bias"))
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 76800,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 80,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    describe=_describe,
    modules=LLAMA_MODULES,
    fixes_tokenizer_class=True,
)
