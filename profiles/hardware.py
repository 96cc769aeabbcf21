"""What a machine can do: the ``HardwareProfile``, validated, and its JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from profiles.compute_rates import ComputeRates
from profiles.errors import InputError
from profiles.files import dump_json, from_json, read_json, to_json
from profiles.outputs import write_output
from profiles.rate_curve import RateCurve, require_not_negative, require_positive
from profiles.timing import Measurement

SCHEMA_VERSION = 1
# Each works in order; all work at once.
CHANNELS = ("h2d", "d2h", "disk_read", "disk_write", "gpu_compute", "cpu_compute")


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction of the link between host and device, in bytes/s."""

    pinned_bytes_per_s: float
    pageable_bytes_per_s: float
    # The pinned rate while the other direction is busy too.
    opposed_bytes_per_s: float

    def __post_init__(self) -> None:
        for name in ("pinned_bytes_per_s", "pageable_bytes_per_s", "opposed_bytes_per_s"):
            require_positive(f"link.{name}", getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The GPU tier. ``emulated`` marks a budgeted arena in CPU memory behind throttled links."""

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    compute: ComputeRates
    h2d: Link
    d2h: Link
    emulated: bool = False

    def __post_init__(self) -> None:
        require_not_negative("gpu.memory_bytes", self.memory_bytes)
        require_positive("gpu.memory_bytes_per_s", self.memory_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The CPU tier. ``runtime_bytes`` is what the process holds before it loads anything. On a
    machine with a GPU, ``compute`` is measured with the cores that the CPU is left beside it."""

    name: str
    num_cores: int
    memory_bytes: int
    memory_bytes_per_s: float
    runtime_bytes: int
    compute: ComputeRates

    def __post_init__(self) -> None:
        require_positive("cpu.num_cores", self.num_cores)
        require_not_negative("cpu.memory_bytes", self.memory_bytes)
        require_positive("cpu.memory_bytes_per_s", self.memory_bytes_per_s)
        require_not_negative("cpu.runtime_bytes", self.runtime_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The disk tier: free bytes, and rates past the page cache over bytes of one request."""

    free_bytes: int
    read: RateCurve
    write: RateCurve

    def __post_init__(self) -> None:
        require_not_negative("disk.free_bytes", self.free_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """How much two channels slow each other down, because they share cores, memory or a link.

    Parameters
    ----------
    first, second
        Two of ``CHANNELS``.
    first_keeps, second_keeps
        Share of its rate alone that each keeps while the other is busy too, in (0, 1].
    """

    first: str
    second: str
    first_keeps: float
    second_keeps: float

    def __post_init__(self) -> None:
        if self.first == self.second or not {self.first, self.second} <= set(CHANNELS):
            got = f"{self.first} and {self.second}"
            raise InputError("contention", got=got, allowed=f"two of {', '.join(CHANNELS)}")
        for name in ("first_keeps", "second_keeps"):
            value = getattr(self, name)
            if not math.isfinite(value) or not 0 < value <= 1:
                raise InputError(f"contention.{name}", got=value, allowed="above 0, at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Rates that were fitted to measured runs: factors that the profile's own already contain.

    Parameters
    ----------
    date
        ISO date of the fit.
    source
        The table of measured throughputs.
    factors
        By name of an efficiency; a rate was multiplied by it.
    """

    date: str
    source: str
    factors: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, factor in self.factors.items():
            require_not_negative(f"calibration.{name}", factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """A machine: three tiers, the channels between them, and where the figures come from.

    Parameters
    ----------
    name
        What people call the machine.
    source
        ``measured`` with its command, or the public figures that a recorded machine cites.
    date
        ISO date of the measurement or of the record.
    gpu
        ``None`` on a machine without a GPU; the CPU is then the compute device.
    versions
        Library versions by name.
    measurements
        Raw samples behind the figures, where they were measured.
    contention
        Pairs of channels that slow each other down; both directions of the GPU's link are
        described by ``Link.opposed_bytes_per_s`` instead.
    unhidden_share
        Share of the other channels' busy time that adds to the busiest one's, because runs
        overlap imperfectly: 0 hides all of it, 1 none. Fitted, not measured.
    calibrations
        Fits that changed the figures, oldest first.
    """

    name: str
    source: str
    date: str
    cpu: Cpu
    disk: Disk
    gpu: Gpu | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()
    contention: tuple[Contention, ...] = ()
    unhidden_share: float = 0.0
    calibrations: tuple[Calibration, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not 0 <= self.unhidden_share <= 1:
            raise InputError("unhidden_share", got=self.unhidden_share, allowed="a share in [0, 1]")
        if self.schema_version != SCHEMA_VERSION:
            raise InputError(
                "profile schema_version", got=self.schema_version, allowed=str(SCHEMA_VERSION)
            )

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU tier, real or emulated."""
        return self.gpu is not None

    @property
    def is_emulated(self) -> bool:
        """Whether the GPU tier is emulated in CPU memory."""
        return self.gpu is not None and self.gpu.emulated

    @property
    def uses_cuda(self) -> bool:
        """Whether there is a GPU tier, and a real one."""
        return self.gpu is not None and not self.gpu.emulated

    @property
    def compute(self) -> ComputeRates:
        """Rates of the device that computes: the GPU where there is one, else the CPU."""
        return self.cpu.compute if self.gpu is None else self.gpu.compute

    @property
    def knows_unpacking(self) -> bool:
        """Whether the rate of unpacking 4-bit groups is known on every device."""
        rates = [self.cpu.compute] + ([self.gpu.compute] if self.gpu else [])
        return all(rate.unpack_bytes_per_s > 0 for rate in rates)

    def with_budget(
        self,
        *,
        gpu_memory: int | None = None,
        cpu_memory: int | None = None,
        disk: int | None = None,
    ) -> HardwareProfile:
        """Replace capacities, in bytes, by a user's budgets; ``None`` keeps what was measured."""
        profile = self
        if gpu_memory is not None and gpu_memory > 0 and profile.gpu is None:
            raise InputError(
                "--gpu-memory",
                got=f"{gpu_memory} bytes",
                allowed="0 on a machine whose profile has no GPU",
            )
        if gpu_memory is not None and profile.gpu is not None:
            # A GPU without memory computes nothing.
            gpu = replace(profile.gpu, memory_bytes=gpu_memory) if gpu_memory else None
            profile = replace(profile, gpu=gpu)
        if cpu_memory is not None:
            profile = replace(profile, cpu=replace(profile.cpu, memory_bytes=cpu_memory))
        if disk is not None:
            profile = replace(profile, disk=replace(profile.disk, free_bytes=disk))
        return profile

    def save(self, path: Path) -> None:
        """Write the profile as JSON, whole or not at all."""
        write_output(path, partial(dump_json, to_json(self)))

    @classmethod
    def load(cls, path: Path) -> HardwareProfile:
        """Read a profile; raises ``InputError`` with file and key on anything out of place."""
        return from_json(cls, read_json(path, "profile"), f"profile {path}")
