"""Code World Model: Llama with a window in three of four layers."""

from __future__ import annotations

from costmodel.families._llama import check_head_sizes
from costmodel.families._rotary import with_rotary_keys
from costmodel.families._shared import decoder, equal_layers, gated_mlp, llama_attention, rms_norm
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.families._windows import FULL, SLIDING
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

ROTARY_KEYS = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _describe(config: HFConfig) -> ModelSpec:
    check_head_sizes(config)
    # transformers makes the mask of windows even where no layer has one.
    config.whole("sliding_window")
    layer = LayerSpec(
        attention=llama_attention(with_rotary_keys(config, ROTARY_KEYS), theta=1e6),
        mlp=gated_mlp(config),
        norm=rms_norm(config),
    )
    layers = equal_layers(config, layer)
    # Unlike in other families, the first layer of each four sees all tokens.
    kinds = [SLIDING if i % 4 else FULL for i in range(len(layers))]
    return decoder(config, layers, windows=config.layer_types() or kinds)


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 128256,
        "hidden_size": 6144,
        "intermediate_size": 21504,
        "num_hidden_layers": 64,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": 8192,
    },
    describe=_describe,
    modules=LLAMA_MODULES,
)
