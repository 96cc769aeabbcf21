"""Dense models of any family and any shape: their ``config.json``, and what is read out of it."""

from __future__ import annotations

from typing import Any

from costmodel.families import spec_from_config
from costmodel.model.spec import ModelSpec


def plain_config(
    *,
    family: str = "llama",
    num_layers: int = 2,
    hidden_size: int = 64,
    ffn_size: int = 112,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    vocab_size: int = 173,
    max_positions: int = 96,
    tied: bool = False,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Write the shapes of a dense model as a Hugging Face ``config.json`` would.

    Key heads default to the query heads, their width to what divides the hidden size among them.
    """
    config = {
        "model_type": family,
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "dtype": dtype,
    }
    kv_heads, width = num_kv_heads or num_heads, head_dim or hidden_size // num_heads
    if family == "opt":
        assert (kv_heads, width) == (num_heads, hidden_size // num_heads), "OPT has no such heads"
        return config | {"ffn_dim": ffn_size, "word_embed_proj_dim": hidden_size}
    return config | {
        "intermediate_size": ffn_size,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "sliding_window": None,
    }


def plain_model(*, name: str = "tiny", **shapes: Any) -> ModelSpec:
    """Make the model of ``plain_config``."""
    return spec_from_config(plain_config(**shapes), name=name)
