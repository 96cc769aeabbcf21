"""EXAONE 4: windows in three of four layers, and only those rotate; norms after each half."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._shared import absent, decoder, gated_mlp, llama_attention, rms_norm
from costmodel.families._tables import LLAMA_DEFAULTS, OLMO2_MODULES
from costmodel.families._windows import FULL, SLIDING, patterned, window_size
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _kinds(config: HFConfig) -> list[str]:
    """Read the kind of attention of each layer."""
    if window_size(config) is None and not config.layer_types():
        raise config.refusal("sliding_window", None, "a number where layer_types is absent")
    return patterned(config)


def _describe(config: HFConfig) -> ModelSpec:
    kinds = _kinds(config)
    sliding = LayerSpec(
        attention=llama_attention(config, takes_null=absent(config, "head_dim"), qk_norm="head"),
        mlp=gated_mlp(config),
        norm=rms_norm(config),
        norm_places=("after",),
    )
    # In a model without windows, all layers rotate.
    full = sliding
    if window_size(config) is not None:
        full = replace(sliding, attention=replace(sliding.attention, rotary=None))
    layers = {SLIDING: sliding, FULL: full}
    return decoder(config, [layers[kind] for kind in kinds], windows=kinds)


FAMILY = Family(
    defaults={
        **{key: value for key, value in LLAMA_DEFAULTS.items() if key != "head_dim"},
        "vocab_size": 102400,
        "intermediate_size": 16384,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    describe=_describe,
    modules=OLMO2_MODULES,
)
