"""Who runs in each pass of a job over lanes, without seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from costmodel.plan.lengths import IntArray, Lengths
from costmodel.pricing.passes import FloatArray
from costmodel.schedule.admission import Admission


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneRuns:
    """Passes in which one lane decodes without a break; every array is int64 [runs].

    ``requests`` are the requests, ``first`` the first passes, ``passes`` their numbers, and
    ``slots`` the slots of the cache that the first of them reads.
    """

    requests: IntArray
    first: IntArray
    passes: IntArray
    slots: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTrace:
    """What the passes of a job do, without seconds.

    Parameters
    ----------
    requests, admitted
        The requests that run, and the pass of each one's prompt; int64 [requests].
    runs
        All passes in which lanes decode.
    num_passes
        Passes of the job.
    waiting
        Lanes that wait for a page of the cache, by pass; float64 [passes].
    most_pages
        Most pages in use after a pass, of each pool.
    skipped
        Tokens of each prompt that are not computed with it: its prefix, where that is in the cache;
        int64 [requests].
    """

    requests: IntArray
    admitted: IntArray
    runs: LaneRuns
    num_passes: int
    waiting: FloatArray
    most_pages: tuple[int, ...]
    skipped: IntArray

    @property
    def waited(self) -> int:
        """Passes of single lanes that waited for a page of the cache."""
        return int(self.waiting.sum())


def trace_job(
    admission: Admission, lengths: Lengths, answers: IntArray, served: IntArray
) -> JobTrace:
    """Run an admission to its end, with answers of the lengths given."""
    admitted: IntArray = np.zeros(len(lengths), np.int64)
    in_cache = np.zeros_like(admitted)
    # For each request: the first pass of its present run, and the slots that it read there.
    first, slots = np.zeros_like(admitted), lengths.prompts.copy()
    runs: list[IntArray] = []
    number, waiting = -1, dict[int, int]()
    most_pages = np.zeros_like(admission.used_pages)

    def close(requests: IntArray, end: int) -> None:
        """End runs before the pass ``end``."""
        passes = end - first[requests]
        runs.append(np.stack([requests, first[requests], passes, slots[requests]]))
        slots[requests] += passes

    while (lanes := admission.plan()) is not None:
        number += 1
        admitted[lanes.requests] = number
        in_cache[lanes.requests] = lanes.skipped
        first[lanes.requests] = number + 1
        if len(lanes.waiting):
            waiting[number] = len(lanes.waiting)
            stopped = admission.requests[np.isin(admission.lanes, lanes.waiting)]
            close(stopped, number)
            first[stopped] = number + 1
        left = answers[admission.requests] - admission.steps
        if skipped := admission.skip(int(left.min()) - 1):
            number += skipped
            left = left - skipped
        most_pages = np.maximum(most_pages, admission.used_pages)
        if (ends := left <= 0).any():
            close(admission.requests[ends], number + 1)
            admission.ended(admission.lanes[ends].tolist())
    columns = np.concatenate(runs, axis=1)
    columns = columns[:, columns[2] > 0]
    return JobTrace(
        requests=served,
        admitted=admitted[served],
        runs=LaneRuns(requests=columns[0], first=columns[1], passes=columns[2], slots=columns[3]),
        num_passes=number + 1,
        waiting=_sparse(waiting, number + 1),
        most_pages=tuple(most_pages.tolist()),
        skipped=in_cache[served],
    )


def _sparse(values: Mapping[int, int], size: int) -> FloatArray:
    found: FloatArray = np.zeros(size)
    found[list(values)] = list(values.values())
    return found
