"""GLM-4-0414: GLM with norms before and after each half."""

from __future__ import annotations

from costmodel.families._shared import decoder, equal_layers, gated_mlp, glm_attention, rms_norm
from costmodel.families._tables import GLM_DEFAULTS, GLM_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    layer = LayerSpec(
        attention=glm_attention(config),
        mlp=gated_mlp(config),
        norm=rms_norm(config),
        norm_places=("before", "after"),
    )
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults=GLM_DEFAULTS,
    describe=_describe,
    modules={
        **GLM_MODULES,
        "attention_output_norm": ("layers.{layer}.post_self_attn_layernorm",),
        "mlp_output_norm": ("layers.{layer}.post_mlp_layernorm",),
    },
    fixes_tokenizer_class=True,
)
