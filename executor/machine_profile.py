"""This machine's profile, measured once and kept for the next run, and calibrated by the runs."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from costmodel.measured_runs import read_rows, row_of, write_rows
from executor.dummy import hf_config
from executor.report import Report
from profiles.disk import free_disk_bytes
from profiles.errors import RunError, ZigzagError
from profiles.files import write_json
from profiles.hardware import HardwareProfile
from profiles.memory_limits import usable_memory_bytes

logger = logging.getLogger(__name__)

# Fewer runs say little; of more, the oldest are forgotten, with the machine that they met.
LEAST_RUNS, MOST_RUNS = 4, 24
# Shorter blocks are mostly noise.
SHORTEST_S = 1.0


def machine_profile(offload_dir: Path) -> HardwareProfile:
    """Return the kept profile with today's free memory and disk, or measure one and keep it.

    Where enough runs were kept, the rates are fitted to them.
    """
    path = _kept("profile", "json")
    try:
        HardwareProfile.load(path)
    except ZigzagError:
        # None was kept, or an older version wrote it: measuring again mends both.
        path.parent.mkdir(parents=True, exist_ok=True)
        _measure(offload_dir, path)
    return _with_current_capacities(_calibrated(path), offload_dir)


def keep_run(report: Report) -> None:
    """Keep the first block of a run that was planned with this machine's own profile.

    Its policy, its seconds and the shares of its channels go into a table that
    ``costmodel.calibrate --runs`` reads.
    """
    block = report.first_block()
    if block.prefill_s + block.decode_s < SHORTEST_S:
        return
    path, model = _kept("runs", "csv"), block.policy.model
    config = path.parent / "models" / f"{model.name}-{model.num_layers}x{model.hidden_size}.json"
    row = row_of(block, model=str(config)) | {
        f"{channel}_busy_share": share for channel, share in report.busy_shares.items()
    }
    try:
        kept = read_rows(path) if path.exists() else []
        config.parent.mkdir(parents=True, exist_ok=True)
        write_json(config, hf_config(model))
        write_rows(path, [*kept, row][-MOST_RUNS:])
    except (OSError, ZigzagError) as error:
        # The run itself is done, and its outputs are written.
        logger.warning("the run's figures were not kept in %s: %s", path, error)


def _calibrated(path: Path) -> HardwareProfile:
    """Return the profile kept at ``path``, fitted to the runs if there are enough of them."""
    runs, fitted = _kept("runs", "csv"), _kept("calibrated", "json")
    if not runs.exists() or len(read_rows(runs)) < LEAST_RUNS:
        return HardwareProfile.load(path)
    newest_ns = max(path.stat().st_mtime_ns, runs.stat().st_mtime_ns)
    if not fitted.exists() or fitted.stat().st_mtime_ns < newest_ns:
        words = ["--hardware", str(path), "--runs", str(runs), "--output", str(fitted)]
        if not _run_module("costmodel.calibrate", *words):
            logger.warning("the profile is used as it was measured; to mend it, remove %s", runs)
            return HardwareProfile.load(path)
    return HardwareProfile.load(fitted)


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
    words = ["--quick", "--output", str(path), "--offload-dir", str(offload_dir)]
    if not _run_module("profiles.measure", *words):
        raise RunError("this machine could not be measured; try: python -m profiles.measure")


def _run_module(name: str, *words: str) -> bool:
    """Run a command in a process of its own, whose buffers would count as this one's peak."""
    command = [sys.executable, "-m", name, *words]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0


def _kept(what: str, suffix: str) -> Path:
    """Return where something about this machine is kept, with this version of torch."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    name = f"{platform.node()}-{device}-torch{torch.__version__}".replace("/", "-").replace(
        " ", "-"
    )
    return base / "zigzag" / f"{what}-{name}.{suffix}"
