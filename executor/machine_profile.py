"""This machine's profile, measured once and kept for the next run."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from profiles.disk import free_disk_bytes
from profiles.errors import ZigzagError
from profiles.hardware import HardwareProfile
from profiles.measure import measure_profile
from profiles.memory_limits import usable_memory_bytes


def machine_profile(offload_dir: Path) -> HardwareProfile:
    """Return the kept profile with today's free memory and disk, or measure one and keep it."""
    path = _cache_path()
    try:
        profile = HardwareProfile.load(path)
    except ZigzagError:
        # None was kept, or an older version wrote it: measuring again mends both.
        profile = _measure(offload_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.save(path)
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


def _measure(offload_dir: Path) -> HardwareProfile:
    with tqdm(desc="measuring this machine", unit=" figures", leave=False, disable=None) as bar:

        def show(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        profile = measure_profile(offload_dir=offload_dir, quick=True, progress=show)
    return replace(profile, measurements=())


def _cache_path() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    name = f"{platform.node()}-{device}-torch{torch.__version__}".replace("/", "-").replace(
        " ", "-"
    )
    return base / "zigzag" / f"profile-{name}.json"
