"""Sequences at work, each with its own number of tokens, and their pages of the cache.

Everything here is numpy and lists: the thread that plans passes must not start a team of threads.
"""

from __future__ import annotations

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
    """

    request: int
    prompt: Integers
    max_tokens: int
    chooser: Chooser
    eos_ids: frozenset[int] = frozenset()
    length: int = 0
    generated: list[int] = field(default_factory=list)

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
        self._free = [list(range(count - 1, -1, -1)) for count in pool.pages]
        self._held: dict[int, list[list[int]]] = {}
        # By ring, int32 [lanes, pages]; numbers behind the last page of a lane mean nothing.
        self.tables: list[Table] = [
            np.zeros((most_lanes, width), np.int32) for width in pool.needed(most_tokens)
        ]

    @property
    def lanes(self) -> Mapping[int, Lane]:
        """The lanes at work, by number."""
        return self._lanes

    def admit(self, number: int, lane: Lane) -> None:
        """Begin a sequence; its number must be free."""
        assert number not in self._lanes
        self._lanes[number] = lane
        self._held[number] = [[] for _ in self.tables]

    def make_room(self, number: int, num_tokens: int) -> None:
        """Take the pages that a lane lacks for so many cached tokens; there must be as many."""
        held = self._held[number]
        for ring, needed in enumerate(self._pool.needed(num_tokens)):
            for place in range(len(held[ring]), needed):
                page = self._free[ring].pop()
                held[ring].append(page)
                self.tables[ring][number, place] = page

    def pages(self, number: int) -> list[list[int]]:
        """Return the pages of a lane, by ring."""
        return self._held[number]

    def release(self, numbers: Iterable[int]) -> list[list[int]]:
        """End sequences; returns the pages that are free again, by ring."""
        freed: list[list[int]] = [[] for _ in self.tables]
        for number in numbers:
            del self._lanes[number]
            for ring, pages in enumerate(self._held.pop(number)):
                freed[ring] += pages
                self._free[ring] += pages
        return freed
