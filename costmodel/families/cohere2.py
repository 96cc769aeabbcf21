"""Command A and R7B: as Command R, but three of four layers have a window, and only they rotate."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._shared import decoder
from costmodel.families._tables import LLAMA_MODULES
from costmodel.families._windows import FULL, SLIDING, patterned
from costmodel.families.cohere import COHERE_DEFAULTS, cohere_layer
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    sliding = cohere_layer(config)
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
    defaults={**COHERE_DEFAULTS, "sliding_window": 4096},
    describe=_describe,
    modules=LLAMA_MODULES,
    tokenizer_class="CohereTokenizer",
)
