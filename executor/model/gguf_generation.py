"""What the metadata of a GGUF file say about generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from costmodel.gguf.model import GgufModel
from executor.model.generation_config import GenerationConfig

# Ids of tokens that end a text, a turn, or a message.
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Control tokens that end a turn in the formats of chats, for files that lack the keys.
END_TOKENS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>"),
    *("<|endoftext|>", "<|return|>", "<|call|>", "[e~["),
)
# With these two, ``<|end|>`` only ends a message of several (gpt-oss).
HARMONY, HARMONY_PART = {"<|return|>", "<|call|>"}, "<|end|>"
CONTROL = 3
# Keys of sampling, and their names in transformers.
SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def gguf_generation_config(model: GgufModel, path: Path) -> GenerationConfig:
    """Return the settings of a file, by their names in transformers.

    No file says whether tokens are drawn, so they are not unless a flag says so.
    """
    metadata = model.metadata
    found = {name: metadata[key] for key, name in SAMPLING_KEYS.items() if key in metadata}
    ends = _end_ids(model)
    values: dict[str, Any] = {**found, **({"eos_token_id": ends} if ends else {})}
    return GenerationConfig(path=path, values=values)


def _end_ids(model: GgufModel) -> list[int]:
    """Return the ids that end a sequence: those of the keys, and known ones among the tokens."""
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    types = model.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, tuple) or not isinstance(types, np.ndarray):
        return []
    named = (model.metadata.get(f"tokenizer.ggml.{key}") for key in END_KEYS)
    ends = {i for i in named if type(i) is int and 0 <= i < len(tokens)}
    known = {
        token: number
        for number, (token, kind) in enumerate(zip(tokens, types.tolist(), strict=False))
        if kind == CONTROL and token in END_TOKENS
    }
    ends |= set(known.values())
    if known.keys() >= HARMONY:
        ends.discard(known.get(HARMONY_PART, -1))
    return sorted(ends)
