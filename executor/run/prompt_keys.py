"""Keys and values of a prompt that passes through a layer in parts."""

from __future__ import annotations

import torch

from executor.run.chunks import PromptPart

# Keys and values, or the rows that are both: [tokens, rows, head_dim] each.
Vectors = tuple[torch.Tensor, ...]


class PromptKeys:
    """Keeps what a layer has made of the prompt that is cut at the end of a chunk.

    There is one at most: the tokens of a prompt are adjacent, and chunks follow one another.
    """

    def __init__(self) -> None:
        self._kept: Vectors = ()

    def so_far(self, part: PromptPart, own: Vectors) -> Vectors:
        """Add the vectors of a part of a prompt; returns all from the prompt's first token on."""
        if part.is_first and part.is_last:
            return own
        if part.is_first:
            tokens = part.ends - part.begins
            self._kept = tuple(vector.new_empty(tokens, *vector.shape[1:]) for vector in own)
        first = part.first_position - part.begins
        end = first + part.num_tokens
        for kept, vector in zip(self._kept, own, strict=True):
            kept[first:end] = vector
        found = tuple(kept[:end] for kept in self._kept)
        if part.is_last:
            self._kept = ()
        return found
