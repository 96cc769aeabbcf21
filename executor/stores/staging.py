"""The places of a layer's components in the staging buffers of both tiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from costmodel.model.layout import TENSOR_ALIGNMENT, round_up
from costmodel.plan.cuts import PlacedComponent
from profiles.aligned_io import PAGE_BYTES


def page_floor(position: int) -> int:
    """Round down to the start of a page."""
    return position // PAGE_BYTES * PAGE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedComponent:
    """One component with its places in staging.

    Parameters
    ----------
    window_offset
        The offset in CPU staging of the pages of its disk part (the window).
    gpu_offset
        The offset in GPU staging of its part off the GPU.
    """

    placed: PlacedComponent
    window_offset: int
    gpu_offset: int

    @property
    def window_start(self) -> int:
        """The byte of the component at which the window begins."""
        return page_floor(self.placed.cut.cpu_end)

    @property
    def window_bytes(self) -> int:
        """Bytes of the window."""
        cut = self.placed.cut
        return round_up(cut.num_bytes, PAGE_BYTES) - self.window_start if cut.disk_bytes else 0

    def window_part(self, low: int, high: int) -> tuple[int, int]:
        """Return the range of the component's bytes in [low, high) of CPU staging."""
        shift = self.window_start - self.window_offset
        first = max(low, self.window_offset) + shift
        return first, max(first, min(high, self.window_offset + self.window_bytes) + shift)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedLayer:
    """The components of one layer, and their bytes in the staging buffers of each tier."""

    components: tuple[StagedComponent, ...]
    cpu_bytes: int
    gpu_bytes: int

    @classmethod
    def of(cls, placed: Sequence[PlacedComponent]) -> StagedLayer:
        """Put components one behind another."""
        components = []
        cpu_bytes = gpu_bytes = 0
        for component in placed:
            staged = StagedComponent(
                placed=component, window_offset=cpu_bytes, gpu_offset=gpu_bytes
            )
            components.append(staged)
            cpu_bytes += staged.window_bytes
            off_gpu = component.cut.num_bytes - component.cut.gpu_end
            gpu_bytes = round_up(gpu_bytes + off_gpu, TENSOR_ALIGNMENT)
        return cls(components=tuple(components), cpu_bytes=cpu_bytes, gpu_bytes=gpu_bytes)


def resident_parts(
    components: Sequence[StagedComponent], part: int, num_parts: int, *, in_prefill: bool
) -> Iterator[tuple[StagedComponent, slice]]:
    """Yield one of ``num_parts`` equal parts of the bytes that are sent from CPU memory.

    Each component comes with a range of its resident bytes. In decode, the experts that the CPU
    multiplies in place are not sent.
    """
    sizes = [
        c.placed.cut.cpu_bytes - (0 if in_prefill else c.placed.bytes_in_place) for c in components
    ]
    whole = sum(sizes)
    low, high = (whole * (part + i) // num_parts for i in (0, 1))
    before = 0
    for component, size in zip(components, sizes, strict=True):
        first, end = max(low - before, 0), min(high - before, size)
        if first < end:
            yield component, slice(first, end)
        before += size
