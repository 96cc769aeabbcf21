"""What every pass over lanes did, and how long it took."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping

import numpy as np

from costmodel.plan.lengths import IntArray, Lengths
from costmodel.plan.pages import PoolSizes
from costmodel.schedule.pass_lanes import PassLanes
from executor.run.lanes import Lane


class PassLog:
    """The passes of one run, eight bytes for each figure; empty for a run without lanes.

    Attributes
    ----------
    lengths
        Those of all requests, as they were admitted by; ``None`` before the first pass.
    answers
        Tokens generated for each request with its end token, int64 [requests]; 0 before it ends.
    start_s, end_s
        Start and end of each pass on the run's clock.
    decoding, newcomers, waiting
        Lanes that decode, that take a prompt, and that wait for a page, by pass.
    tokens
        Tokens in the cache after each pass.
    pool_share
        Share of the pages in use after each pass, of the pool that is fullest.
    """

    def __init__(self) -> None:
        self.lengths: Lengths | None = None
        self.answers: IntArray = np.zeros(0, np.int64)
        self.start_s, self.end_s = array("d"), array("d")
        self.decoding, self.newcomers, self.waiting = array("q"), array("q"), array("q")
        self.tokens, self.pool_share = array("q"), array("d")

    def begin(self, lengths: Lengths, pool: PoolSizes) -> None:
        """Take the requests of the run."""
        self.lengths = lengths
        self.answers = np.zeros(len(lengths), np.int64)
        self._capacity = np.array(pool.pages)

    def add(
        self,
        lanes: PassLanes,
        at_work: Mapping[int, Lane],
        used_pages: IntArray,
        start_s: float,
        end_s: float,
    ) -> None:
        """Take one pass, before the lanes that ended in it are released."""
        self.start_s.append(start_s)
        self.end_s.append(end_s)
        self.decoding.append(len(lanes.decoding))
        self.newcomers.append(len(lanes.newcomers))
        self.waiting.append(len(lanes.waiting))
        self.tokens.append(sum(lane.length for lane in at_work.values() if lane.is_cached))
        self.pool_share.append(float((used_pages / self._capacity).max()))

    def end(self, lanes: Iterable[Lane]) -> None:
        """Take the answers of lanes that ended."""
        for lane in lanes:
            self.answers[lane.request] = len(lane.generated)

    @property
    def run_s(self) -> float:
        """Seconds from the start of the first pass to the end of the last."""
        return self.end_s[-1] - self.start_s[0]
