"""What a machine can do: measured, stored, loaded. Imports without torch."""

from profiles.compute_rates import ComputeRates
from profiles.emulate import with_emulated_gpu
from profiles.errors import InfeasibleError, InputError, RunError, ZigzagError
from profiles.hardware import (
    Calibration,
    Contention,
    Cpu,
    Disk,
    Gpu,
    HardwareProfile,
    Link,
)
from profiles.rate_curve import RateCurve
from profiles.recorded import recorded_names, recorded_profile
from profiles.start import tell_failed_imports
from profiles.timing import Measurement

__all__ = [
    "Calibration",
    "ComputeRates",
    "Contention",
    "Cpu",
    "Disk",
    "Gpu",
    "HardwareProfile",
    "InfeasibleError",
    "InputError",
    "Link",
    "Measurement",
    "RateCurve",
    "RunError",
    "ZigzagError",
    "recorded_names",
    "recorded_profile",
    "with_emulated_gpu",
]

tell_failed_imports()
