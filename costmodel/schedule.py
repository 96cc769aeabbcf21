"""The zig-zag block schedule, as data. No torch.

For every token, every layer and every batch of the block: compute, store what the batch made,
and load what the next position needs. One load of a layer's weights serves all batches.

Tasks of one channel run in the order in which they are yielded. Between channels a task waits
for the tasks named in ``waits``; they follow from what each task reads and writes (``_Hazards``),
so that no order is written down twice. The engine runs these tasks with real work, a simulator
can run them with predicted seconds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from costmodel.layout import LayerLayout
from costmodel.memory import NUM_BUFFERS
from costmodel.route import Route

Resource = Hashable


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One piece of work on one channel.

    ``batch`` is also the piece of a layer's weights that a weight task moves, so that the loads
    of the next layer spread over the batches of this one. ``slot`` is the staging buffer.
    ``waits`` are indices of earlier tasks on other channels.
    """

    index: int
    kind: str
    channel: str
    token: int
    layer: int
    batch: int
    slot: int
    waits: tuple[int, ...]

    @property
    def is_prefill(self) -> bool:
        """Whether the task belongs to the pass over the prompts."""
        return self.token == 0


class _Hazards:
    """Waits that follow from what tasks read and write: a reader waits for the last writer, a
    writer for the last writer and for everybody who has read since."""

    def __init__(self) -> None:
        self._writer: dict[Resource, tuple[str, int]] = {}
        self._readers: dict[Resource, dict[str, int]] = {}

    def waits(
        self, index: int, channel: str, reads: Sequence[Resource], writes: Sequence[Resource]
    ) -> tuple[int, ...]:
        # A channel works in order, so its latest task stands for all before it.
        latest: dict[str, int] = {}
        for resource in (*reads, *writes):
            if resource in self._writer:
                other, writer = self._writer[resource]
                latest[other] = max(latest.get(other, 0), writer)
        for resource in writes:
            for other, reader in self._readers.pop(resource, {}).items():
                latest[other] = max(latest.get(other, 0), reader)
            self._writer[resource] = (channel, index)
        for resource in reads:
            self._readers.setdefault(resource, {})[channel] = index
        return tuple(sorted(i for other, i in latest.items() if other != channel))


@dataclass(frozen=True, slots=True)
class _Position:
    """One visit of the schedule: token, layer and batch, and the slots that serve it."""

    token: int
    layer: int
    batch: int
    visit: int
    step: int

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
    route
        Which moves the policy needs.
    layers
        The model's layers, embedding first, head chunks last.
    num_batches, num_tokens
        Batches in the block; passes over the model, the first of which is prefill.
    """

    def __init__(
        self, route: Route, layers: Sequence[LayerLayout], *, num_batches: int, num_tokens: int
    ) -> None:
        self.route = route
        self.kinds = [layer.kind for layer in layers]
        self.num_batches = num_batches
        self.num_tokens = num_tokens
        self._hazards = _Hazards()
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
                is_split = self._is_split(here)
                yield from self._front(here) if is_split else self._compute(here)
                # With several batches, the next batch's projection goes first, so that the GPU
                # works while the CPU attends.
                if pending is not None:
                    yield from self._back(pending)
                    pending = None
                if is_split:
                    pending = here
                    if self.num_batches == 1:
                        yield from self._back(here)
                        pending = None
                yield from self._load_next(here, positions[i + 1 :][:1] or behind[:1])
            positions = behind
        if pending is not None:
            yield from self._back(pending)

    def _positions_of_token(self, token: int) -> Iterator[_Position]:
        staged = len(self.kinds) - 1
        for layer in range(len(self.kinds)):
            for batch in range(self.num_batches):
                step = (token * len(self.kinds) + layer) * self.num_batches + batch
                # The embedding is gathered, so it takes no turn in the weight buffers.
                visit = token * staged + layer - 1
                yield _Position(token, layer, batch, visit, step)

    def _is_split(self, here: _Position) -> bool:
        is_decode = here.token > 0 and self.kinds[here.layer] == "decoder"
        return is_decode and self.route.attends_on_cpu

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
            waits=waits,
        )
        self._count += 1
        return task

    def _load_first(self, first: _Position) -> Iterator[Task]:
        for batch in range(self.num_batches):
            yield from self._load_weights(_Position(0, 1, batch, 0, 0))
        yield from self._load_batch(first)

    def _load_next(self, here: _Position, after: Sequence[_Position]) -> Iterator[Task]:
        last = len(self.kinds) - 1
        if here.layer > 0:
            token, layer = (
                (here.token, here.layer + 1) if here.layer < last else (here.token + 1, 1)
            )
            if token < self.num_tokens:
                yield from self._load_weights(
                    _Position(token, layer, here.batch, here.visit + 1, here.step)
                )
        for position in after:
            yield from self._load_batch(position)

    def _load_weights(self, target: _Position) -> Iterator[Task]:
        piece = (target.weight_slot, target.batch)
        if target.layer in self.route.disk_weights:
            yield self._make(
                "read_weights", "disk_read", target, writes=[("weights", "cpu", *piece)],
                slot=target.weight_slot,
            )  # fmt: skip
        if target.layer in self.route.sent_weights:
            yield self._make(
                "send_weights", "h2d", target, reads=[("weights", "cpu", *piece)],
                writes=[("weights", "gpu", *piece)], slot=target.weight_slot,
            )  # fmt: skip

    def _load_batch(self, target: _Position) -> Iterator[Task]:
        """Load the cache and the hidden states that the computation at ``target`` needs."""
        route, home = self.route, (target.layer, target.batch)
        if self.kinds[target.layer] == "decoder" and target.token > 0:
            if route.disk_cache:
                yield self._make(
                    "read_cache", "disk_read", target, reads=[("cache", "disk", *home)],
                    writes=[("cache staging", "cpu", target.slot)],
                )  # fmt: skip
            if route.sends_cache:
                yield self._make(
                    "send_cache", "h2d", target,
                    reads=[("cache", "cpu", *home), ("cache staging", "cpu", target.slot)],
                    writes=[("cache staging", "gpu", target.slot)],
                )  # fmt: skip
        if 0 < target.layer <= self._first_head:
            if route.disk_hidden:
                yield self._make(
                    "read_hidden", "disk_read", target, reads=[("hidden", "disk", target.batch)],
                    writes=[("hidden staging", "cpu", target.slot)],
                )  # fmt: skip
            if route.sends_hidden:
                yield self._make(
                    "send_hidden", "h2d", target,
                    reads=[("hidden", "cpu", target.batch), ("hidden staging", "cpu", target.slot)],
                    writes=[("hidden staging", "gpu", target.slot)],
                )  # fmt: skip

    def _weights_read(self, here: _Position) -> list[Resource]:
        tier = "gpu" if self.route.has_gpu else "cpu"
        return [
            ("weights", tier, here.weight_slot, piece)
            for piece in range(self.num_batches)
            if here.layer > 0
        ]

    def _buffers(self, here: _Position) -> list[Resource]:
        tier = "gpu" if self.route.has_gpu else "cpu"
        return [("hidden staging", tier, here.slot), ("cache staging", tier, here.slot)]

    def _compute(self, here: _Position) -> Iterator[Task]:
        yield self._make(
            "compute", self.route.compute_channel, here, reads=self._weights_read(here),
            writes=self._buffers(here),
        )  # fmt: skip
        yield from self._store(here)

    def _front(self, here: _Position) -> Iterator[Task]:
        """Project on the GPU, attend on the CPU what lies there."""
        slot, home = here.slot, (here.layer, here.batch)
        yield self._make(
            "project", "gpu_compute", here, reads=self._weights_read(here),
            writes=[*self._buffers(here), ("projected", "gpu", slot)],
        )  # fmt: skip
        yield self._make(
            "return_queries", "d2h", here, reads=[("projected", "gpu", slot)],
            writes=[("projected", "cpu", slot)],
        )  # fmt: skip
        yield self._make(
            "attend", "cpu_compute", here, reads=[("projected", "cpu", slot)],
            writes=[
                ("cache", "cpu", *home),
                ("cache staging", "cpu", slot),
                ("attended", "cpu", slot),
            ],
        )  # fmt: skip
        yield self._make(
            "send_attended", "h2d", here, reads=[("attended", "cpu", slot)],
            writes=[("attended", "gpu", slot)],
        )  # fmt: skip

    def _back(self, here: _Position) -> Iterator[Task]:
        yield self._make(
            "finish", "gpu_compute", here,
            reads=[*self._weights_read(here), ("attended", "gpu", here.slot)],
            writes=self._buffers(here),
        )  # fmt: skip
        yield from self._store(here)

    def _store(self, here: _Position) -> Iterator[Task]:
        """Hand down the new cache and hidden states of one batch."""
        route, slot, home = self.route, here.slot, (here.layer, here.batch)
        if self.kinds[here.layer] == "decoder" and here.token + 1 < self.num_tokens:
            # After prefill, only fetched rows come back: the others were appended where they lie.
            if route.stores_cache and (here.is_prefill or route.sends_cache):
                yield self._make(
                    "return_cache", "d2h", here, reads=[("cache staging", "gpu", slot)],
                    writes=[("cache", "cpu", *home), ("cache staging", "cpu", slot)],
                )  # fmt: skip
            if route.disk_cache:
                yield self._make(
                    "write_cache", "disk_write", here, reads=[("cache staging", "cpu", slot)],
                    writes=[("cache", "disk", *home)],
                )  # fmt: skip
        if here.layer < self._first_head:
            if route.sends_hidden:
                yield self._make(
                    "return_hidden", "d2h", here, reads=[("hidden staging", "gpu", slot)],
                    writes=[("hidden", "cpu", here.batch), ("hidden staging", "cpu", slot)],
                )  # fmt: skip
            if route.disk_hidden:
                yield self._make(
                    "write_hidden", "disk_write", here, reads=[("hidden staging", "cpu", slot)],
                    writes=[("hidden", "disk", here.batch)],
                )  # fmt: skip
