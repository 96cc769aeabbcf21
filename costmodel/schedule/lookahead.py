"""The pieces of the weights that are loaded beside each position, as early as buffers are free."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from costmodel.plan.plan import Plan
from costmodel.pricing.buffers import num_weight_buffers, num_weight_pieces, staging_kind
from costmodel.schedule.positions import Position
from profiles.units import MIB

# With smaller pieces, other moves would hardly start earlier.
LEAST_PIECE_BYTES = 16 * MIB


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """One piece of the weights of a layer, for one pass."""

    token: int
    layer: int
    number: int


class Lookahead:
    """The loads of all layers to one tier.

    Parameters
    ----------
    loaded
        The numbers of the layers that are loaded. The embedding, number 0, is never among them.
    num_batches, num_tokens
        Batches in the block; passes over the model, the first of which is prefill, or ``None`` for
        passes without an end.
    """

    def __init__(
        self, plan: Plan, loaded: Collection[int], *, num_batches: int, num_tokens: int | None
    ) -> None:
        self.loaded = loaded
        self.num_pieces = num_load_pieces(plan, num_batches)
        self._rings = [
            _Ring(
                layers,
                visits_per_token=len(plan.layers) - 1,
                num_batches=num_batches,
                num_pieces=self.num_pieces,
                num_tokens=num_tokens,
                num_buffers=num_weight_buffers(kind),
            )
            for kind, layers in _rings(plan, loaded).items()
        ]
        # Of each layer, its place in its ring, the layers of that ring and its buffers: every task
        # asks for it.
        self._places = {
            layer: (place, len(ring.layers), ring.num_buffers)
            for ring in self._rings
            for place, layer in enumerate(ring.layers)
        }

    def slot(self, token: int, layer: int) -> int:
        """Return the buffer of a layer in a pass; 0 for a layer that is not loaded."""
        place, count, num_buffers = self._places.get(layer, (0, 0, 1))
        return (token * count + place) % num_buffers

    def first(self) -> Iterator[Piece]:
        """Yield the pieces of layer 1, which are loaded before the first position."""
        if 1 in self.loaded:
            yield from (Piece(0, 1, number) for number in range(self.num_pieces))

    def beside(self, here: Position) -> Iterator[Piece]:
        """Yield the pieces that are loaded beside a position, in the order of their need."""
        if here.layer > 0:
            yield from heapq.merge(*(ring.beside(here) for ring in self._rings))


class _Ring:
    """Layers that take turns in ``num_buffers`` staging buffers.

    A buffer is free when its layer is computed. From then on, the next layer of that buffer is
    loaded, in pieces that are spread evenly over all positions until it is computed. For example,
    the head is loaded beside all decoder layers where those are resident.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        visits_per_token: int,
        num_batches: int,
        num_pieces: int,
        num_tokens: int | None,
        num_buffers: int,
    ) -> None:
        self.layers = layers
        self.num_buffers = num_buffers
        self._visits_per_token = visits_per_token
        self._num_batches = num_batches
        self._num_pieces = num_pieces
        self._num_tokens = num_tokens

    def beside(self, here: Position) -> Iterator[Piece]:
        behind = bisect.bisect_right(self.layers, here.layer)
        turn = here.token * len(self.layers) + behind
        yield from self._pieces(turn, here)
        is_free = behind == 0 or self.layers[behind - 1] != here.layer
        if is_free and self.num_buffers > 1:
            # This layer takes no buffer, so that both are free or being filled.
            yield from self._pieces(turn + 1, here)

    def _pieces(self, turn: int, here: Position) -> Iterator[Piece]:
        token, index = divmod(turn, len(self.layers))
        if self._num_tokens is not None and token >= self._num_tokens:
            return
        first = self._visit(turn - self.num_buffers) + 1 if turn >= self.num_buffers else 0
        if here.visit < first:
            return
        num_steps = (self._visit(turn) - first) * self._num_batches
        before = (here.visit - first) * self._num_batches
        low, high = (
            -(-(before + batch) * self._num_pieces // num_steps)
            for batch in (here.batches.start, here.batches.stop)
        )
        for number in range(low, high):
            yield Piece(token, self.layers[index], number)

    def _visit(self, turn: int) -> int:
        token, index = divmod(turn, len(self.layers))
        return token * self._visits_per_token + self.layers[index] - 1


def num_load_pieces(plan: Plan, num_batches: int) -> int:
    """Return the number of pieces in which the weights of each layer are loaded.

    There is one piece for each batch. Where few layers are loaded, each has more positions, and
    more pieces: a channel works in order, so that a long piece delays cache and hidden states.
    Loads on demand are not spread over positions.
    """
    fewest = num_weight_pieces(num_batches)
    tiers = (plan.route.disk_weights, plan.route.sent_weights)
    rings = [layers for loaded in tiers for layers in _rings(plan, loaded).values()]
    if not rings or plan.policy.loads_on_demand:
        return fewest
    visits = min((len(plan.layers) - 1) // len(layers) for layers in rings)
    largest = max(
        sum(component.cut.off_gpu_bytes for component in plan.weights[layer])
        for layers in rings
        for layer in layers
    )
    return max(fewest, min(visits * num_batches, largest // LEAST_PIECE_BYTES))


def _rings(plan: Plan, loaded: Collection[int]) -> dict[str, list[int]]:
    """Return the loaded layers of each kind of staging buffers, in the order of the schedule."""
    rings: dict[str, list[int]] = {}
    for layer in sorted(loaded):
        kind = staging_kind(plan.layers[layer], experts=plan.expert_staging)
        rings.setdefault(kind, []).append(layer)
    return rings
