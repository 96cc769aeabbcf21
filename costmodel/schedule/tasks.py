"""One task of a schedule, and what it waits for."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

# A buffer, or a part of one, that tasks read and write.
Resource = Hashable


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One piece of work on one channel.

    ``batch`` is also the piece of a layer's weights that a weight task moves, so that the loads
    of the next layer spread over the batches of this one. ``slot`` is the staging buffer of the
    cache, ``hidden_slot`` that of hidden states. Of the layer's weights, ``read_slot`` is the
    buffer in CPU memory that takes what is on disk, ``sent_slot`` that on the GPU.
    ``waits`` are indices of earlier tasks on other channels.
    """

    index: int
    kind: str
    channel: str
    token: int
    layer: int
    batch: int
    slot: int
    hidden_slot: int
    read_slot: int
    sent_slot: int
    waits: tuple[int, ...]

    @property
    def is_prefill(self) -> bool:
        """Whether the task belongs to the pass over the prompts."""
        return self.token == 0


class Hazards:
    """Waits that follow from what tasks read and write: a reader waits for the last writer, a
    writer for the last writer and for everybody who has read since."""

    def __init__(self) -> None:
        self._writer: dict[Resource, tuple[str, int]] = {}
        self._readers: dict[Resource, dict[str, int]] = {}

    def waits(
        self, index: int, channel: str, reads: Sequence[Resource], writes: Sequence[Resource]
    ) -> tuple[int, ...]:
        """Take note of a task and return the earlier ones on other channels that it waits for."""
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
