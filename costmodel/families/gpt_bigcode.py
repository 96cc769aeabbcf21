"""GPT-BigCode (StarCoder, SantaCoder): GPT-2 with one key head."""

from __future__ import annotations

from costmodel.families._plain import GPT2_ALIASES, equal_heads, gpt2_mlp
from costmodel.families._shared import decoder, equal_layers, heads_in_groups, layer_norm, require
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    require(config, add_cross_attention=False)
    heads, head_dim = equal_heads(config)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=1 if config.flag("multi_query") else heads,
            head_dim=head_dim,
            scale=None if config.flag("scale_attn_weights") else 1.0,
            qkv_bias=True,
            output_bias=True,
        ),
        mlp=gpt2_mlp(config),
        norm=layer_norm(config, "layer_norm_epsilon"),
    )
    return decoder(
        config,
        equal_layers(config, layer),
        embedding=EmbeddingSpec(has_positions=True),
        final_norm=layer.norm,
    )


FAMILY = Family(
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_pytorch_tanh",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "multi_query": True,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    aliases=GPT2_ALIASES,
    describe=_describe,
    modules={
        "tokens": ("wte",),
        "positions": ("wpe",),
        "attention_norm": ("h.{layer}.ln_1",),
        "qkv": ("h.{layer}.attn.c_attn",),
        "output": ("h.{layer}.attn.c_proj",),
        "mlp_norm": ("h.{layer}.ln_2",),
        "up": ("h.{layer}.mlp.c_fc",),
        "down": ("h.{layer}.mlp.c_proj",),
        "final_norm": ("ln_f",),
    },
    row_blocks={"qkv": heads_in_groups},
    prefix="transformer.",
    # The mask, as old versions saved it.
    unread=(r".*\.attn\.bias", r"(transformer\.)?bias"),
    fixes_tokenizer_class=True,
)
