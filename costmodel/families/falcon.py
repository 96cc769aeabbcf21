"""Falcon: few key heads, queries, keys and values stored together, parallel halves; with ALiBi in
the models trained on RefinedWeb alone."""

from __future__ import annotations

from collections.abc import Mapping

from costmodel.families._alibi import alibi_slopes, to_bfloat16
from costmodel.families._rotary import rotary
from costmodel.families._shared import (
    activation,
    decoder,
    equal_layers,
    heads_in_groups,
    layer_norm,
)
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import ACTIVATIONS, MlpSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    if hidden % heads:
        raise config.refusal("hidden_size", hidden, f"a multiple of the {heads} heads")
    is_new, has_bias = config.flag("new_decoder_architecture"), config.flag("bias")
    kv_heads = config.whole("num_kv_heads", instead_of_null=heads)
    if config.flag("multi_query") and not is_new:
        kv_heads = 1
    is_parallel = is_new or config.flag("parallel_attn")
    has_alibi = config.flag("alibi")
    head_dim = hidden // heads
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rotary=None if has_alibi else rotary(config, head_dim=head_dim),
            qkv_bias=has_bias,
            output_bias=has_bias,
            # Slopes are rounded as in training, and scaled with the scores. transformers rounds
            # the product of slope and position to bfloat16, too: an error of up to 0.9 at 2048
            # tokens. Here that product is exact.
            alibi_slopes=tuple(
                to_bfloat16(slope) * head_dim**-0.5
                for slope in (alibi_slopes(heads) if has_alibi else ())
            ),
        ),
        mlp=MlpSpec(
            size=config.whole("ffn_hidden_size", instead_of_null=4 * hidden),
            activation=activation(config, "activation", ACTIVATIONS),
            is_gated=False,
            has_bias=has_bias,
        ),
        norm=layer_norm(config, "layer_norm_epsilon"),
        is_parallel=is_parallel,
        shares_norm=is_parallel and _num_norms(config, is_new=is_new) == 1,
    )
    return decoder(config, equal_layers(config, layer), final_norm=layer.norm)


def _num_norms(config: HFConfig, *, is_new: bool) -> int:
    """Read the number of norms of parallel halves."""
    count = config.whole("num_ln_in_parallel_attn", instead_of_null=2 if is_new else 1)
    if count > (2 if is_new else 1):
        raise config.refusal("num_ln_in_parallel_attn", count, "1, or 2 in the new architecture")
    return count


MODULES = {
    "tokens": ("word_embeddings",),
    "attention_norm": ("h.{layer}.input_layernorm",),
    "qkv": ("h.{layer}.self_attention.query_key_value",),
    "output": ("h.{layer}.self_attention.dense",),
    "mlp_norm": ("h.{layer}.post_attention_layernorm",),
    "up": ("h.{layer}.mlp.dense_h_to_4h",),
    "down": ("h.{layer}.mlp.dense_4h_to_h",),
    "final_norm": ("ln_f",),
}
TWO_NORMS = {"attention_norm": ("h.{layer}.ln_attn",), "mlp_norm": ("h.{layer}.ln_mlp",)}


def _modules(spec: ModelSpec) -> Mapping[str, tuple[str, ...]]:
    layer = spec.layer(0)
    return MODULES | TWO_NORMS if layer.is_parallel and not layer.shares_norm else MODULES


FAMILY = Family(
    defaults={
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "num_ln_in_parallel_attn": None,
        "layer_norm_epsilon": 1e-5,
        "num_kv_heads": None,
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "max_position_embeddings": 2048,
        "ffn_hidden_size": None,
        "activation": "gelu",
        "tie_word_embeddings": True,
    },
    describe=_describe,
    modules=_modules,
    row_blocks={"qkv": heads_in_groups},
    prefix="transformer.",
)
