"""The link between host and GPU: pinned and pageable copies, alone and under opposite traffic."""

from __future__ import annotations

from collections.abc import Callable

import torch

from profiles.hardware import Link
from profiles.repeats import Repeater
from profiles.units import MIB

BUFFER_BYTES = 256 * MIB


def measure_links(repeater: Repeater) -> tuple[Link, Link]:
    """Measure host to device and device to host on the current CUDA device."""
    return _measure_direction("h2d", repeater), _measure_direction("d2h", repeater)


def _measure_direction(direction: str, repeater: Repeater) -> Link:
    def rate(kind: str, work: Callable[[], None]) -> float:
        name = f"link.{direction}.{kind}"
        return repeater.measure_rate(name, "bytes_per_s", work, BUFFER_BYTES).median

    # torch does not type the constructors of its streams and events.
    stream = torch.cuda.Stream()
    other_stream = torch.cuda.Stream()
    pinned = link_copy(direction, pinned=True)
    pageable = link_copy(direction, pinned=False)
    opposite = link_copy("d2h" if direction == "h2d" else "h2d", pinned=True)
    torch.cuda.synchronize()

    def copy_alone(copy: Callable[[], None]) -> None:
        with torch.cuda.stream(stream):
            copy()
        stream.synchronize()

    def copy_opposed() -> None:
        # Timed until both are done: the slower direction's rate, and never too high a one.
        with torch.cuda.stream(other_stream):
            opposite()
        copy_alone(pinned)
        other_stream.synchronize()

    return Link(
        pinned_bytes_per_s=rate("pinned", lambda: copy_alone(pinned)),
        pageable_bytes_per_s=rate("pageable", lambda: copy_alone(pageable)),
        opposed_bytes_per_s=rate("opposed", copy_opposed),
    )


def link_copy(direction: str, *, pinned: bool) -> Callable[[], None]:
    """Return a copy of ``BUFFER_BYTES`` on the current stream, which pinned does not wait for."""
    host = torch.zeros(BUFFER_BYTES, dtype=torch.uint8, pin_memory=pinned)
    device = torch.zeros(BUFFER_BYTES, dtype=torch.uint8, device="cuda")
    target, source = (device, host) if direction == "h2d" else (host, device)

    def copy() -> None:
        target.copy_(source, non_blocking=pinned)

    return copy
