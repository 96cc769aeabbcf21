"""A GPU tier emulated in CPU memory, to run all three tiers where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from profiles.errors import InputError
from profiles.hardware import Contention, Gpu, HardwareProfile, Link
from profiles.units import format_bytes, format_rate

# What the memory moves for a copied byte: it is read once and written once.
COPIED_BYTES = 2
# Share of its rate that computing keeps beside a link as fast as the memory: a guess.
LEAST_LEFT = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedGpu:
    """The GPU tier that a run emulated in CPU memory: its size and the rate of its link."""

    memory_bytes: int
    link_bytes_per_s: float

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "link_bytes_per_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"emulated GPU {name}", got=getattr(self, name), allowed="above 0")

    def beside(self, hardware: HardwareProfile) -> HardwareProfile:
        """Return a machine without a GPU with this one as its GPU tier."""
        return with_emulated_gpu(
            hardware, memory_bytes=self.memory_bytes, link_bytes_per_s=self.link_bytes_per_s
        )


def with_emulated_gpu(
    profile: HardwareProfile, *, memory_bytes: int, link_bytes_per_s: float
) -> HardwareProfile:
    """Set aside part of a machine's CPU memory as a GPU tier behind throttled links.

    It computes as fast as the CPU does, on the CPU's cores, where it takes turns with the CPU's
    attention. Its memory is taken off the CPU tier.

    Parameters
    ----------
    link_bytes_per_s
        Rate of each direction, pinned or not, alone or opposed.

    Raises
    ------
    InputError
        When the machine has a GPU, or no more CPU memory than the emulated tier is to have.
    """
    if profile.gpu is not None:
        raise InputError(
            "--emulate-gpu",
            got=f"a machine with {profile.gpu.name}",
            allowed="a machine without a GPU",
        )
    if memory_bytes >= profile.cpu.memory_bytes:
        raise InputError(
            "--emulate-gpu",
            got=format_bytes(memory_bytes),
            allowed=f"less than the CPU memory, {format_bytes(profile.cpu.memory_bytes)}",
        )
    link = Link(
        pinned_bytes_per_s=link_bytes_per_s,
        pageable_bytes_per_s=link_bytes_per_s,
        opposed_bytes_per_s=link_bytes_per_s,
    )
    gpu = Gpu(
        name=f"emulated GPU ({format_bytes(memory_bytes)}, {format_rate(link_bytes_per_s)})",
        memory_bytes=memory_bytes,
        memory_bytes_per_s=profile.cpu.memory_bytes_per_s,
        # What is stored there moves, or came from elsewhere.
        compute=profile.cpu.compute.over_tokens(),
        h2d=link,
        d2h=link,
        emulated=True,
    )
    cpu = replace(profile.cpu, memory_bytes=profile.cpu.memory_bytes - memory_bytes)
    # What passes the link is read from the memory that the cores compute from, and written to it.
    left = 1 - COPIED_BYTES * link_bytes_per_s / profile.cpu.memory_bytes_per_s
    # What slows the CPU down does so whichever tier it computes for.
    contention = (
        *profile.contention,
        *(
            _as_gpu(pair)
            for pair in profile.contention
            if "cpu_compute" in (pair.first, pair.second)
        ),
        Contention(first="gpu_compute", second="cpu_compute", first_keeps=0.5, second_keeps=0.5),
        *(
            Contention(
                first="gpu_compute",
                second=name,
                first_keeps=max(LEAST_LEFT, left),
                second_keeps=1.0,
            )
            for name in ("h2d", "d2h")
        ),
    )
    return replace(
        profile, name=f"{profile.name} + {gpu.name}", gpu=gpu, cpu=cpu, contention=contention
    )


def _as_gpu(pair: Contention) -> Contention:
    first, second = (
        name.replace("cpu_compute", "gpu_compute") for name in (pair.first, pair.second)
    )
    return replace(pair, first=first, second=second)
