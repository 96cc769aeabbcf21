"""OLMo 3: as OLMo 2, but three of four layers have a window."""

from __future__ import annotations

from costmodel.families._rotary import rotary_keys_of
from costmodel.families._shared import decoder, gated_mlp, rms_norm
from costmodel.families._tables import LLAMA_DEFAULTS, OLMO2_MODULES
from costmodel.families._windows import FULL, SLIDING, full_every
from costmodel.families.olmo2 import olmo2_attention
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

THETA = 500000.0


def _attention(config: HFConfig, kind: str) -> AttentionSpec:
    # Only layers that see all tokens follow the keys outside of ``rope_parameters``.
    theta_key = "rope_theta" if kind == FULL else None
    return olmo2_attention(rotary_keys_of(config, kind, theta_key, THETA, is_scaled=kind == FULL))


def _describe(config: HFConfig) -> ModelSpec:
    layers = {
        kind: LayerSpec(
            attention=_attention(config, kind),
            mlp=gated_mlp(config),
            norm=rms_norm(config),
            norm_places=("after",),
        )
        for kind in (FULL, SLIDING)
    }
    kinds = full_every(config, 4)
    return decoder(config, [layers[kind] for kind in kinds], windows=kinds)


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 50304,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "sliding_window": 4096,
    },
    describe=_describe,
    modules=OLMO2_MODULES,
    fixes_tokenizer_class=True,
)
