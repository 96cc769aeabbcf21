"""Sequences at work, each with its own number of tokens, and their pages of the cache.

Everything here is numpy and lists: the thread that plans passes must not start a team of threads.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from costmodel.plan.pages import PoolSizes
from executor.model.sampling import Chooser

Integers = npt.NDArray[np.int64]
# Page tables as kernels take them.
Table = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneRequest:
    """One prompt of a job, and how it is continued.

    Parameters
    ----------
    prompt_ids
        The ids of the prompt, one or more.
    max_tokens
        Most tokens to generate, one or more.
    expected_tokens
        Tokens that it is expected to have: it begins when the cache has room for them. ``None``
        expects ``max_tokens``. Where it has more, it may have to wait for others to end.
    chooser
        Chooses its tokens; ``None`` is that of the run. Equal ones are asked for many sequences at
        once.
    eos_ids
        Tokens that end it; ``None`` are those of the run.
    """

    prompt_ids: Sequence[int]
    max_tokens: int
    expected_tokens: int | None = None
    chooser: Chooser | None = None
    eos_ids: frozenset[int] | None = None


@dataclass(slots=True, kw_only=True)
class Lane:
    """One sequence at work.

    Parameters
    ----------
    request
        The index of its prompt in the job.
    prompt
        The ids of the prompt.
    max_tokens
        Tokens that may be generated; with one, nothing is cached.
    chooser, eos_ids
        What chooses its tokens, and the tokens that end it.
    length
        Tokens in the cache: the prompt and what was generated, but for the last.
    generated
        The ids so far.
    prefix, prefix_len
        The number of the prefix that the prompt shares with others, -1 for none, and its tokens.
    skipped
        Tokens of the prompt that are not computed with it: those of a prefix that another computes.
    """

    request: int
    prompt: Integers
    max_tokens: int
    chooser: Chooser
    eos_ids: frozenset[int] = frozenset()
    length: int = 0
    generated: list[int] = field(default_factory=list)
    prefix: int = -1
    prefix_len: int = 0
    skipped: int = 0

    @property
    def rows(self) -> int:
        """Tokens of the prompt that are computed."""
        return len(self.prompt) - self.skipped

    @property
    def most_tokens(self) -> int:
        """Most tokens in the cache; the last one that is generated needs no place there."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def has_ended(self) -> bool:
        """Whether the last token that was generated ends it."""
        return self.has_stopped or len(self.generated) == self.max_tokens

    @property
    def has_stopped(self) -> bool:
        """Whether that is one of its end tokens."""
        return self.generated[-1] in self.eos_ids

    @property
    def is_cached(self) -> bool:
        """Whether a later pass reads what this sequence caches."""
        return self.max_tokens > 1


class LaneTable:
    """The lanes by number, and their page tables.

    A prefix has pages of its own. Tables of its lanes begin with them, but for rings: what others
    write there is not for all.

    Parameters
    ----------
    pool
        The pages of each different ring of the model.
    most_lanes
        Lanes at once; their numbers are below it.
    most_tokens
        Most tokens of one sequence.
    """

    def __init__(self, pool: PoolSizes, *, most_lanes: int, most_tokens: int) -> None:
        self._pool = pool
        self._lanes: dict[int, Lane] = {}
        # Heaps: the first pages are taken first, so that those in use are near each other.
        self._free = [list(range(count)) for count in pool.pages]
        self._in_use = [np.zeros(count, bool) for count in pool.pages]
        self._new: list[list[int]] = [[] for _ in pool.pages]
        self._held: dict[int, list[list[int]]] = {}
        self._prefixes: dict[int, list[list[int]]] = {}
        # By ring, how many pages of a lane are its prefix's.
        self._shared: dict[int, list[int]] = {}
        # By ring, int32 [lanes, pages]; numbers behind the last page of a lane mean nothing.
        self.tables: list[Table] = [
            np.zeros((most_lanes, width), np.int32) for width in pool.needed(most_tokens)
        ]

    @property
    def lanes(self) -> Mapping[int, Lane]:
        """The lanes at work, by number."""
        return self._lanes

    def admit(self, number: int, lane: Lane) -> None:
        """Begin a sequence; its number must be free. The first with its prefix begins that too."""
        assert number not in self._lanes
        self._lanes[number] = lane
        self._held[number] = [[] for _ in self.tables]
        if lane.prefix >= 0:
            if not lane.skipped:
                needed = self._pool.needed(lane.prefix_len)
                self._prefixes[lane.prefix] = [self._take(r, n) for r, n in enumerate(needed)]
            for ring, most in enumerate(self._pool.most_pages):
                if most is None:
                    self._add(number, ring, self._prefixes[lane.prefix][ring])
        self._shared[number] = [len(pages) for pages in self._held[number]]

    def make_room(self, number: int, num_tokens: int) -> None:
        """Take the pages that a lane lacks for so many cached tokens; there must be as many."""
        for ring, needed in enumerate(self._pool.needed(num_tokens)):
            lacks = needed - len(self._held[number][ring])
            self._add(number, ring, self._take(ring, max(0, lacks)))

    def _take(self, ring: int, count: int) -> list[int]:
        pages = [heapq.heappop(self._free[ring]) for _ in range(count)]
        self._in_use[ring][pages] = True
        self._new[ring] += pages
        return pages

    def _add(self, number: int, ring: int, pages: Sequence[int]) -> None:
        held = self._held[number][ring]
        self.tables[ring][number, len(held) : len(held) + len(pages)] = pages
        held += pages

    def take_pages_in_use(self, ring: int) -> tuple[Integers, Integers]:
        """Return the pages that hold tokens or will, and those that were taken since the last
        call; int64 each, in increasing order."""
        new, self._new[ring] = np.array(sorted(self._new[ring]), np.int64), []
        return np.flatnonzero(self._in_use[ring]), new

    def pages(self, number: int) -> list[list[int]]:
        """Return the pages of a lane, by ring."""
        return self._held[number]

    @property
    def prefixes(self) -> tuple[int, ...]:
        """The prefixes that have pages."""
        return tuple(self._prefixes)

    def prefix_pages(self, prefix: int) -> list[list[int]]:
        """Return the pages of a prefix, by ring."""
        return self._prefixes[prefix]

    def release(self, numbers: Iterable[int]) -> list[list[int]]:
        """End sequences; returns the pages that are free again, by ring."""
        freed: list[list[int]] = [[] for _ in self.tables]
        for number in numbers:
            del self._lanes[number]
            shared = self._shared.pop(number)
            for ring, pages in enumerate(self._held.pop(number)):
                freed[ring] += pages[shared[ring] :]
        return self._freed(freed)

    def drop_prefixes(self, prefixes: Iterable[int]) -> list[list[int]]:
        """End prefixes, whose lanes must have ended; returns the same."""
        freed: list[list[int]] = [[] for _ in self.tables]
        for prefix in prefixes:
            for ring, pages in enumerate(self._prefixes.pop(prefix)):
                freed[ring] += pages
        return self._freed(freed)

    def _freed(self, pages: list[list[int]]) -> list[list[int]]:
        for ring, free in enumerate(pages):
            self._in_use[ring][free] = False
            for page in free:
                heapq.heappush(self._free[ring], page)
        return pages
