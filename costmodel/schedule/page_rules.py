"""Whether lanes have pages of the cache: in any case, alone, and if they end as expected."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from costmodel.plan.lengths import IntArray, Lengths
from costmodel.plan.pages import PAGE, PoolSizes

BoolArray = NDArray[np.bool_]

# Times at which a forecast counts the pages in use.
MOST_CHECKPOINTS = 64


class PageNeeds:
    """``PoolSizes.needed`` for many sequences at once."""

    def __init__(self, pool: PoolSizes) -> None:
        unbounded = np.iinfo(np.int64).max
        most = [unbounded if count is None else count for count in pool.most_pages]
        self._most: IntArray = np.array(most, np.int64)

    def of(self, tokens: IntArray) -> IntArray:
        """Return the pages of sequences with ``tokens``: int64 [...] to int64 [..., pools]."""
        return np.minimum((tokens[..., None] + (PAGE - 1)) // PAGE, self._most)


def runs_alone(lengths: Lengths, pool: PoolSizes, *, most_lanes: int, pass_rows: int) -> BoolArray:
    """Return which requests can run, bool [requests]: those that have room when no other has.

    A request needs pages for its prompt and its longest answer, and rows for its prompt beside a
    token of every other lane.
    """
    has_pages = (PageNeeds(pool).of(lengths.stored) <= np.array(pool.pages)).all(axis=1)
    return has_pages & (lengths.prompts + most_lanes - 1 <= pass_rows)


def is_safe(
    held: IntArray,
    remaining: IntArray,
    free: IntArray,
    prefixes: IntArray | None = None,
    prefix_pages: IntArray | None = None,
) -> bool:
    """Whether lanes can still end one after another, however long their answers become.

    This is the banker's test (Dijkstra 1965). A lane that gets all pages that it may need will end,
    and its pages are then free for others.

    Parameters
    ----------
    held, remaining
        Pages that each lane holds, and that it may still need, int64 [lanes, pools].
    free
        Pages that nobody holds, int64 [pools].
    prefixes, prefix_pages
        The prefix of each lane, -1 for none, int64 [lanes]; and the pages that each of them holds
        until all of its lanes have ended, and none for -1, int64 [prefixes + 1, pools].
    """
    if (free < 0).any():
        return False
    while (lacks := remaining > free).any():
        blocked = lacks.any(axis=1)
        if blocked.all():
            return False
        free = free + held[~blocked].sum(axis=0)
        if prefixes is not None and prefix_pages is not None:
            ended = np.setdiff1d(prefixes[~blocked], prefixes[blocked])
            free = free + prefix_pages[ended].sum(axis=0)
            prefixes = prefixes[blocked]
        held, remaining = held[blocked], remaining[blocked]
    return True


class Forecast:
    """The pages in use in later passes, if every answer is as long as expected.

    Use grows until a lane ends. So it is counted at those passes only, or at some of them, each of
    which counts every lane that has not ended by the one before.

    Parameters
    ----------
    needs
        Pages by tokens.
    ends
        Passes in which lanes may end, counted from this one: int64 [any]. The last is the latest of
        all.
    prefix_pages
        The pages of each prefix, and none for lanes without one: int64 [prefixes + 1, pools].
    """

    def __init__(self, needs: PageNeeds, ends: IntArray, prefix_pages: IntArray) -> None:
        self._needs, self._prefix_pages = needs, prefix_pages
        # Passes for which each prefix is held.
        self._until: IntArray = np.full(len(prefix_pages), -1, np.int64)
        times = np.unique(ends)
        if len(times) > MOST_CHECKPOINTS:
            times = times[np.linspace(0, len(times) - 1, MOST_CHECKPOINTS).astype(np.int64)]
        self._times = times
        self._before: IntArray = np.concatenate([[-1], times[:-1]])
        self._used: IntArray = np.zeros(1, np.int64)

    def pages(self, tokens: IntArray, passes: IntArray) -> IntArray:
        """Return the pages at each time, int64 [lanes, times, pools], of lanes that hold ``tokens``
        after this pass and run ``passes`` more, each int64 [lanes]."""
        grown = tokens[:, None] + np.minimum(self._times, passes[:, None])
        runs = passes[:, None] > self._before
        return self._needs.of(grown * runs)

    def prefix_pages(self, prefixes: IntArray, passes: IntArray) -> IntArray:
        """Return the pages at each time, int64 [lanes, times, pools], that the prefix of a lane
        holds longer than now foreseen if this lane alone is added.

        ``prefixes`` are -1 for lanes without one; ``passes`` they run more; int64 [lanes] each.
        """
        longer = (passes[:, None] > self._before) & (self._until[prefixes, None] <= self._before)
        return longer[:, :, None] * self._prefix_pages[prefixes, None]

    def hold(self, prefixes: IntArray, passes: IntArray) -> None:
        """Add the pages of the prefixes of some lanes; both are int64 [lanes]."""
        until = self._until.copy()
        np.maximum.at(until, prefixes, passes)
        different = np.unique(prefixes)
        self.add(self.prefix_pages(different, until[different]).sum(axis=0))
        self._until = until

    def add(self, pages: IntArray) -> None:
        """Add pages in use, int64 [times, pools]."""
        self._used = self._used + pages

    def fits(self, pages: IntArray, capacity: IntArray) -> BoolArray:
        """Return for each of several lanes whether its pages are free beside those in use."""
        # Times after a lane's end do not concern it, even if too many pages will be in use then.
        fits: BoolArray = (pages <= np.maximum(capacity - self._used, 0)).all(axis=(1, 2))
        return fits
