"""One task of a schedule, and its waits."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

# A buffer, or a part of one, that tasks read and write.
Resource = Hashable


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One piece of work on one channel.

    For a task that moves weights, ``batch`` is the number of the piece. ``slot`` is the staging
    buffer of the cache, ``hidden_slot`` that of the hidden states. ``read_slot`` is the CPU staging
    buffer for the layer's weights on disk, ``sent_slot`` the GPU staging buffer of its weights.
    ``waits`` are the indices of earlier tasks on other channels.
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
    """Derives waits from the resources that tasks read and write.

    A reader waits for the last writer. A writer waits for the last writer and all readers since.
    """

    def __init__(self) -> None:
        self._writer: dict[Resource, tuple[str, int]] = {}
        self._readers: dict[Resource, dict[str, int]] = {}

    def waits(
        self, index: int, channel: str, reads: Sequence[Resource], writes: Sequence[Resource]
    ) -> tuple[int, ...]:
        """Record a task, and return the earlier tasks on other channels that it waits for."""
        # A channel works in order, so that waiting for its latest task is enough.
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
