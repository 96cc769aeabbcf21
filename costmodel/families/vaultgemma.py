"""VaultGemma: Gemma 2 without the norms after each half."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families import gemma2
from costmodel.families._tables import GEMMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    spec = gemma2.FAMILY.describe(config)
    kinds = tuple(replace(kind, norm_places=("before",)) for kind in spec.layer_kinds)
    return replace(spec, layer_kinds=kinds)


FAMILY = Family(
    defaults={
        key: value
        for key, value in gemma2.FAMILY.defaults.items()
        if key != "use_bidirectional_attention"
    },
    describe=_describe,
    modules=GEMMA_MODULES,
)
