"""Which node answers which request. No Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable


class HandOut:
    """Hands the requests of a job out to nodes, a few at a time, as they have room.

    A node that fails gives its unfinished requests back. At the end of the job, nodes without work
    answer what others have begun, too, and the first answer counts: so a slow node does not hold up
    the job. Which node answers changes no token.

    Parameters
    ----------
    order
        The requests, by number, in the order in which they are handed out.
    """

    def __init__(self, order: Iterable[int]) -> None:
        self._waiting = deque(order)
        self._left = set(self._waiting)
        # Of each node, what it has and has not answered, in the order in which it got them.
        self._held: dict[str, dict[int, None]] = {}

    @property
    def num_left(self) -> int:
        """Requests without an answer."""
        return len(self._left)

    def num_held(self, node: str) -> int:
        """Requests that a node has and has not answered."""
        return len(self._held.get(node, ()))

    def take(self, node: str, count: int, without: Collection[int] = ()) -> list[int]:
        """Return up to ``count`` requests for a node, none of those ``without``."""
        taken: list[int] = []
        skipped: list[int] = []
        while self._waiting and len(taken) < count:
            request = self._waiting.popleft()
            if request in self._left:
                (skipped if request in without else taken).append(request)
        self._waiting.extendleft(reversed(skipped))
        held = self._held.setdefault(node, {})
        if not taken and not held:
            taken = self._begun_elsewhere(count, without)
        held.update(dict.fromkeys(taken))
        return taken

    def answered(self, node: str, request: int) -> bool:
        """Take note of an answer; returns whether it is the first one to the request."""
        self._held[node].pop(request, None)
        is_first = request in self._left
        self._left.discard(request)
        return is_first

    def give_back(self, node: str) -> int:
        """Let others answer what a node has not; returns how many requests that are."""
        elsewhere = {r for other, held in self._held.items() if other != node for r in held}
        lost = [r for r in self._held.pop(node, {}) if r in self._left]
        self._waiting.extendleft(r for r in reversed(lost) if r not in elsewhere)
        return len(lost)

    def is_stuck(self, lacks: Iterable[Collection[int]]) -> bool:
        """Whether a request waits that none of the nodes with these ``lacks`` can run."""
        found = list(lacks)
        return any(r in self._left and all(r in each for each in found) for r in self._waiting)

    def _begun_elsewhere(self, count: int, without: Collection[int]) -> list[int]:
        """Return what others got last: they have hardly begun it."""
        found: dict[int, None] = {}
        for held in self._held.values():
            found.update(dict.fromkeys(r for r in reversed(held) if r in self._left))
        return [request for request in found if request not in without][:count]
