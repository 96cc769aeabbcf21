"""Ministral 3: Mistral with YaRN, and queries that grow beyond the original context."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families import mistral
from costmodel.families._rotary import with_rotary_keys
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec

ORIGINAL_KEY = "original_max_position_embeddings"
GROWTH_KEY = "llama_4_scaling_beta"
ROTARY_KEYS = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    ORIGINAL_KEY: 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    GROWTH_KEY: 0.1,
}


def _growth(config: HFConfig) -> tuple[int, float]:
    """Read from which position on queries grow, and how much."""
    keys = config.raw.get("rope_scaling") or config.raw["rope_parameters"]
    growth = keys.get(GROWTH_KEY)
    if isinstance(growth, bool) or not isinstance(growth, int | float):
        raise config.refusal(GROWTH_KEY, growth, "a number")
    # As for the rotation, the key outside of its object wins.
    floor = config.raw.get(ORIGINAL_KEY, keys.get(ORIGINAL_KEY))
    if config.positive(ORIGINAL_KEY, floor) != int(floor):
        raise config.refusal(ORIGINAL_KEY, floor, "a whole number")
    return int(floor), float(growth)


def _describe(config: HFConfig) -> ModelSpec:
    if config.layer_types():
        raise config.refusal("layer_types", "a list", "no such key")
    # Unlike in Mistral, this may not be null.
    config.whole("head_dim")
    config = with_rotary_keys(config, ROTARY_KEYS)
    layer = mistral.mistral_layer(config)
    floor, growth = _growth(config)
    attention = replace(
        layer.attention,
        temperature_floor=floor,
        temperature_strength=growth,
        temperature_offset=0,
    )
    return mistral.mistral_decoder(config, replace(layer, attention=attention))


FAMILY = Family(
    defaults={
        **mistral.FAMILY.defaults,
        "vocab_size": 131072,
        "num_hidden_layers": 34,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    describe=_describe,
    modules=mistral.FAMILY.modules,
    fixes_tokenizer_class=True,
)
