"""GLM-4 of 2024: half of each head rotated, neighbours in pairs; gate and up stored together."""

from __future__ import annotations

from costmodel.families._shared import decoder, equal_layers, gated_mlp, glm_attention, rms_norm
from costmodel.families._tables import GLM_DEFAULTS, GLM_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    layer = LayerSpec(
        attention=glm_attention(config, ("num_key_value_heads",)),
        mlp=gated_mlp(config),
        norm=rms_norm(config),
    )
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults=GLM_DEFAULTS, describe=_describe, modules=GLM_MODULES, fixes_tokenizer_class=True
)
