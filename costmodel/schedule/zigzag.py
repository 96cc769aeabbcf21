"""The zig-zag block schedule, as data. No torch.

For every token, every layer and every batch of the block: compute, store what the batch made,
and load what the next position needs. One load of a layer's weights serves all batches.

Tasks of one channel run in the order in which they are yielded. Between channels a task waits
for the tasks named in ``waits``; they follow from what each task reads and writes (``Hazards``),
so that no order is written down twice. The engine runs these tasks with real work, a simulator
can run them with predicted seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from costmodel.plan.plan import Plan
from costmodel.pricing.memory import NUM_BUFFERS, num_hidden_buffers, num_weight_pieces
from costmodel.schedule.tasks import Hazards, Resource, Task


@dataclass(frozen=True, slots=True)
class _Position:
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
        return self.token == 0

    @property
    def weight_slot(self) -> int:
        return self.visit % NUM_BUFFERS

    @property
    def slot(self) -> int:
        return self.step % NUM_BUFFERS


class ZigzagSchedule:
    """Yield the tasks of one block in order.

    Parameters
    ----------
    plan
        The layers, and which moves the policy needs.
    num_batches, num_tokens
        Batches in the block; passes over the model, the first of which is prefill.
    """

    def __init__(self, plan: Plan, *, num_batches: int, num_tokens: int) -> None:
        self.route = plan.route
        self.kinds = [layer.kind for layer in plan.layers]
        self._batches_at_once = min(plan.batches_at_once, num_batches)
        self.num_batches = num_batches
        self.num_pieces = num_weight_pieces(num_batches)
        self.num_tokens = num_tokens
        self._hazards = Hazards()
        self._count = 0
        self._first_head = self.kinds.index("head")

    def __iter__(self) -> Iterator[Task]:
        positions = list(self._positions_of_token(0))
        yield from self._load_first(positions[0])
        pending: _Position | None = None
        for token in range(self.num_tokens):
            following = token + 1 < self.num_tokens
            behind = list(self._positions_of_token(token + 1)) if following else []
            for i, here in enumerate(positions):
                there = (positions[i + 1 :] or behind)[:1]
                is_split = self._is_split(here)
                if pending is not None and pending.batch in here.batches:
                    # Experts take the tokens of many batches, that of the pending one among them.
                    yield from self._back(pending)
                    pending = None
                yield from self._front(here) if is_split else self._compute(here)
                loads = self._loads(here, there, pending)
                if self._is_in_place(here):
                    if pending is not None:
                        # It still needs the weights that the next ones replace.
                        yield from self._back(pending)
                        pending = None
                    # The next layer's weights come while the CPU runs experts, and must not queue
                    # behind what it makes.
                    for load, _ in loads[:2]:
                        yield from load
                    loads = loads[2:]
                    yield from self._combine(here)
                for load, is_late in loads:
                    yield from () if is_late else load
                # With several batches, the next batch's projection goes first, so that the GPU
                # works while the CPU attends.
                waiting = here if is_split and self.num_batches == 1 else pending
                if waiting is not None:
                    yield from self._back(waiting)
                pending = here if is_split and waiting is not here else None
                if not is_split:
                    yield from self._store_hidden(here)
                for load, is_late in loads:
                    yield from load if is_late else ()
            positions = behind
        if pending is not None:
            yield from self._back(pending)

    def _positions_of_token(self, token: int) -> Iterator[_Position]:
        staged = len(self.kinds) - 1
        for layer, kind in enumerate(self.kinds):
            at_once = self._batches_at_once if token and kind == "experts" else 1
            for batch in range(0, self.num_batches, at_once):
                step = (token * len(self.kinds) + layer) * self.num_batches + batch
                # The embedding is gathered, so it takes no turn in the weight buffers.
                visit = token * staged + layer - 1
                batches = range(batch, min(batch + at_once, self.num_batches))
                yield _Position(token, layer, batch, visit, step, batches)

    def _attends(self, here: _Position) -> bool:
        return self.kinds[here.layer] in ("decoder", "attention")

    def _is_split(self, here: _Position) -> bool:
        is_decode = here.token > 0 and self._attends(here)
        return is_decode and self.route.attends_on_cpu

    def _is_in_place(self, here: _Position) -> bool:
        return here.token > 0 and here.layer in self.route.in_place

    def _make(
        self,
        kind: str,
        channel: str,
        here: _Position,
        *,
        reads: Sequence[Resource] = (),
        writes: Sequence[Resource] = (),
        slot: int | None = None,
    ) -> Task:
        waits = self._hazards.waits(self._count, channel, reads, writes)
        task = Task(
            index=self._count,
            kind=kind,
            channel=channel,
            token=here.token,
            layer=here.layer,
            batch=here.batch,
            slot=here.slot if slot is None else slot,
            hidden_slot=self._hidden_slot(here),
            waits=waits,
        )
        self._count += 1
        return task

    def _load_first(self, first: _Position) -> Iterator[Task]:
        yield from self._load_weights(
            [_Position(0, 1, piece, 0, 0, range(0)) for piece in range(self.num_pieces)]
        )
        yield from self._load_hidden([first])

    def _loads(
        self, here: _Position, there: Sequence[_Position], pending: _Position | None
    ) -> list[tuple[Iterator[Task], bool]]:
        """Return what is loaded beside ``here`` for later, each with whether it must come after
        the pending batch is finished.

        What comes from CPU memory must not queue behind what the CPU has yet to attend, nor that
        behind what has yet to come from disk. Weights give way to both: they have a whole layer's
        time, and a finished batch frees the buffer that they wait for.
        """
        weights = self._next_weights(here)
        from_disk = bool(weights) and weights[0].layer in self.route.disk_weights
        # The next batch's hidden states may be those that the pending one has yet to make.
        unmade = pending is None or pending.batch in [position.batch for position in there]
        return [
            (self._load_weights(weights[:1]), from_disk or self.num_batches > 1),
            (self._load_weights(weights[1:]), True),
            (self._load_cache(there), self.route.fetches_from_disk),
            (self._load_hidden(there), self.route.disk_hidden or unmade),
        ]

    def _next_weights(self, here: _Position) -> list[_Position]:
        """Return the pieces of the next layer's weights that are loaded beside ``here``."""
        last = len(self.kinds) - 1
        token, layer = (here.token, here.layer + 1) if here.layer < last else (here.token + 1, 1)
        if here.layer == 0 or token == self.num_tokens:
            return []
        pieces: Sequence[int] = range(self.num_pieces)
        if self.num_batches > 1:
            pieces = here.batches
        return [
            _Position(token, layer, piece, here.visit + 1, here.step, range(0)) for piece in pieces
        ]

    def _load_weights(self, targets: Sequence[_Position]) -> Iterator[Task]:
        for target in targets:
            piece = (target.weight_slot, target.batch)
            if target.layer in self.route.disk_weights:
                yield self._make(
                    "read_weights",
                    "disk_read",
                    target,
                    writes=[("weights", "cpu", *piece)],
                    slot=target.weight_slot,
                )
            if target.layer in self.route.sent_weights:
                yield self._make(
                    "send_weights",
                    "h2d",
                    target,
                    reads=[("weights", "cpu", *piece)],
                    writes=[("weights", "gpu", *piece)],
                    slot=target.weight_slot,
                )

    def _load_cache(self, targets: Sequence[_Position]) -> Iterator[Task]:
        """Load the cache that the computation of a batch needs."""
        route = self.route
        for target in targets:
            home = (target.layer, target.batch)
            if not self._attends(target) or target.token == 0:
                continue
            if route.disk_cache:
                yield self._make(
                    "read_cache",
                    "disk_read",
                    target,
                    reads=[("cache", "disk", *home)],
                    writes=[("cache staging", "cpu", target.slot)],
                )
            if route.sends_cache:
                staged = [("cache staging", "cpu", target.slot)] if route.fetches_from_disk else []
                yield self._make(
                    "send_cache",
                    "h2d",
                    target,
                    reads=[("cache", "cpu", *home), *staged],
                    writes=[("cache staging", "gpu", target.slot)],
                )

    def _load_hidden(self, targets: Sequence[_Position]) -> Iterator[Task]:
        """Load the hidden states that the computation of a batch needs."""
        route = self.route
        for target in targets:
            if not 0 < target.layer <= self._first_head:
                continue
            slot = self._hidden_slot(target)
            if route.disk_hidden:
                yield self._make(
                    "read_hidden",
                    "disk_read",
                    target,
                    reads=[("hidden", "disk", target.batch)],
                    writes=[("hidden staging", "cpu", slot)],
                )
            if route.sends_hidden:
                yield self._make(
                    "send_hidden",
                    "h2d",
                    target,
                    reads=[("hidden", "cpu", target.batch), ("hidden staging", "cpu", slot)],
                    writes=[("hidden staging", "gpu", slot)],
                )

    def _weights_read(self, here: _Position) -> list[Resource]:
        tier = "gpu" if self.route.has_gpu else "cpu"
        return [
            ("weights", tier, here.weight_slot, piece)
            for piece in range(self.num_pieces)
            if here.layer > 0
        ]

    def _hidden_slot(self, here: _Position) -> int:
        return here.step % num_hidden_buffers(has_gpu=self.route.has_gpu)

    def _cache_staging(self, here: _Position) -> Resource:
        return ("cache staging", "gpu" if self.route.has_gpu else "cpu", here.slot)

    def _hidden_staging(self, here: _Position) -> Resource:
        tier = "gpu" if self.route.has_gpu else "cpu"
        return ("hidden staging", tier, self._hidden_slot(here))

    def _compute(self, here: _Position) -> Iterator[Task]:
        route = self.route
        in_place = self._is_in_place(here)
        if in_place or (here.token > 0 and here.layer in route.demanding):
            yield from self._load_experts(here)
        if in_place:
            yield from self._run_experts(here)
        yield self._make(
            "compute",
            self.route.compute_channel,
            here,
            reads=self._weights_read(here),
            writes=[self._hidden_staging(here), self._cache_staging(here)],
        )
        yield from self._return_cache(here)
        yield from self._write_cache(here)

    def _load_experts(self, here: _Position) -> Iterator[Task]:
        """Let the router choose, and load what it chose."""
        slot = here.weight_slot
        yield self._make(
            "route",
            self.route.compute_channel,
            here,
            reads=[*self._weights_read(here), self._hidden_staging(here)],
            writes=[("routing", slot)],
        )
        for piece in range(self.num_pieces) if here.layer in self.route.demanding else ():
            there = replace(here, batch=piece)
            if here.layer in self.route.disk_weights:
                yield self._make(
                    "read_experts",
                    "disk_read",
                    there,
                    reads=[("routing", slot)],
                    writes=[("weights", "cpu", slot, piece)],
                    slot=slot,
                )
            if here.layer in self.route.sent_weights:
                yield self._make(
                    "send_experts",
                    "h2d",
                    there,
                    reads=[("routing", slot), ("weights", "cpu", slot, piece)],
                    writes=[("weights", "gpu", slot, piece)],
                    slot=slot,
                )

    def _run_experts(self, here: _Position) -> Iterator[Task]:
        """Let the CPU run the experts that are in its memory."""
        slot = here.weight_slot
        yield self._make(
            "return_tokens",
            "d2h",
            here,
            reads=[("routing", slot)],
            writes=[("tokens", "cpu", slot)],
        )
        yield self._make(
            "run_experts",
            "cpu_compute",
            here,
            reads=[("tokens", "cpu", slot)],
            writes=[("made", "cpu", slot)],
        )

    def _combine(self, here: _Position) -> Iterator[Task]:
        """Add what the CPU's experts made to what the GPU's did."""
        slot = here.weight_slot
        yield self._make(
            "send_made",
            "h2d",
            here,
            reads=[("made", "cpu", slot)],
            writes=[("made", "gpu", slot)],
        )
        yield self._make(
            "combine",
            "gpu_compute",
            here,
            # What is made may pass through a norm of the layer.
            reads=[*self._weights_read(here), ("made", "gpu", slot)],
            writes=[self._hidden_staging(here)],
        )

    def _front(self, here: _Position) -> Iterator[Task]:
        """Project on the GPU, attend on the CPU what lies there."""
        slot, home = here.slot, (here.layer, here.batch)
        yield self._make(
            "project",
            "gpu_compute",
            here,
            reads=[*self._weights_read(here), self._hidden_staging(here)],
            writes=[
                self._cache_staging(here),
                ("projected", "gpu", slot),
                ("attended", "gpu", slot),
            ],
        )
        yield self._make(
            "return_queries",
            "d2h",
            here,
            reads=[("projected", "gpu", slot)],
            writes=[("projected", "cpu", slot)],
        )
        yield from self._return_cache(here)
        yield self._make(
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
        yield from self._write_cache(here)

    def _back(self, here: _Position) -> Iterator[Task]:
        """Put together what both attended, and finish the layer."""
        yield self._make(
            "send_attended",
            "h2d",
            here,
            reads=[("attended", "cpu", here.slot)],
            writes=[("attended", "gpu", here.slot)],
        )
        yield self._make(
            "finish",
            "gpu_compute",
            here,
            reads=[*self._weights_read(here), ("attended", "gpu", here.slot)],
            writes=[self._hidden_staging(here)],
        )
        yield from self._store_hidden(here)

    def _stores_cache(self, here: _Position) -> bool:
        return self._attends(here) and here.token + 1 < self.num_tokens

    def _return_cache(self, here: _Position) -> Iterator[Task]:
        """Hand new cache down from the GPU."""
        # After prefill, only fetched rows come back: the others were appended where they lie.
        moves = self.route.stores_cache and (here.is_prefill or self.route.sends_cache)
        if moves and self._stores_cache(here):
            yield self._make(
                "return_cache",
                "d2h",
                here,
                reads=[("cache staging", "gpu", here.slot)],
                writes=[
                    ("cache", "cpu", here.layer, here.batch),
                    ("cache staging", "cpu", here.slot),
                ],
            )

    def _write_cache(self, here: _Position) -> Iterator[Task]:
        """Hand new cache down to the disk."""
        if self.route.disk_cache and self._stores_cache(here):
            yield self._make(
                "write_cache",
                "disk_write",
                here,
                reads=[("cache staging", "cpu", here.slot)],
                writes=[("cache", "disk", here.layer, here.batch)],
            )

    def _store_hidden(self, here: _Position) -> Iterator[Task]:
        """Hand the new hidden states of one batch down."""
        if here.layer >= self._first_head:
            return
        slot = self._hidden_slot(here)
        if self.route.sends_hidden:
            yield self._make(
                "return_hidden",
                "d2h",
                here,
                reads=[("hidden staging", "gpu", slot)],
                writes=[("hidden", "cpu", here.batch), ("hidden staging", "cpu", slot)],
            )
        if self.route.disk_hidden:
            yield self._make(
                "write_hidden",
                "disk_write",
                here,
                reads=[("hidden staging", "cpu", slot)],
                writes=[("hidden", "disk", here.batch)],
            )
