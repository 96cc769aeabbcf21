"""Memory of one tier, handed out against a budget: allocations are named and never exceed it."""

from __future__ import annotations

from collections import defaultdict

import torch

from profiles.aligned_io import PAGE_BYTES, aligned_buffer, populate
from profiles.errors import RunError
from profiles.units import MIB, format_bytes

# Smaller buffers share regions of this size. Then they are in huge pages too: a direct read of
# 1 MiB into small pages takes almost three times as long. What is not handed out of a region is
# not physical, but for the rest of its last huge page.
_REGION_BYTES = 64 * MIB
_HUGE_PAGE_BYTES = 2 * MIB


class Arena:
    """Buffers of one tier.

    CPU buffers are page-aligned, as direct I/O needs, and exactly as large as asked. With ``pins``
    they are registered with CUDA at that size (torch's own pinned allocator rounds up to a power of
    two).

    Parameters
    ----------
    tier
        ``gpu`` or ``cpu``; for messages.
    capacity_bytes
        The budget. An allocation beyond it raises ``RunError``.
    device
        Device of the buffers; an emulated GPU's arena is on the CPU.
    """

    def __init__(
        self, tier: str, capacity_bytes: int, device: torch.device, *, pins: bool = False
    ) -> None:
        self.tier = tier
        self.capacity_bytes = capacity_bytes
        self.device = device
        self.pins = pins
        self.used_bytes: dict[str, int] = defaultdict(int)
        self._pinned: list[torch.Tensor] = []
        self._region = memoryview(b"")

    def allocate(self, name: str, num_bytes: int) -> torch.Tensor:
        """Return ``num_bytes`` of uint8 [num_bytes], counted under ``name``."""
        total = sum(self.used_bytes.values()) + num_bytes
        if total > self.capacity_bytes:
            raise RunError(
                f"{self.tier} memory: {name} needs {format_bytes(num_bytes)}, which makes"
                f" {format_bytes(total)} of a budget of {format_bytes(self.capacity_bytes)};"
                " search again with the memory that is really there"
            )
        self.used_bytes[name] += num_bytes
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        if self.device.type == "cuda":
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        try:
            # Physical now, so that neither the first block's time nor an end in the middle pays.
            memory = self._take(num_bytes)
            populate(memory)
        except OSError as error:
            raise RunError(
                f"{self.tier} memory: no {format_bytes(num_bytes)} for {name}: {error.strerror};"
                " search again with the memory that is really there"
            ) from error
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        if self.pins:
            self._pin(buffer)
        return buffer

    def _take(self, num_bytes: int) -> memoryview:
        """Return CPU memory that begins on a page, part of a region where it is small."""
        if num_bytes >= _REGION_BYTES:
            return aligned_buffer(num_bytes)
        if num_bytes > len(self._region):
            region = aligned_buffer(_REGION_BYTES + _HUGE_PAGE_BYTES)
            address = torch.frombuffer(region, dtype=torch.uint8).data_ptr()
            self._region = region[-address % _HUGE_PAGE_BYTES :]
        taken = self._region[:num_bytes]
        self._region = self._region[-(-num_bytes // PAGE_BYTES) * PAGE_BYTES :]
        return taken

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        for buffer in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
        self._pinned.clear()
        # A region is freed with the last of its buffers.
        self._region = memoryview(b"")

    def _pin(self, buffer: torch.Tensor) -> None:
        status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
        if int(status) != 0:
            raise RunError(
                f"CUDA refused to pin {format_bytes(buffer.numel())} of CPU memory (status"
                f" {int(status)}); raise the limit on locked memory (ulimit -l) or lower"
                " --cpu-memory"
            )
        self._pinned.append(buffer)
