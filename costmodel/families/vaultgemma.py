"""VaultGemma: Gemma 2 without the norms after each half."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families import gemma2
from costmodel.families._tables import GEMMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    layer = replace(gemma2.gemma2_layer(config), norm_places=("before",))
    return gemma2.gemma2_decoder(config, layer)


FAMILY = Family(
    defaults={
        key: value
        for key, value in gemma2.FAMILY.defaults.items()
        if key != "use_bidirectional_attention"
    },
    describe=_describe,
    modules=GEMMA_MODULES,
)
