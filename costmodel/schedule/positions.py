"""The positions of the zig-zag schedule: for every token, every layer, every batch."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.pricing.memory import NUM_BUFFERS


@dataclass(frozen=True, slots=True)
class Position:
    """One visit of the schedule: token, layer and batch, and the slots that serve it."""

    token: int
    layer: int
    batch: int
    visit: int
    step: int
    # Those that are computed here, the first of which is ``batch``.
    batches: range

    @property
    def is_prefill(self) -> bool:
        """Whether the prompts are passed through the model."""
        return self.token == 0

    @property
    def slot(self) -> int:
        """The buffer that stages the cache of this step."""
        return self.step % NUM_BUFFERS
