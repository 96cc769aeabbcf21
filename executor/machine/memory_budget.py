"""What memory is free now: budgets for a search, and whether a policy fits."""

from __future__ import annotations

import sys
from pathlib import Path

from costmodel.plan.policy import Policy
from costmodel.pricing.price import policy_peaks
from profiles.errors import InfeasibleError
from profiles.hardware import HardwareProfile
from profiles.memory_limits import usable_memory_bytes
from profiles.mounts import memory_file_system
from profiles.units import MIB, format_bytes


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


def check_available(policy: Policy, hardware: HardwareProfile, *, file_bytes: int = 0) -> None:
    """Refuse a policy whose predicted peak is more than this process can have now.

    The system might else end the process while it takes its memory, without a word.

    Parameters
    ----------
    file_bytes
        What the run will write to an offload folder whose files are memory.

    Raises
    ------
    InfeasibleError
        With what is needed, what is there, and what would do.
    """
    peaks = policy_peaks(policy, hardware)
    needed = peaks["cpu"] + (peaks["gpu"] if hardware.is_emulated else 0) + file_bytes
    usable = usable_memory_bytes(hardware.cpu.runtime_bytes)
    if needed <= usable:
        return
    # Whole MiB, and not a byte too many.
    left = max(0, usable - (needed - peaks["cpu"])) // MIB
    files = f", {format_bytes(file_bytes)} of it for files in memory," if file_bytes else ""
    raise InfeasibleError(
        f"the policy does not fit now: it needs {format_bytes(needed)} of cpu memory{files} and"
        f" {format_bytes(usable)} are free for it; try: end other programs, or search again"
        f" with --cpu-memory {left}MiB" + (" and an --offload-dir on a disk" if file_bytes else "")
    )


def _say(text: str, num_bytes: int) -> None:
    print(f"note: {text} {format_bytes(num_bytes)}", file=sys.stderr)
