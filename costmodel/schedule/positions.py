"""The positions of the zig-zag schedule: for every token, every layer, every batch."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.pricing.buffers import NUM_BUFFERS


@dataclass(frozen=True, slots=True)
class Position:
    """One position of the schedule: token, layer and batch.

    ``visit`` counts the layers over all tokens, ``step`` the positions; ``step`` picks the slots.
    """

    token: int
    layer: int
    batch: int
    visit: int
    step: int
    # The batches that are computed together here; ``batch`` is the first of them.
    batches: range

    @property
    def is_prefill(self) -> bool:
        """Whether this is the pass over the prompts."""
        return self.token == 0

    @property
    def slot(self) -> int:
        """The staging buffer of the cache."""
        return self.step % NUM_BUFFERS
