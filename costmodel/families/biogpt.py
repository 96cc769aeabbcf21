"""BioGPT: OPT with scaled tokens."""

from __future__ import annotations

import math

from costmodel.families._plain import equal_heads
from costmodel.families._shared import decoder, equal_layers, plain_mlp
from costmodel.families._tables import LLAMA_MODULES
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.norm_spec import NormSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec

# transformers computes so whatever ``layer_norm_eps`` says.
NORM = NormSpec(kind="layer", eps=1e-5)
# The first two rows of the table of positions are never used.
POSITION_OFFSET = 2


def _describe(config: HFConfig) -> ModelSpec:
    heads, head_dim = equal_heads(config)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            qkv_bias=True,
            output_bias=True,
        ),
        mlp=plain_mlp(config, has_bias=True),
        norm=NORM,
    )
    return decoder(
        config,
        equal_layers(config, layer),
        embedding=EmbeddingSpec(
            has_positions=True,
            position_offset=POSITION_OFFSET,
            scale=math.sqrt(heads * head_dim) if config.flag("scale_embedding") else 1.0,
        ),
        final_norm=NORM,
        dtype="float32",
    )


FAMILY = Family(
    defaults={
        "vocab_size": 42384,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "hidden_act": "gelu",
        "max_position_embeddings": 1024,
        "scale_embedding": True,
        "tie_word_embeddings": True,
    },
    describe=_describe,
    modules={
        "tokens": ("embed_tokens",),
        "positions": ("embed_positions",),
        "attention_norm": ("layers.{layer}.self_attn_layer_norm",),
        "qkv": LLAMA_MODULES["qkv"],
        "output": ("layers.{layer}.self_attn.out_proj",),
        "mlp_norm": ("layers.{layer}.final_layer_norm",),
        "up": ("layers.{layer}.fc1",),
        "down": ("layers.{layer}.fc2",),
        "final_norm": ("layer_norm",),
    },
    prefix="biogpt.",
    head="output_projection",
    tokenizer_class="BioGptTokenizer",
)
