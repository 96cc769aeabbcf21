"""OPT: LayerNorm, biases, learned positions, an MLP without a gate. OPT-350M has norms after each
half, and tokens of another width."""

from __future__ import annotations

from costmodel.families._plain import equal_heads
from costmodel.families._shared import activation, decoder, equal_layers
from costmodel.families._tables import LLAMA_MODULES
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import MlpSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.norm_spec import NormSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec

# The first two rows of the table of positions are never used.
POSITION_OFFSET = 2


def _describe(config: HFConfig) -> ModelSpec:
    heads, head_dim = equal_heads(config)
    hidden = config.whole("hidden_size")
    width = config.whole("word_embed_proj_dim", instead_of_null=hidden)
    is_affine = config.flag("layer_norm_elementwise_affine")
    norm = NormSpec(kind="layer", eps=1e-5, has_weight=is_affine, has_bias=is_affine)
    is_before, lacks_final = (
        config.flag(key) for key in ("do_layer_norm_before", "_remove_final_layer_norm")
    )
    has_bias = config.flag("enable_bias")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            qkv_bias=has_bias,
            output_bias=has_bias,
        ),
        mlp=MlpSpec(
            size=config.whole("ffn_dim"),
            activation=activation(config, "activation_function", ("relu", "gelu")),
            is_gated=False,
            has_bias=has_bias,
        ),
        norm=norm,
        norm_places=("before",) if is_before else ("sum",),
    )
    return decoder(
        config,
        equal_layers(config, layer),
        embedding=EmbeddingSpec(
            has_positions=True,
            position_offset=POSITION_OFFSET,
            width=None if width == hidden else width,
        ),
        final_norm=norm if is_before and not lacks_final else NormSpec(kind="none"),
        dtype="float16",
    )


FAMILY = Family(
    defaults={
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": None,
        "num_attention_heads": 12,
        "activation_function": "relu",
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
    describe=_describe,
    modules={
        "tokens": ("embed_tokens",),
        "positions": ("embed_positions",),
        "input_projection": ("project_in",),
        "output_projection": ("project_out",),
        "attention_norm": ("layers.{layer}.self_attn_layer_norm",),
        "attention_sum_norm": ("layers.{layer}.self_attn_layer_norm",),
        "qkv": LLAMA_MODULES["qkv"],
        "output": ("layers.{layer}.self_attn.out_proj",),
        "mlp_norm": ("layers.{layer}.final_layer_norm",),
        "mlp_sum_norm": ("layers.{layer}.final_layer_norm",),
        "up": ("layers.{layer}.fc1",),
        "down": ("layers.{layer}.fc2",),
        "final_norm": ("final_layer_norm",),
    },
    prefix="model.decoder.",
    tokenizer_class="GPT2Tokenizer",
)
