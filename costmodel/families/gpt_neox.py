"""GPT-NeoX and Pythia: LayerNorm, parallel halves, a part of each head rotated."""

from __future__ import annotations

from costmodel.families._plain import equal_heads
from costmodel.families._rotary import DEFAULT_THETA, rotary
from costmodel.families._shared import decoder, equal_layers, heads_in_groups, layer_norm, plain_mlp
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    heads, head_dim = equal_heads(config)
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in config.raw:
            # transformers reads only the family's own names here.
            raise config.refusal(key, config.raw[key], "rotary_emb_base, rotary_pct")
    has_bias = config.flag("attention_bias")
    if config.whole("head_dim", instead_of_null=head_dim) != head_dim:
        raise config.refusal("head_dim", config.get("head_dim"), f"{head_dim}, hidden_size / heads")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            rotary=rotary(
                config,
                config.positive(
                    "rotary_emb_base", config.raw.get("rotary_emb_base", DEFAULT_THETA)
                ),
                head_dim=head_dim,
                share=config.positive("rotary_pct", config.raw.get("rotary_pct", 0.25)),
            ),
            qkv_bias=has_bias,
            output_bias=has_bias,
        ),
        mlp=plain_mlp(config, has_bias=True),
        norm=layer_norm(config),
        is_parallel=config.flag("use_parallel_residual"),
    )
    return decoder(config, equal_layers(config, layer), final_norm=layer.norm, dtype="float16")


FAMILY = Family(
    defaults={
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    describe=_describe,
    modules={
        "tokens": ("embed_in",),
        "attention_norm": ("layers.{layer}.input_layernorm",),
        "qkv": ("layers.{layer}.attention.query_key_value",),
        "output": ("layers.{layer}.attention.dense",),
        "mlp_norm": ("layers.{layer}.post_attention_layernorm",),
        "up": ("layers.{layer}.mlp.dense_h_to_4h",),
        "down": ("layers.{layer}.mlp.dense_4h_to_h",),
        "final_norm": ("final_layer_norm",),
    },
    row_blocks={"qkv": heads_in_groups},
    prefix="gpt_neox.",
    head="embed_out",
    tokenizer_class="GPTNeoXTokenizer",
)
