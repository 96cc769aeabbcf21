"""Ministral 3: Mistral with YaRN, and queries that grow beyond the original context."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families import mistral
from costmodel.families._llama import with_rotary_keys
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


def _plain_positions(config: HFConfig) -> int:
    """Return the length of a context in which queries have no factor.

    From the original length on, they are scaled by the logarithm of their position.
    """
    keys = config.raw.get("rope_scaling") or config.raw["rope_parameters"]
    for key in (ORIGINAL_KEY, GROWTH_KEY):
        if isinstance(keys.get(key), bool) or not isinstance(keys.get(key), int | float):
            raise config.refusal(key, keys.get(key), "a number")
    most = config.whole("max_position_embeddings")
    original = config.positive(ORIGINAL_KEY, config.raw.get(ORIGINAL_KEY, keys[ORIGINAL_KEY]))
    return most if keys[GROWTH_KEY] == 0 else max(1, min(most, int(original)))


def _describe(config: HFConfig) -> ModelSpec:
    if config.layer_types():
        raise config.refusal("layer_types", "a list", "no such key")
    # Unlike in Mistral, this may not be null.
    config.whole("head_dim")
    config = with_rotary_keys(config, ROTARY_KEYS)
    spec = mistral.FAMILY.describe(config)
    return replace(spec, max_positions=_plain_positions(config))


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
