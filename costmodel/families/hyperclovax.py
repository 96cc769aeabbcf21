"""HyperCLOVA X SEED Think: Granite with a second norm after each half."""

from __future__ import annotations

from costmodel.families._llama import check_head_sizes
from costmodel.families._shared import decoder, equal_layers, gated_mlp, llama_attention, rms_norm
from costmodel.families._tables import LLAMA_DEFAULTS, LLAMA_MODULES
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def _describe(config: HFConfig) -> ModelSpec:
    check_head_sizes(config)
    embedding, residual, logits = (config.positive(key, config.get(key)) for key in MULTIPLIERS)
    scale_key = "attention_multiplier"
    has_bias = config.flag("attention_bias")
    layer = LayerSpec(
        attention=llama_attention(
            config,
            takes_null=("num_key_value_heads", "head_dim"),
            scale=None if config.get(scale_key) is None else config.number(scale_key),
            qkv_bias=has_bias,
            output_bias=has_bias,
        ),
        mlp=gated_mlp(config, has_bias=config.flag("mlp_bias")),
        norm=rms_norm(config),
        norm_places=("before", "after") if config.flag("use_post_norm") else ("before",),
        residual_scale=residual,
    )
    return decoder(
        config,
        equal_layers(config, layer),
        embedding=EmbeddingSpec(scale=embedding),
        # Unlike in Granite, this is a factor.
        logit_scale=logits,
    )


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_multiplier": None,
        "use_post_norm": True,
        **dict.fromkeys(MULTIPLIERS, 1.0),
    },
    describe=_describe,
    modules={
        **LLAMA_MODULES,
        "attention_output_norm": ("layers.{layer}.post_norm1",),
        "mlp_output_norm": ("layers.{layer}.post_norm2",),
    },
    fixes_tokenizer_class=True,
)
