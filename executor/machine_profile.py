"""This machine's profile, measured once and kept for the next run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from profiles.disk import free_disk_bytes
from profiles.errors import RunError, ZigzagError
from profiles.hardware import HardwareProfile
from profiles.memory_limits import usable_memory_bytes


def machine_profile(offload_dir: Path) -> HardwareProfile:
    """Return the kept profile with today's free memory and disk, or measure one and keep it."""
    path = _cache_path()
    try:
        profile = HardwareProfile.load(path)
    except ZigzagError:
        # None was kept, or an older version wrote it: measuring again mends both.
        path.parent.mkdir(parents=True, exist_ok=True)
        _measure(offload_dir, path)
        profile = HardwareProfile.load(path)
    return _with_current_capacities(profile, offload_dir)


def _with_current_capacities(profile: HardwareProfile, offload_dir: Path) -> HardwareProfile:
    gpu_memory = None
    if profile.gpu is not None and torch.cuda.is_available():
        gpu_memory = torch.cuda.mem_get_info()[0]
    # What this process already holds is both in use and in the profile's runtime_bytes.
    return profile.with_budget(
        gpu_memory=gpu_memory,
        cpu_memory=usable_memory_bytes(),
        disk=free_disk_bytes(offload_dir),
    )


def _measure(offload_dir: Path, path: Path) -> None:
    """Measure in a process of its own: its buffers would count as this one's peak."""
    command = [sys.executable, "-m", "profiles.measure", "--quick", "--output", str(path)]
    ended = subprocess.run(
        [*command, "--offload-dir", str(offload_dir)], stdout=subprocess.DEVNULL, check=False
    )
    if ended.returncode:
        raise RunError("this machine could not be measured; try: python -m profiles.measure")


def _cache_path() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    name = f"{platform.node()}-{device}-torch{torch.__version__}".replace("/", "-").replace(
        " ", "-"
    )
    return base / "zigzag" / f"profile-{name}.json"
