"""The tasks that move weights, cache and hidden states between the tiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from costmodel.schedule.task_maker import Position, TaskMaker
from costmodel.schedule.tasks import Task


class MoveMaker(TaskMaker):
    """Loads what positions need, and stores what they made."""

    def load_first(self, first: Position) -> Iterator[Task]:
        """Load what the first position needs."""
        yield from self.load_weights(
            [Position(0, 1, piece, 0, 0, range(0)) for piece in range(self.num_pieces)]
        )
        yield from self.load_hidden([first])

    def loads(
        self, here: Position, there: Sequence[Position], pending: Position | None
    ) -> list[tuple[Iterator[Task], bool]]:
        """Return what is loaded beside ``here`` for later, each with whether it must come after
        the pending batch is finished.

        What comes from CPU memory must not queue behind what the CPU has yet to attend, nor that
        behind what has yet to come from disk. Weights give way to both: they have a whole layer's
        time, and a finished batch frees the buffer that they wait for.
        """
        weights = self.next_weights(here)
        from_disk = bool(weights) and weights[0].layer in self.route.disk_weights
        # The next batch's hidden states may be those that the pending one has yet to make.
        unmade = pending is None or pending.batch in [position.batch for position in there]
        return [
            (self.load_weights(weights[:1]), from_disk or self.num_batches > 1),
            (self.load_weights(weights[1:]), True),
            (self.load_cache(there), self.route.fetches_from_disk),
            (self.load_hidden(there), self.route.disk_hidden or unmade),
        ]

    def next_weights(self, here: Position) -> list[Position]:
        """Return the pieces of the next layer's weights that are loaded beside ``here``."""
        last = len(self.kinds) - 1
        token, layer = (here.token, here.layer + 1) if here.layer < last else (here.token + 1, 1)
        if here.layer == 0 or token == self.num_tokens:
            return []
        pieces: Sequence[int] = range(self.num_pieces)
        if self.num_batches > 1:
            pieces = here.batches
        return [
            Position(token, layer, piece, here.visit + 1, here.step, range(0)) for piece in pieces
        ]

    def load_weights(self, targets: Sequence[Position]) -> Iterator[Task]:
        """Load pieces of the weights of a layer."""
        for target in targets:
            piece = (target.weight_slot, target.batch)
            if target.layer in self.route.disk_weights:
                yield self.make(
                    "read_weights",
                    "disk_read",
                    target,
                    writes=[("weights", "cpu", *piece)],
                    slot=target.weight_slot,
                )
            if target.layer in self.route.sent_weights:
                yield self.make(
                    "send_weights",
                    "h2d",
                    target,
                    reads=[("weights", "cpu", *piece)],
                    writes=[("weights", "gpu", *piece)],
                    slot=target.weight_slot,
                )

    def load_cache(self, targets: Sequence[Position]) -> Iterator[Task]:
        """Load the cache that the computation of a batch needs."""
        route = self.route
        for target in targets:
            home = (target.layer, target.batch)
            if not self.attends(target) or target.token == 0:
                continue
            if route.disk_cache:
                yield self.make(
                    "read_cache",
                    "disk_read",
                    target,
                    reads=[("cache", "disk", *home)],
                    writes=[("cache staging", "cpu", target.slot)],
                )
            if route.sends_cache:
                staged = [("cache staging", "cpu", target.slot)] if route.fetches_from_disk else []
                yield self.make(
                    "send_cache",
                    "h2d",
                    target,
                    reads=[("cache", "cpu", *home), *staged],
                    writes=[("cache staging", "gpu", target.slot)],
                )

    def load_hidden(self, targets: Sequence[Position]) -> Iterator[Task]:
        """Load the hidden states that the computation of a batch needs."""
        route = self.route
        for target in targets:
            if not self.takes_hidden(target):
                continue
            slot = self.hidden_slot(target)
            if route.disk_hidden:
                yield self.make(
                    "read_hidden",
                    "disk_read",
                    target,
                    reads=[("hidden", "disk", target.batch)],
                    writes=[("hidden staging", "cpu", slot)],
                )
            if route.sends_hidden:
                yield self.make(
                    "send_hidden",
                    "h2d",
                    target,
                    reads=[("hidden", "cpu", target.batch), ("hidden staging", "cpu", slot)],
                    writes=[("hidden staging", "gpu", slot)],
                )

    def stores_cache(self, here: Position) -> bool:
        """Whether a position makes cache that a later pass reads."""
        return self.attends(here) and here.token + 1 < self.num_tokens

    def return_cache(self, here: Position) -> Iterator[Task]:
        """Hand new cache down from the GPU."""
        # After prefill, only fetched rows come back: the others were appended where they lie.
        moves = self.route.stores_cache and (here.is_prefill or self.route.sends_cache)
        if moves and self.stores_cache(here):
            yield self.make(
                "return_cache",
                "d2h",
                here,
                reads=[("cache staging", "gpu", here.slot)],
                writes=[
                    ("cache", "cpu", here.layer, here.batch),
                    ("cache staging", "cpu", here.slot),
                ],
            )

    def write_cache(self, here: Position) -> Iterator[Task]:
        """Hand new cache down to the disk."""
        if self.route.disk_cache and self.stores_cache(here):
            yield self.make(
                "write_cache",
                "disk_write",
                here,
                reads=[("cache staging", "cpu", here.slot)],
                writes=[("cache", "disk", here.layer, here.batch)],
            )

    def store_hidden(self, here: Position) -> Iterator[Task]:
        """Hand the new hidden states of one batch down."""
        if here.layer >= self.first_head:
            return
        slot = self.hidden_slot(here)
        if self.route.sends_hidden:
            yield self.make(
                "return_hidden",
                "d2h",
                here,
                reads=[("hidden staging", "gpu", slot)],
                writes=[("hidden", "cpu", here.batch), ("hidden staging", "cpu", slot)],
            )
        if self.route.disk_hidden:
            yield self.make(
                "write_hidden",
                "disk_write",
                here,
                reads=[("hidden staging", "cpu", slot)],
                writes=[("hidden", "disk", here.batch)],
            )
