"""Busy channels, and how much they slow each other down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from costmodel.pricing.latency import TaskWork
from costmodel.pricing.linear_form import Quantity, total
from profiles.hardware import Contention, HardwareProfile

GPU_CHANNELS = frozenset({"h2d", "d2h", "gpu_compute"})


def channel_seconds(work: Sequence[TaskWork[Quantity]]) -> dict[str, Quantity]:
    """Add up the seconds of each channel."""
    pieces: dict[str, list[Quantity]] = {}
    for piece in work:
        pieces.setdefault(piece.channel, []).append(piece.seconds)
    return {channel: total(seconds) for channel, seconds in pieces.items()}


def contentions(hardware: HardwareProfile) -> Iterator[Contention]:
    """Yield the pairs of channels of a machine that slow each other down."""
    if hardware.gpu is not None:
        up, down = hardware.gpu.h2d, hardware.gpu.d2h
        yield Contention(
            first="h2d",
            second="d2h",
            first_keeps=min(1.0, up.opposed_bytes_per_s / up.pinned_bytes_per_s),
            second_keeps=min(1.0, down.opposed_bytes_per_s / down.pinned_bytes_per_s),
        )
    for pair in hardware.contention:
        # A budget may have taken the GPU away, and its link with it.
        if hardware.gpu is not None or not {pair.first, pair.second} & GPU_CHANNELS:
            yield pair


def cost_beside(keeps: float, other_keeps: float) -> float:
    """Return the seconds that one channel loses for each busy second of the other.

    The pairs of rates that two channels can reach at once are the convex hull of (1, 0), (0, 1) and
    the measured pair; this is the slope of its edge. Where both at once do less than in turns, they
    take turns.
    """
    return min(1.0, (1 - keeps) / other_keeps)
