"""Which layers of a model one stage of a pipeline runs. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.model.checks import check_least
from profiles.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """Some adjacent decoder layers of a model: those of one stage of a pipeline.

    The first stage also has the embedding, and the last one the output head.

    Parameters
    ----------
    first
        Number of the stage's first decoder layer in the whole model, from zero.
    count
        Decoder layers of the stage.
    num_layers
        Decoder layers of the whole model.
    """

    first: int
    count: int
    num_layers: int

    def __post_init__(self) -> None:
        check_least(self, 0, "first")
        check_least(self, 1, "count", "num_layers")
        if self.end > self.num_layers:
            raise InputError(
                "stage",
                got=f"layers {self.first} to {self.end - 1}",
                allowed=f"some of layers 0 to {self.num_layers - 1}",
            )

    @property
    def end(self) -> int:
        """The number just behind the stage's last layer."""
        return self.first + self.count

    @property
    def has_embedding(self) -> bool:
        """Whether the stage makes hidden states of tokens; others receive them."""
        return self.first == 0

    @property
    def has_head(self) -> bool:
        """Whether the stage chooses tokens; others hand over their hidden states."""
        return self.end == self.num_layers
