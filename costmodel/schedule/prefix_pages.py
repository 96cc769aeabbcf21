"""Which prefixes of a job are in the cache, and the pages that they hold. No torch."""

from __future__ import annotations

import numpy as np

from costmodel.plan.lengths import IntArray, Lengths
from costmodel.plan.pages import PoolSizes
from costmodel.schedule.page_rules import BoolArray, PageNeeds


class PrefixPages:
    """The prefixes that requests share.

    A prefix is computed with the prompt of the first lane that has it, and holds pages as long as
    a lane has it. After that it rests: its pages count as free, and a later lane finds it where
    they were not used again. It is dropped when its pages are needed, to be computed again with
    the next lane, or when no waiting request has it. So it never keeps others from running.

    A lane's page table begins with the pages of its prefix. In a ring a lane has pages of its own,
    into which the prefix is copied.

    Parameters
    ----------
    lengths
        The requests with their prefixes.
    pool
        The pages of the cache.
    order
        The requests that run.
    """

    def __init__(self, lengths: Lengths, pool: PoolSizes, order: IntArray) -> None:
        needs, prefixes = PageNeeds(pool), lengths.prefixes
        # The last entry is that of requests without a prefix, number -1.
        self.tokens: IntArray = np.append(prefixes.tokens, 0)
        self.pages = needs.of(self.tokens)
        is_ring = [most is not None for most in pool.most_pages]
        self._in_table: IntArray = np.where(is_ring, 0, self.pages)
        self.numbers = self._usable(lengths, needs.of(lengths.stored), np.array(pool.pages), order)
        self._waiting = np.bincount(self.numbers[order] % len(self.tokens), None, len(self.tokens))
        self._lanes: IntArray = np.zeros(len(self.tokens), np.int64)
        self._is_present: BoolArray = np.zeros(len(self.tokens), bool)
        # The oldest first.
        self._resting: dict[int, None] = {}
        self._dropped: list[int] = []

    def _usable(
        self, lengths: Lengths, stored: IntArray, capacity: IntArray, order: IntArray
    ) -> IntArray:
        """Return the prefix of each request; of some of them none.

        In rings, a lane and its prefix together may not fit.
        """
        numbers: IntArray = np.full(len(lengths), -1, np.int64)
        numbers[order] = lengths.prefixes.numbers[order]
        whole = np.maximum(stored - self._in_table[numbers], 0) + self.pages[numbers]
        numbers[(whole > capacity).any(axis=1)] = -1
        return numbers

    def in_table(self, requests: IntArray) -> IntArray:
        """Return the pages of prefixes in the page tables of lanes, int64 [requests, pools]."""
        return self._in_table[self.numbers[requests]]

    def skipped(self, requests: IntArray) -> IntArray:
        """Return the tokens of prompts that are in the cache, int64 [requests]."""
        numbers = self.numbers[requests]
        tokens: IntArray = np.where(self._is_present[numbers], self.tokens[numbers], 0)
        return tokens

    def taken_with(self, request: int) -> IntArray:
        """Return the pages, int64 [pools], that the prefix of a request takes when it begins."""
        number = self.numbers[request]
        pages: IntArray = self.pages[number] * (self._lanes[number] == 0)
        return pages

    def begin(self, request: int) -> None:
        """Begin a lane."""
        number = int(self.numbers[request])
        self._waiting[number] -= 1
        self._lanes[number] += 1
        self._resting.pop(number, None)
        self._is_present[number] = number >= 0

    def end(self, requests: IntArray) -> IntArray:
        """End lanes; returns the pages that their prefixes no longer hold, int64 [pools]."""
        numbers, counts = np.unique(self.numbers[requests], return_counts=True)
        self._lanes[numbers] -= counts
        ended = numbers[(self._lanes[numbers] == 0) & (numbers >= 0)]
        for number in ended.tolist():
            if self._waiting[number]:
                self._resting[number] = None
            else:
                self._drop(number)
        freed: IntArray = self.pages[ended].sum(axis=0)
        return freed

    def fit(self, free: IntArray) -> None:
        """Drop prefixes until those that rest have room in the free pages, int64 [pools]."""
        while self._resting and (self.pages[list(self._resting)].sum(axis=0) > free).any():
            number = next(iter(self._resting))
            del self._resting[number]
            self._drop(number)

    def _drop(self, number: int) -> None:
        self._is_present[number] = False
        self._dropped.append(number)

    def take_dropped(self) -> tuple[int, ...]:
        """Return the prefixes that were dropped since the last call."""
        dropped, self._dropped = tuple(self._dropped), []
        return dropped
