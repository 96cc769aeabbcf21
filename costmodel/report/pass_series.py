"""What the passes over lanes do, in as many points as a picture shows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from costmodel.plan.lengths import Lengths
from costmodel.schedule.chrome_trace import TraceFile
from costmodel.schedule.job_simulation import JobTimeline
from costmodel.schedule.pass_counts import cached_tokens
from profiles.errors import InputError

# Points of one curve; passes between them are averaged.
MOST_POINTS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSeries:
    """Passes in groups of about equal numbers; every field has an entry for each group.

    Parameters
    ----------
    passes
        The first pass of each group, from 0; and at the end the number of passes.
    start_s
        Start of the group's first pass, in seconds since the first of all.
    seconds
        Mean seconds of a pass.
    lanes, waiting
        Mean lanes that compute in a pass, and that wait for a page of the cache.
    tokens
        Mean tokens in the cache after a pass.
    """

    passes: tuple[int, ...]
    start_s: tuple[float, ...]
    seconds: tuple[float, ...]
    lanes: tuple[float, ...]
    waiting: tuple[float, ...]
    tokens: tuple[float, ...]

    def __post_init__(self) -> None:
        count = len(self.passes) - 1
        for field in fields(self)[1:]:
            if count < 1 or len(getattr(self, field.name)) != count:
                raise InputError(
                    f"passes.{field.name}",
                    got=f"{len(getattr(self, field.name))} values for {len(self.passes)} passes",
                    allowed="one value less, and at least one",
                )
        if self.passes[0] != 0 or (np.diff(self.passes) < 1).any():
            raise InputError("passes.passes", got="numbers out of order", allowed="from 0 upward")

    @classmethod
    def of(
        cls,
        *,
        start_s: ArrayLike,
        seconds: ArrayLike,
        lanes: ArrayLike,
        waiting: ArrayLike,
        tokens: ArrayLike,
    ) -> PassSeries:
        """Return the series of passes, each argument [passes]; ``start_s`` on any clock."""
        columns = {"seconds": seconds, "lanes": lanes, "waiting": waiting, "tokens": tokens}
        arrays = {name: np.asarray(values, float) for name, values in columns.items()}
        size = len(arrays["seconds"])
        count = min(size, MOST_POINTS)
        ends = np.arange(count + 1) * size // count
        means = {
            name: tuple((np.add.reduceat(values, ends[:-1]) / np.diff(ends)).tolist())
            for name, values in arrays.items()
        }
        starts = np.asarray(start_s, float)[ends[:-1]]
        return cls(
            passes=tuple(ends.tolist()), start_s=tuple((starts - starts[0]).tolist()), **means
        )

    def write_to(self, trace: TraceFile, pid: int, *, zero_s: float = 0.0) -> None:
        """Write the passes as timeline ``pid``; they begin at ``zero_s``."""
        for i, (first, end) in enumerate(pairwise(self.passes)):
            start_s = zero_s + self.start_s[i]
            trace.add_passes(
                pid,
                first,
                end - 1,
                start_s,
                start_s + self.seconds[i] * (end - first),
                lanes=self.lanes[i],
                waiting=self.waiting[i],
                tokens=self.tokens[i],
            )

    @classmethod
    def simulated(cls, timeline: JobTimeline, lengths: Lengths) -> PassSeries:
        """Return the series of a simulated job."""
        counts = timeline.counts
        return cls.of(
            start_s=np.cumsum(timeline.seconds) - timeline.seconds,
            seconds=timeline.seconds,
            lanes=counts.decoding + counts.newcomers,
            waiting=timeline.trace.waiting,
            tokens=cached_tokens(timeline.trace, lengths),
        )
