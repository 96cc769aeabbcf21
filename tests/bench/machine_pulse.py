"""Two rates of the machine, sampled in a moment: is it as it was when its profile was measured?"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cache

import torch

from profiles.compute import matrix_product
from profiles.compute_plan import QUICK_PLAN
from profiles.hardware import HardwareProfile
from profiles.timing import seconds_of

ROWS = 256
DTYPE = "bfloat16"
SAMPLES = 5
# Of the profile's rate; less is another machine's work. (More is not: memory that was just read and
# freed by a large process is found half as fast again for a while.)
LEAST = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """A rate of matrix products in FLOP/s, and of reading memory in bytes/s."""

    matmul_flop_per_s: float
    memory_bytes_per_s: float

    def is_busy(self, hardware: HardwareProfile) -> bool:
        """Whether one is far below the profile's."""
        return any(share < LEAST for share in self._shares(hardware))

    def _shares(self, hardware: HardwareProfile) -> list[float]:
        expected = hardware.cpu.compute.matmul[DTYPE].at(ROWS), hardware.cpu.memory_bytes_per_s
        found = self.matmul_flop_per_s, self.memory_bytes_per_s
        return [f / e for f, e in zip(found, expected, strict=True)]


@torch.inference_mode()
def measure_pulse() -> Pulse:
    """Take both samples, in about half a second."""
    multiply, flop = matrix_product("cpu", DTYPE, ROWS, QUICK_PLAN)
    source = _source()
    multiply_s, read_s = (
        statistics.median(seconds_of(work, repeats=SAMPLES)) for work in (multiply, source.sum)
    )
    return Pulse(matmul_flop_per_s=flop / multiply_s, memory_bytes_per_s=source.nbytes / read_s)


@cache
def _source() -> torch.Tensor:
    return torch.ones(QUICK_PLAN.stream_bytes // 4)
