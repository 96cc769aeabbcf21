"""The tasks that move weights, cache and hidden states between the tiers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from costmodel.schedule.lookahead import Piece
from costmodel.schedule.positions import Position
from costmodel.schedule.task_maker import TaskMaker
from costmodel.schedule.tasks import Task


class MoveMaker(TaskMaker):
    """Makes the tasks that load the inputs of positions and store their results."""

    def load_first(self, first: Position) -> Iterator[Task]:
        """Load the inputs of the first position."""
        yield from self.load_weights(first, list(self.reads.first()), list(self.sends.first()))
        yield from self.load_hidden([first])

    def loads(
        self, here: Position, there: Sequence[Position], pending: Position | None
    ) -> list[tuple[Iterator[Task], bool]]:
        """Return the loads beside ``here`` for later positions, each with whether it must come
        after the pending batch is finished.

        Moves from CPU memory must not queue behind the result of the CPU's attention, and that must
        not queue behind moves from disk. Weights come after both: they have the time of a whole
        layer, and a finished batch frees the buffer that they wait for.
        """
        reads, sends = list(self.reads.beside(here)), list(self.sends.beside(here))
        # The pending batch may be the next one, whose hidden states are not ready yet.
        unmade = pending is None or pending.batch in [position.batch for position in there]
        waits_for_disk = any(piece.layer in self.route.disk_weights for piece in sends)
        num_early = 0 if waits_for_disk or self.num_batches > 1 else 1
        return [
            (self.load_weights(here, (), sends[:num_early]), False),
            (self.load_weights(here, reads, sends[num_early:]), True),
            (self.load_cache(there), self.route.fetches_from_disk),
            (self.load_hidden(there), self.route.disk_hidden or unmade),
            (self.load_layer_cache(here), True),
        ]

    def load_weights(
        self, here: Position, reads: Iterable[Piece], sends: Iterable[Piece]
    ) -> Iterator[Task]:
        """Read pieces of the weights from disk, and send pieces to the GPU, beside a position."""
        for piece in reads:
            target = self._target(here, piece)
            yield self.make(
                "read_weights",
                "disk_read",
                target,
                writes=[self.piece_on_cpu(target, piece.number)],
            )
        for piece in sends:
            target = self._target(here, piece)
            is_read = piece.layer in self.route.disk_weights
            yield self.make(
                "send_weights",
                "h2d",
                target,
                reads=[self.piece_on_cpu(target, piece.number)] if is_read else [],
                writes=[self.piece_sent(target, piece.number)],
            )

    def _target(self, here: Position, piece: Piece) -> Position:
        return replace(
            here, token=piece.token, layer=piece.layer, batch=piece.number, batches=range(0)
        )

    def load_cache(self, targets: Sequence[Position]) -> Iterator[Task]:
        """Load the cache of the target positions."""
        route = self.route
        for target in targets:
            home = (target.layer, target.batch)
            if not self.attends(target) or not self.decodes(target):
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

    def load_layer_cache(self, here: Position) -> Iterator[Task]:
        """Load the next layer's cache of lanes behind the last batch of a layer on disk, whose
        buffer is the other one. Nothing is cached before the first pass."""
        staged = self.route.staged_caches
        if here.layer not in staged or not self.is_last_batch(here):
            return
        turn = here.token * len(staged) + staged.index(here.layer) + 1
        token, place = divmod(turn, len(staged))
        target = replace(here, token=token, layer=staged[place], batch=0, batches=range(1))
        yield self.make(
            "read_cache",
            "disk_read",
            target,
            reads=[("cache", "disk", target.layer)],
            writes=[self.cache_staging(target)],
        )

    def store_layer_cache(self, here: Position) -> Iterator[Task]:
        """Write what a pass over lanes has cached in a layer on disk."""
        if here.layer in self.route.staged_caches and self.is_last_batch(here):
            yield self.make(
                "write_cache",
                "disk_write",
                here,
                reads=[self.cache_staging(here)],
                writes=[("cache", "disk", here.layer)],
            )

    def load_hidden(self, targets: Sequence[Position]) -> Iterator[Task]:
        """Load the hidden states of the target positions."""
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
        """Whether a position makes keys and values that a later pass reads."""
        is_last = self.num_tokens is not None and here.token + 1 >= self.num_tokens
        return self.attends(here) and not is_last

    def return_cache(self, here: Position) -> Iterator[Task]:
        """Copy new keys and values from the GPU to CPU memory."""
        # In decode, only fetched rows come back: the CPU appends the others in place.
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
        """Write new keys and values to disk."""
        if self.route.disk_cache and self.stores_cache(here):
            yield self.make(
                "write_cache",
                "disk_write",
                here,
                reads=[("cache staging", "cpu", here.slot)],
                writes=[("cache", "disk", here.layer, here.batch)],
            )

    def store_hidden(self, here: Position) -> Iterator[Task]:
        """Store the new hidden states of one batch off the GPU."""
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
