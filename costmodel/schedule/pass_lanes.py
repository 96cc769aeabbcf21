"""The sequences of one pass over the model, and their batches. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from costmodel.plan.lengths import IntArray


@dataclass(frozen=True, slots=True)
class LaneBatch:
    """The lanes of one batch: ``decoding`` are numbers of lanes, ``newcomers`` are pairs of a lane
    and the request whose prompt it takes in this pass."""

    decoding: tuple[int, ...]
    newcomers: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PassLanes:
    """The sequences of one pass.

    Parameters
    ----------
    number
        The pass, from 0.
    decoding
        Lanes that decode one token each, int64 [decoding], the oldest first.
    newcomers, requests
        Lanes whose prompts pass in this pass, and the requests that they take, as rows of the job's
        table; each int64 [newcomers].
    waiting
        Lanes that wait for a page of the cache, int64 [waiting].
    batch_lanes
        Most lanes of a batch.
    prefixes, skipped
        The prefix of each newcomer, -1 without one, and how many tokens of its prompt are in the
        cache: those of its prefix, or 0 where it is the first to compute it. A newcomer before it,
        in this pass, may be the one that does. Each int64 [newcomers].
    dropped
        Prefixes that are no longer in the cache, from before the newcomers on.
    """

    number: int
    decoding: IntArray
    newcomers: IntArray
    requests: IntArray
    waiting: IntArray
    batch_lanes: int
    prefixes: IntArray
    skipped: IntArray
    dropped: tuple[int, ...] = ()

    @property
    def batches(self) -> tuple[LaneBatch, ...]:
        """As few batches as hold all lanes, about equal in lanes; newcomers are in the last."""
        decoding = self.decoding.tolist()
        newcomers = list(zip(self.newcomers.tolist(), self.requests.tolist(), strict=True))
        first, num_lanes = len(decoding), len(decoding) + len(newcomers)
        count = -(-num_lanes // self.batch_lanes)
        ends = [num_lanes * i // count for i in range(count + 1)]
        return tuple(
            LaneBatch(
                tuple(decoding[begin:end]),
                tuple(newcomers[max(0, begin - first) : max(0, end - first)]),
            )
            for begin, end in pairwise(ends)
        )
