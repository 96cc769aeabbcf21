"""The zig-zag block schedule, as data. No torch.

For every token, every layer and every batch of the block: compute, store the results, and load
the inputs of the next position. One load of a layer's weights serves all batches.

Tasks of one channel run in the order of this iterator. Between channels, a task waits for the tasks
in ``waits``, which ``Hazards`` derives from the resources that tasks read and write. The engine
runs the tasks; the simulation gives them predicted seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from costmodel.pricing.buffers import SMALL_CHUNKS, Chunks
from costmodel.schedule.moves import MoveMaker
from costmodel.schedule.positions import Position
from costmodel.schedule.tasks import Resource, Task


class ZigzagSchedule(MoveMaker):
    """Yield the tasks of one block in order.

    Parameters
    ----------
    plan
        The layers, and the moves that the policy needs.
    num_batches, num_tokens
        Batches in the block; passes over the model, the first of which is prefill.
    batch_size, prompt_len
        Most sequences of a batch, and most tokens of their prompts; unless told, the policy's.
    """

    def __iter__(self) -> Iterator[Task]:
        positions = list(self._positions_of_token(0))
        yield from self.load_first(positions[0])
        pending: Position | None = None
        for token in itertools.count() if self.num_tokens is None else range(self.num_tokens):
            behind = list(self._positions_of_token(token + 1))
            if token + 1 == self.num_tokens:
                behind = []
            for i, here in enumerate(positions):
                there = (positions[i + 1 :] or behind)[:1]
                is_split = self.is_split(here)
                if pending is not None and pending.batch in here.batches:
                    # Experts take the tokens of many batches, the pending one's among them.
                    yield from self._back(pending)
                    pending = None
                loads = self.loads(here, there, pending)
                if self.walks(here.layer):
                    # Weights and cache are read while the tokens are routed, before the experts.
                    weights_and_cache, loads = loads[:3], loads[3:]
                    for load, _ in weights_and_cache:
                        yield from load
                yield from self._front(here) if is_split else self._compute(here)
                if self.is_in_place(here):
                    if pending is not None:
                        # The pending batch still needs the weights that these loads replace.
                        yield from self._back(pending)
                        pending = None
                    # The next layer's weights and its cache are sent while the CPU runs experts.
                    # They must not queue behind the experts' output, nor that behind the disk.
                    num_early = 2 if self.route.fetches_from_disk else 3
                    for load, _ in loads[:num_early]:
                        yield from load
                    loads = loads[num_early:]
                    yield from self._combine(here)
                for load, is_late in loads:
                    yield from () if is_late else load
                # With several batches, the next batch's projection comes first, so that the GPU
                # works while the CPU attends.
                waiting = here if is_split and self.num_batches == 1 else pending
                if waiting is not None:
                    yield from self._back(waiting)
                pending = here if is_split and waiting is not here else None
                if not is_split:
                    yield from self.store_hidden(here)
                for load, is_late in loads:
                    yield from load if is_late else ()
                yield from self._read_ahead(here)
            positions = behind
        if pending is not None:
            yield from self._back(pending)

    def _positions_of_token(self, token: int) -> Iterator[Position]:
        staged = len(self.kinds) - 1
        for layer in range(len(self.kinds)):
            is_prefill = token == 0 and self.num_tokens is not None
            at_once = self.plan.batches_together(layer, is_prefill=is_prefill)
            for batch in range(0, self.num_batches, at_once):
                step = (token * len(self.kinds) + layer) * self.num_batches + batch
                # The embedding is gathered and takes no staging buffer.
                visit = token * staged + layer - 1
                batches = range(batch, min(batch + at_once, self.num_batches))
                yield Position(token, layer, batch, visit, step, batches)

    def _compute(self, here: Position) -> Iterator[Task]:
        route = self.route
        in_place = self.is_in_place(here)
        if self.walks(here.layer):
            yield from self._walk_experts(here)
        elif in_place or (self.decodes(here) and here.layer in route.demanding):
            yield from self._load_experts(here)
        if in_place:
            yield from self._run_experts(here)
        yield self.make(
            "compute",
            self.route.compute_channel,
            here,
            reads=self.weights_read(here),
            writes=[
                self.hidden_staging(here),
                *[self.cache_staging(here)] * self.attends(here),
                # Experts that were loaded may have taken the places of others in memory.
                *[("expert places", here.layer)] * self.walks(here.layer),
            ],
        )
        yield from self.return_cache(here)
        yield from self.write_cache(here)
        yield from self.store_layer_cache(here)

    def _walk_experts(self, here: Position) -> Iterator[Task]:
        """Route the tokens; load and compute the chosen experts in chunks."""
        yield self._route(here)
        routing, channel = ("routing", here.layer), self.route.compute_channel
        chunks = self._chunks(here, here.layer)
        for number in range(chunks.count + 1):
            # The next chunk is loaded while this one is computed.
            if chunks.ahead <= number < chunks.count:
                there, staged = replace(here, batch=number), _slot(number, chunks)
                yield self.make(
                    "read_experts", "disk_read", there, reads=[routing], writes=[staged]
                )
            if number > 0:
                there, staged = replace(here, batch=number - 1), _slot(number - 1, chunks)
                yield self.make("run_chunk", channel, there, reads=[routing, staged])

    def _read_ahead(self, here: Position) -> Iterator[Task]:
        """Read the first chunks of the next layer's experts before its tokens are routed, spread
        over the batches that attend, behind what the next one needs."""
        layer = here.layer + 1
        if not (self.attends(here) and self.walks(layer)):
            return
        chunks = self._chunks(here, layer)
        low, high = (chunks.ahead * (here.batch + i) // self.num_batches for i in (0, 1))
        for number in range(low, high):
            # Experts of two layers may differ in size. So the first chunk waits until all of the
            # layer before are computed.
            slots = [("staged experts", slot) for slot in range(SMALL_CHUNKS)]
            yield self.make(
                "read_experts",
                "disk_read",
                replace(here, layer=layer, batch=number),
                reads=[("expert places", layer)],
                writes=slots if number == 0 else [_slot(number, chunks)],
            )

    def _chunks(self, here: Position, layer: int) -> Chunks:
        tokens = self.batch_size * (1 if self.decodes(here) else self.prompt_len)
        return self.plan.chunks(layer, self.num_batches, tokens)

    def _route(self, here: Position) -> Task:
        """Route the tokens."""
        return self.make(
            "route",
            self.route.compute_channel,
            here,
            reads=[*self.weights_read(here), self.hidden_staging(here)],
            writes=[("routing", here.layer)],
        )

    def _load_experts(self, here: Position) -> Iterator[Task]:
        """Route the tokens, and load the chosen experts."""
        yield self._route(here)
        routing = ("routing", here.layer)
        for number in range(self.num_pieces) if here.layer in self.route.demanding else ():
            there = replace(here, batch=number)
            read = self.piece_on_cpu(there, number)
            is_read = here.layer in self.route.disk_weights
            if is_read:
                yield self.make("read_experts", "disk_read", there, reads=[routing], writes=[read])
            if here.layer in self.route.sent_weights:
                yield self.make(
                    "send_experts",
                    "h2d",
                    there,
                    reads=[routing, *[read] * is_read],
                    writes=[self.piece_sent(there, number)],
                )

    def _run_experts(self, here: Position) -> Iterator[Task]:
        """Run experts on the CPU, in place."""
        layer = here.layer
        yield self.make(
            "return_tokens",
            "d2h",
            here,
            reads=[("routing", layer)],
            writes=[("tokens", "cpu", layer)],
        )
        yield self.make(
            "run_experts",
            "cpu_compute",
            here,
            reads=[("tokens", "cpu", layer)],
            writes=[("made", "cpu", layer)],
        )

    def _combine(self, here: Position) -> Iterator[Task]:
        """Add the output of the CPU's experts to that of the GPU's."""
        yield self.make(
            "send_made",
            "h2d",
            here,
            reads=[("made", "cpu", here.layer)],
            writes=[("made", "gpu", here.layer)],
        )
        yield self.make(
            "combine",
            "gpu_compute",
            here,
            # The output may pass through a norm of the layer.
            reads=[*self.weights_read(here), ("made", "gpu", here.layer)],
            writes=[self.hidden_staging(here)],
        )

    def _front(self, here: Position) -> Iterator[Task]:
        """Project on the GPU, and attend on both devices."""
        slot, home = here.slot, (here.layer, here.batch)
        yield self.make(
            "project",
            "gpu_compute",
            here,
            reads=[*self.weights_read(here), self.hidden_staging(here)],
            writes=[
                self.cache_staging(here),
                ("projected", "gpu", slot),
                ("attended", "gpu", slot),
            ],
        )
        yield self.make(
            "return_queries",
            "d2h",
            here,
            reads=[("projected", "gpu", slot)],
            writes=[("projected", "cpu", slot)],
        )
        yield from self.return_cache(here)
        yield self.make(
            "attend",
            "cpu_compute",
            here,
            reads=[("projected", "cpu", slot)],
            writes=[
                ("cache", "cpu", *home),
                ("cache staging", "cpu", slot),
                ("attended", "cpu", slot),
            ],
        )
        yield from self.write_cache(here)

    def _back(self, here: Position) -> Iterator[Task]:
        """Merge the attention of both devices, and finish the layer."""
        yield self.make(
            "send_attended",
            "h2d",
            here,
            reads=[("attended", "cpu", here.slot)],
            writes=[("attended", "gpu", here.slot)],
        )
        yield self.make(
            "finish",
            "gpu_compute",
            here,
            reads=[*self.weights_read(here), ("attended", "gpu", here.slot)],
            writes=[self.hidden_staging(here)],
        )
        yield from self.store_hidden(here)


def _slot(number: int, chunks: Chunks) -> Resource:
    """Return the place of a chunk of experts."""
    return ("staged experts", number % chunks.staged)
