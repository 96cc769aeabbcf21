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
# Of the profile's rate of products; less is another machine's work.
LEAST = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """A rate of matrix products in FLOP/s, and of reading memory in bytes/s.

    That of the memory is kept for whoever reads the cases, and judges nothing: from process to
    process it was either some 30 or some 55 GB/s on two cores with nothing else running, as if it
    went by which pages a process was given.
    """

    matmul_flop_per_s: float
    memory_bytes_per_s: float

    def is_busy(self, hardware: HardwareProfile) -> bool:
        """Whether products are far slower than in the profile."""
        expected = hardware.cpu.compute.matmul[DTYPE].at(ROWS)
        return self.matmul_flop_per_s < LEAST * expected


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
