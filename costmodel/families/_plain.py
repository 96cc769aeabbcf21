"""Readers for families with LayerNorm and an MLP without a gate, after GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from costmodel.families._shared import activation, decoder, equal_layers, layer_norm
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.feed_forward_spec import ACTIVATIONS, MlpSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec

# GPT-2's names for common keys.
GPT2_ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

GPT2_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
GPT2_MODULES: Mapping[str, tuple[str, ...]] = {
    "tokens": ("wte",),
    "positions": ("wpe",),
    "attention_norm": ("h.{layer}.ln_1",),
    "qkv": ("h.{layer}.attn.c_attn",),
    "output": ("h.{layer}.attn.c_proj",),
    "mlp_norm": ("h.{layer}.ln_2",),
    "up": ("h.{layer}.mlp.c_fc",),
    "down": ("h.{layer}.mlp.c_proj",),
    "final_norm": ("ln_f",),
}


def equal_heads(config: HFConfig) -> tuple[int, int]:
    """Read the number of heads, and the elements of each: together they have the hidden size."""
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    if hidden % heads:
        key = config.aliases.get("hidden_size", "hidden_size")
        raise config.refusal(key, hidden, f"a multiple of the {heads} heads")
    return heads, hidden // heads


def gpt2_mlp(config: HFConfig, size_key: str = "n_inner") -> MlpSpec:
    """Read an MLP without a gate; it is four times as wide as the model where the size is null."""
    return MlpSpec(
        size=config.whole(size_key, instead_of_null=4 * config.whole("hidden_size")),
        activation=activation(config, "activation_function", ACTIVATIONS),
        is_gated=False,
        has_bias=True,
    )


def gpt2_decoder(config: HFConfig, *, has_one_kv_head: bool, dtype: str) -> ModelSpec:
    """Read a decoder of GPT-2's kind; ``dtype`` is used where the config names none."""
    heads, head_dim = equal_heads(config)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=1 if has_one_kv_head else heads,
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
        dtype=dtype,
    )
