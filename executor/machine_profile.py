"""This machine's profile, measured once and kept for the next run, and calibrated by the runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from costmodel.calibration.factors import check_run
from costmodel.calibration.measured_runs import append_row, read_runs, row_of
from executor.cli.run_report import Report
from profiles.cache_folder import cache_folder
from profiles.disk import free_disk_bytes
from profiles.errors import InputError, RunError, ZigzagError
from profiles.files import to_json, write_json
from profiles.hardware import HardwareProfile
from profiles.memory_limits import usable_memory_bytes
from profiles.mounts import mount_of
from profiles.start import called
from profiles.units import format_bytes
from profiles.whole_file import write_whole

logger = logging.getLogger(__name__)

# Raised where this program measures or runs otherwise than before: what was kept is left alone.
VERSION = "v4"
# Fewer runs say little; of more, the oldest are forgotten, with the machine that they met.
LEAST_RUNS, MOST_RUNS = 4, 24
# Shorter blocks are mostly noise.
SHORTEST_S = 1.0
LONGEST_NAME = 160


def machine_profile(offload_dir: Path) -> HardwareProfile:
    """Return the kept profile with today's free memory and disk, or measure one and keep it.

    Where enough runs were kept, the rates are fitted to them. One line on stderr names the profile.
    Where no folder can keep one, it is measured for this run alone.
    """
    path, runs = kept_profile(offload_dir), _kept("runs", "csv", offload_dir)
    if path is None or runs is None:
        # The folder for temporary files may be what cannot be written; this one can.
        with tempfile.TemporaryDirectory(dir=offload_dir) as folder:
            profile = _measure(offload_dir, Path(folder) / "profile.json")
        place = "not kept"
    else:
        try:
            HardwareProfile.load(path)
        except ZigzagError:
            # None was kept, or an older version wrote it: measuring again mends both.
            _measure(offload_dir, path)
        profile, place = _calibrated(path, runs), str(path)
    told = f"this machine's profile: {place}, {profile.source}, {profile.date}"
    fits = [f"; calibrated by {record.source}, {record.date}" for record in profile.calibrations]
    _tell_once(told + "".join(fits))
    return _with_current_capacities(profile, offload_dir)


@cache
def _tell_once(line: str) -> None:
    """Print what a program that runs often needs to read once."""
    print(line, file=sys.stderr, flush=True)


def kept_profile(offload_dir: Path) -> Path | None:
    """Return where this machine's profile is kept, or will be; ``None`` for nowhere."""
    return _kept("profile", "json", offload_dir)


def keep_run(report: Report, offload_dir: Path) -> None:
    """Keep a run that was planned with this machine's own profile: the policy and the seconds of
    its first block, or of all of a run over lanes, and for what share of the whole run each channel
    was busy.

    The table is one that ``costmodel.calibrate --runs`` reads.
    """
    if report.hardware.has_gpu != torch.cuda.is_available():
        # It ran beside a GPU that it left alone, and says nothing of runs that do not.
        return
    block = report.measured_run()
    if block.num_tokens / block.throughput_tok_per_s < SHORTEST_S:
        return
    shares = report.lanes is not None and report.lanes.lengths.prefixes.of_prompts.any()
    if block.policy.workload.scores_prompts or shares:
        # The table has no column for these, and they change what is computed.
        return
    try:
        path, shapes = _kept("runs", "csv", offload_dir), to_json(block.policy.model)
        if path is None:
            return
        key = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:8]
        model = path.parent / "models" / f"{block.policy.model.name}-{key}"
        row = row_of(block, model=str(model)) | {
            f"{channel}_busy_share": share for channel, share in report.busy_shares.items()
        }
        model.mkdir(parents=True, exist_ok=True)
        write_json(model / "config.json", shapes)
        append_row(path, row, most=MOST_RUNS, write=write_whole)
    except (OSError, ZigzagError) as error:
        # The run itself is done, and its outputs are written.
        logger.warning("the run's figures were not kept: %s", error)


def _calibrated(path: Path, runs: Path) -> HardwareProfile:
    """Return the profile kept at ``path``, fitted to the runs if there are enough of them."""
    measured = HardwareProfile.load(path)
    fitted = path.with_name(path.name.replace("profile", "calibrated", 1))
    if not runs.exists():
        return measured
    skipped: list[InputError] = []
    try:
        usable = read_runs(runs, check=partial(check_run, measured), skip=skipped.append)
        if len(usable) < LEAST_RUNS:
            for error in skipped:
                logger.warning("skipped: %s", error)
            return measured
        newest_ns = max(source.stat().st_mtime_ns for source in (path, runs))
        if not fitted.exists() or fitted.stat().st_mtime_ns < newest_ns:
            print("calibrating this machine's profile by its runs", file=sys.stderr, flush=True)
            words = ["--hardware", str(path), "--runs", str(runs), "--output", str(fitted)]
            # It names the lines that it skips.
            if not _run_module("costmodel.calibrate", "--skip-broken", *words):
                raise RunError("costmodel.calibrate failed")
        return HardwareProfile.load(fitted)
    except ZigzagError as error:
        logger.warning("the profile is used as measured: %s; mend or remove %s", error, runs)
        return measured


def _with_current_capacities(profile: HardwareProfile, offload_dir: Path) -> HardwareProfile:
    gpu_memory = None
    if profile.gpu is not None and torch.cuda.is_available():
        gpu_memory = torch.cuda.mem_get_info()[0]
    return profile.with_budget(
        gpu_memory=gpu_memory,
        cpu_memory=usable_memory_bytes(profile.cpu.runtime_bytes),
        disk=free_disk_bytes(offload_dir),
    )


def _measure(offload_dir: Path, path: Path) -> HardwareProfile:
    """Measure this machine, write its profile to ``path`` and return it."""
    print("measuring this machine, some 20 s", file=sys.stderr, flush=True)
    words = ["--quick", "--output", str(path), "--offload-dir", str(offload_dir)]
    if not _run_module("profiles.measure", *words):
        raise RunError(f"this machine could not be measured; try: {called('profiles.measure')}")
    profile = HardwareProfile.load(path)
    where = (
        f"{torch.get_num_threads()} threads on {len(os.sched_getaffinity(0))} cores,"
        f" {format_bytes(profile.cpu.memory_bytes)} of memory, offload folder"
        f" {offload_dir.resolve()} on {_file_system(offload_dir)}"
    )
    profile = replace(profile, source=f"{profile.source} with {where}")
    profile.save(path)
    return profile


def _run_module(name: str, *words: str) -> bool:
    """Run a command in a process of its own, whose buffers would count as this one's peak."""
    command = [sys.executable, "-m", name, *words]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0


def _kept(what: str, suffix: str, offload_dir: Path) -> Path | None:
    """Return where something about this machine is kept; ``None``, with a warning, for nowhere.

    Each situation with other rates has a file of its own: host, device, torch, threads, cores and
    the file system of the offload folder. The rest only changes capacities, which are never kept:
    free memory, memory limits and free disk are looked up at each run.
    """
    folder = cache_folder()
    if folder is None:
        return None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    name = (
        f"{VERSION}-{platform.node()}-{device}-torch{torch.__version__}"
        f"-{torch.get_num_threads()}threads-{len(os.sched_getaffinity(0))}cores"
        f"-{_file_system(offload_dir)}"
    )
    # A device's name may be a path, or longer than a file's may be.
    key = hashlib.sha256(name.encode()).hexdigest()[:8]
    readable = re.sub(r"[^\w.+-]+", "-", name)[:LONGEST_NAME]
    return folder / f"{what}-{readable}-{key}.{suffix}"


def _file_system(folder: Path) -> str:
    """Name the type and the source of the file system that holds a folder."""
    found = mount_of(folder)
    return f"{found.kind} {found.source}" if found else f"device {folder.stat().st_dev}"
