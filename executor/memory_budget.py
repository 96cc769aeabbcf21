"""Budgets that a search may plan with: what is free now, and no byte of it twice."""

from __future__ import annotations

import sys
from pathlib import Path

from profiles.hardware import HardwareProfile
from profiles.memory_limits import usable_memory_bytes
from profiles.mounts import memory_file_system
from profiles.units import format_bytes


def within_free_memory(
    hardware: HardwareProfile, offload_dir: Path, *, is_asked_for: bool = False
) -> HardwareProfile:
    """Return the machine with budgets that are there now.

    An emulated GPU is CPU memory, and so is an offload folder in a tmpfs: it is left what the other
    budgets leave, which is told. A lower budget for memory is told where it ``is_asked_for``.
    """
    usable = usable_memory_bytes(hardware.cpu.runtime_bytes)
    if hardware.gpu is not None and hardware.gpu.emulated:
        usable = max(0, usable - hardware.gpu.memory_bytes)
    cpu, disk = hardware.cpu.memory_bytes, hardware.disk.free_bytes
    if cpu > usable:
        if is_asked_for:
            _say(f"{format_bytes(usable)} of cpu memory are free now, of --cpu-memory", cpu)
        cpu = usable
    kind = memory_file_system(offload_dir)
    if kind is not None and disk > usable - cpu:
        left = usable - cpu
        what = f"--offload-dir {offload_dir} is in memory ({kind})"
        _say(f"{what}: beside the budget for cpu memory there are {format_bytes(left)} of", disk)
        disk = left
    return hardware.with_budget(cpu_memory=cpu, disk=disk)


def _say(text: str, num_bytes: int) -> None:
    print(f"note: {text} {format_bytes(num_bytes)}", file=sys.stderr)
