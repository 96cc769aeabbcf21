"""Taking samples of a figure: how often, for how long, and when to measure again."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from profiles.timing import Measurement, seconds_of

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]

# A figure whose samples differ by more than this is measured again, at most so often.
MAX_SPREAD = 0.15
MAX_ATTEMPTS = 3
SIGNIFICANT_DIGITS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much time a measurement may take.

    Parameters
    ----------
    num_samples
        Samples of one figure.
    sample_s
        Shortest sample; quicker work is repeated inside it.
    figure_s
        A figure that would take longer than this is left out, where it can be.
    total_s
        Beyond this, noisy figures are no longer measured again.
    window_s
        For so long two channels are kept busy at once.
    """

    num_samples: int
    sample_s: float
    figure_s: float
    total_s: float
    window_s: float = 0.3


QUICK = Effort(num_samples=3, sample_s=0.03, figure_s=1.0, total_s=9.0, window_s=0.25)
FULL = Effort(num_samples=5, sample_s=0.06, figure_s=7.0, total_s=110.0, window_s=1.0)


class Repeater:
    """Measures one figure after another and keeps the samples of each.

    Parameters
    ----------
    progress
        Called with the name of each figure before it is measured.
    """

    def __init__(self, effort: Effort, progress: Progress) -> None:
        self.effort = effort
        self._progress = progress
        self._end_s = time.perf_counter() + effort.total_s
        self._measurements: list[Measurement] = []

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """Every figure so far, in the order measured."""
        return tuple(self._measurements)

    def with_samples(self, *, num_samples: int, sample_s: float) -> Repeater:
        """Return a repeater of other samples, whose figures are kept with those of this one."""
        other = copy.copy(self)
        other.effort = replace(self.effort, num_samples=num_samples, sample_s=sample_s)
        return other

    def affords(self, seconds: float) -> bool:
        """Whether a figure fits whose work takes so many seconds, warm-up included."""
        return seconds * (self.effort.num_samples + 1) <= self.effort.figure_s

    def measure_rate(
        self, name: str, unit: str, work: Callable[[], object], amount: float
    ) -> Measurement:
        """Measure ``amount`` (bytes or FLOP) per second of ``work``."""
        return self._measure(name, unit, work, lambda seconds: amount / seconds)

    def measure_seconds(self, name: str, work: Callable[[], object]) -> Measurement:
        """Measure the seconds that ``work`` takes."""
        return self._measure(name, "s", work, lambda seconds: seconds)

    def keep(self, name: str, unit: str, samples: Sequence[float]) -> Measurement:
        """Keep the samples of a figure that was measured elsewhere, and return it."""
        taken = Measurement(name=name, unit=unit, samples=tuple(_rounded(s) for s in samples))
        self._measurements.append(taken)
        return taken

    def announce(self, name: str) -> None:
        """Tell the progress that such a figure is measured now."""
        self._progress(name)

    def _measure(
        self,
        name: str,
        unit: str,
        work: Callable[[], object],
        figure_of: Callable[[float], float],
    ) -> Measurement:
        self._progress(name)
        work()
        once_s = max(seconds_of(work, repeats=1, warmups=0)[0], 1e-9)
        calls = max(1, math.ceil(self.effort.sample_s / once_s))

        def sample() -> None:
            for _ in range(calls):
                work()

        best: Measurement | None = None
        for attempt in range(MAX_ATTEMPTS):
            seconds = seconds_of(sample, repeats=self.effort.num_samples, warmups=0)
            samples = tuple(_rounded(figure_of(max(s, 1e-9) / calls)) for s in seconds)
            taken = Measurement(name=name, unit=unit, samples=samples)
            if best is None or taken.spread < best.spread:
                best = taken
            if best.spread <= MAX_SPREAD or time.perf_counter() > self._end_s:
                break
            logger.info("%s: spread %.2f at attempt %d", name, taken.spread, attempt + 1)
        assert best is not None
        self._measurements.append(best)
        return best


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
