"""The tokens that end a sequence, by the metadata of a GGUF file."""

from __future__ import annotations

from costmodel.gguf.model import GgufModel

# The end of a sequence, of a turn, and of a message that calls a tool.
ENDING_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def ending_ids(model: GgufModel) -> list[int]:
    """Return the ids of these tokens, each once."""
    found = (model.metadata.get(f"tokenizer.ggml.{key}") for key in ENDING_KEYS)
    return sorted({value for value in found if type(value) is int and value >= 0})
