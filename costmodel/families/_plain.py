"""Readers for families with LayerNorm and an MLP without a gate, after GPT-2."""

from __future__ import annotations

from costmodel.families._shared import activation
from costmodel.model.feed_forward_spec import ACTIVATIONS, MlpSpec
from costmodel.model.hf_config import HFConfig

# GPT-2's names for common keys.
GPT2_ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
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
