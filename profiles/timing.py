"""Repeated timing: raw samples kept, median and spread derived."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from profiles.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One figure with the samples behind it.

    Parameters
    ----------
    name
        Dotted name of what was measured, e.g. ``cpu.matmul.bfloat16.rows512``.
    unit
        ``bytes_per_s``, ``flop_per_s`` or ``s``.
    samples
        Raw values in that unit, in the order taken.
    """

    name: str
    unit: str
    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples or not all(math.isfinite(s) and s > 0 for s in self.samples):
            raise InputError(
                f"measurement {self.name}",
                got=list(self.samples),
                allowed="at least one finite sample above zero",
            )

    @property
    def median(self) -> float:
        """The median sample."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the range of the samples over their median: 0.1 reads as plus or minus 10 %."""
        return (max(self.samples) - min(self.samples)) / 2 / self.median


def seconds_of(work: Callable[[], object], *, repeats: int, warmups: int = 1) -> list[float]:
    """Time ``work`` ``repeats`` times after ``warmups`` calls that are not counted."""
    for _ in range(warmups):
        work()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        samples.append(time.perf_counter() - start)
    return samples
