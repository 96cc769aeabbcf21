"""Granite with windows: sinks, and a base of the rotation for each layer."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families import granite
from costmodel.families._shared import num_layers
from costmodel.families._tables import LLAMA_MODULES
from costmodel.families._windows import FULL, SLIDING
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.rotary_spec import RotarySpec
from costmodel.model.spec import ModelSpec

THETAS_KEY = "layer_rope_theta"


def _rotations(config: HFConfig, plain: RotarySpec | None) -> list[RotarySpec | None]:
    """Read the rotation of each layer; a base of zero turns it off."""
    count, thetas = num_layers(config), config.get(THETAS_KEY)
    if thetas is None or plain is None:
        return [plain] * count
    if not isinstance(thetas, list) or len(thetas) != count:
        raise config.refusal(THETAS_KEY, thetas, f"a list of {count}, one for each layer")
    return [
        None if value == 0 else replace(plain, theta=config.positive(THETAS_KEY, value))
        for value in thetas
    ]


def with_sinks(config: HFConfig, plain: LayerSpec) -> ModelSpec:
    """Make a model of layers with sinks, windows and rotations of their own."""
    # transformers makes the mask of windows even where no layer has one.
    config.whole("sliding_window")
    layers = [
        replace(plain, attention=replace(plain.attention, rotary=rotation, has_sinks=True))
        for rotation in _rotations(config, plain.attention.rotary)
    ]
    kinds = [SLIDING if i % 4 else FULL for i in range(len(layers))]
    return granite.granite_decoder(config, layers, windows=config.layer_types() or kinds)


def _describe(config: HFConfig) -> ModelSpec:
    return with_sinks(config, granite.granite_layer(config))


FAMILY = Family(
    defaults={
        **{key: value for key, value in granite.FAMILY.defaults.items() if key != "head_dim"},
        "vocab_size": 100352,
        "hidden_size": 2560,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "sliding_window": 128,
        THETAS_KEY: None,
    },
    describe=_describe,
    modules={**LLAMA_MODULES, "attention.sinks": ("layers.{layer}.self_attn.sinks",)},
)
