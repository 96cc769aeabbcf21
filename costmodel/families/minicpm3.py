"""MiniCPM 3: latent attention, and factors of embedding, residuals and logits."""

from __future__ import annotations

import math

from costmodel.families._latent import LATENT_DEFAULTS, latent_attention, latent_modules
from costmodel.families._shared import (
    decoder,
    equal_layers,
    gated_mlp,
    num_layers,
    require,
    rms_norm,
)
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    require(config, mlp_bias=False)
    # Null stands for what changes nothing.
    depth, base = config.get("scale_depth"), config.get("dim_model_base")
    layer = LayerSpec(
        attention=latent_attention(
            config, is_interleaved=False, takes_null=("num_key_value_heads", "v_head_dim")
        ),
        mlp=gated_mlp(config),
        norm=rms_norm(config),
        residual_scale=1.0
        if depth is None
        else config.positive("scale_depth", depth) / math.sqrt(num_layers(config)),
    )
    return decoder(
        config,
        equal_layers(config, layer),
        embedding=EmbeddingSpec(scale=config.positive("scale_emb", config.get("scale_emb"))),
        logit_scale=1.0
        if base is None
        else config.whole("dim_model_base") / config.whole("hidden_size"),
    )


FAMILY = Family(
    defaults={
        **LATENT_DEFAULTS,
        "vocab_size": 73448,
        "hidden_size": 2560,
        "intermediate_size": 6400,
        "num_hidden_layers": 62,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "kv_lora_rank": 256,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": None,
        "mlp_bias": False,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
    },
    describe=_describe,
    modules=latent_modules,
    fixes_tokenizer_class=True,
)
