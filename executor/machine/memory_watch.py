"""Watches that a run keeps to its budgets, and says so in one line before the system ends it.

Arenas account for homes and staging; what torch and the libraries take for themselves passes by
them, so the process is held against its budget as the system counts it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from executor.machine.allocator import return_freed_memory
from profiles.errors import RunError
from profiles.hardware import HardwareProfile
from profiles.memory_limits import held_memory
from profiles.units import format_bytes

# Predictions may be too small by so much; beyond it something was not predicted at all.
TOLERANCE = 0.03


class MemoryWatch:
    """Holds this process to a machine's budgets. A context manager; any thread may check.

    CPU memory is looked at between tasks; CUDA is told not to hand out more than its budget. A
    process that held more when the run began than the profile's empty one, such as a notebook with
    other libraries, may go on holding that much more.
    """

    def __init__(self, hardware: HardwareProfile) -> None:
        self.budget_bytes = hardware.cpu.memory_bytes
        self._cuda_bytes: int | None = None
        if hardware.gpu is not None and hardware.gpu.emulated:
            # Both tiers are this process's memory then.
            self.budget_bytes += hardware.gpu.memory_bytes
        elif hardware.gpu is not None:
            self._cuda_bytes = hardware.gpu.memory_bytes
        allowed = round(self.budget_bytes * (1 + TOLERANCE))
        self.allowed_bytes = allowed + _foreign_bytes(hardware)

    def __enter__(self) -> MemoryWatch:
        if self._cuda_bytes is not None:
            _, total = torch.cuda.mem_get_info()
            allowed = self._cuda_bytes * (1 + TOLERANCE)
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda_bytes is not None:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def check(self) -> None:
        """Raise ``RunError`` where the process holds more CPU memory than it may."""
        held = held_memory().resident
        if held > self.allowed_bytes:
            # Giving it back and taking it again costs tenths of a second.
            return_freed_memory()
            held = held_memory().resident
        if held > self.allowed_bytes:
            raise RunError(
                f"cpu memory: the process holds {format_bytes(held)}; allowed:"
                f" {format_bytes(self.allowed_bytes)}, for a budget of"
                f" {format_bytes(self.budget_bytes)}; try: search again with a smaller --cpu-memory"
                " than is there, which leaves room for what was not predicted"
            )


@contextlib.contextmanager
def out_of_memory_told(hardware: HardwareProfile) -> Iterator[None]:
    """Turn CUDA's refusal into one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        budget = hardware.gpu.memory_bytes if hardware.gpu else 0
        raise RunError(
            f"gpu memory: the run needs more than its budget of {format_bytes(budget)}, or than"
            " other programs leave of it; try: search again with a smaller --gpu-memory"
        ) from error


def _foreign_bytes(hardware: HardwareProfile) -> int:
    """Return what this process holds beyond an empty one, before a run has taken anything."""
    return max(0, held_memory().resident - hardware.cpu.runtime_bytes)
