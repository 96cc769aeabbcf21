"""Which pieces of the weights are loaded beside each position: as early as a buffer is free."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from costmodel.pricing.memory import NUM_BUFFERS
from costmodel.schedule.positions import Position


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of the weights of a layer, for one pass."""

    token: int
    layer: int
    number: int


class Lookahead:
    """The loads of one kind of staging: a ring of ``NUM_BUFFERS`` buffers.

    Only layers that are loaded take a turn in the ring. A buffer is free once the layer that it
    held is computed; from then on the next layer of that buffer is loaded, spread evenly over all
    positions until it is computed. So the load of a head passes beside all decoder layers where
    these are resident.

    Parameters
    ----------
    staged
        The numbers of the layers that are loaded; the embedding, number 0, never is.
    num_layers
        Layers of the schedule, embedding included.
    """

    def __init__(
        self,
        staged: Collection[int],
        *,
        num_layers: int,
        num_batches: int,
        num_pieces: int,
        num_tokens: int,
    ) -> None:
        self._staged = sorted(staged)
        self._visits_per_token = num_layers - 1
        self._num_batches = num_batches
        self._num_pieces = num_pieces
        self._num_tokens = num_tokens

    def slot(self, token: int, layer: int) -> int:
        """Return the buffer of a layer in a pass; 0 for a layer that is not loaded."""
        if layer not in self._staged:
            return 0
        return (token * len(self._staged) + self._staged.index(layer)) % NUM_BUFFERS

    def first(self) -> Iterator[Piece]:
        """Yield what the first layer needs, which no position comes before."""
        if self._staged and self._staged[0] == 1:
            yield from (Piece(0, 1, number) for number in range(self._num_pieces))

    def beside(self, here: Position) -> Iterator[Piece]:
        """Yield the pieces that are loaded beside a position."""
        if here.layer == 0 or not self._staged:
            return
        behind = bisect.bisect_right(self._staged, here.layer)
        turn = here.token * len(self._staged) + behind
        yield from self._pieces(turn, here)
        if here.layer not in self._staged:
            # Both buffers are free, or being filled.
            yield from self._pieces(turn + 1, here)

    def _pieces(self, turn: int, here: Position) -> Iterator[Piece]:
        token, index = divmod(turn, len(self._staged))
        if token >= self._num_tokens:
            return
        first = self._visit(turn - NUM_BUFFERS) + 1 if turn >= NUM_BUFFERS else 0
        steps = (self._visit(turn) - first) * self._num_batches
        begin = (here.visit - first) * self._num_batches
        low, high = (
            -(-(begin + batch) * self._num_pieces // steps)
            for batch in (here.batches.start, here.batches.stop)
        )
        for number in range(low, high):
            yield Piece(token, self._staged[index], number)

    def _visit(self, turn: int) -> int:
        token, index = divmod(turn, len(self._staged))
        return token * self._visits_per_token + self._staged[index] - 1
