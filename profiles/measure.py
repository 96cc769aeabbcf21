"""The command ``python -m profiles.measure``: measure this machine and write its profile."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from profiles import compute, compute_plan, disk
from profiles.attention_rates import DTYPE, decode_attention_call
from profiles.command import Parser, run
from profiles.contention import measure_contention
from profiles.cores import attending_threads, num_threads_of
from profiles.emulate import with_emulated_gpu
from profiles.errors import InputError
from profiles.files import to_json
from profiles.hardware import Cpu, Gpu, HardwareProfile
from profiles.kernels import without_cudnn_attention
from profiles.links import measure_links
from profiles.memory_limits import usable_memory_bytes
from profiles.mounts import memory_file_system
from profiles.output_checks import checked_outputs, output_path
from profiles.repeats import FULL, QUICK, Repeater
from profiles.runtime import measure_runtime_bytes
from profiles.table import format_profile
from profiles.units import format_seconds

logger = logging.getLogger(__name__)

# From tests/bench/validate.py, on two cores.
QUICK_WARNING = (
    "quick: few sizes and samples, so single figures may be wrong. Calibrated by runs, quick"
    " profiles predicted 48 other runs with a mean error of 8.2 %, full ones 8.5 %"
    " (docs/benchmarks.md)"
)
# Above this share of use by other programs, measured over so long, a machine is busy.
BUSY_SHARE, LOOK_S = 0.2, 0.3
# Cache rows that the CPU attends to while a layer on the GPU is measured.
ATTENDED_ROWS = 512
VERSIONED = ("torch", "numpy", "tokenizers", "safetensors")


def measure_profile(
    *,
    offload_dir: Path,
    quick: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> HardwareProfile:
    """Measure this machine: under 20 s when ``quick``, else under 3 minutes.

    Parameters
    ----------
    offload_dir
        Folder on the disk that weights and cache would be offloaded to.
    progress
        Called with the name of each figure before it is measured.

    Raises
    ------
    InputError
        When the folder is missing, cannot be written, or is too full to measure.
    """
    disk.free_disk_bytes(offload_dir)
    memory_bytes = usable_memory_bytes()
    progress("cpu.runtime")
    runtime_bytes = measure_runtime_bytes()
    repeater = Repeater(QUICK if quick else FULL, progress)
    plan = compute_plan.QUICK_PLAN if quick else compute_plan.FULL_PLAN
    disk_plan = disk.QUICK_PLAN if quick else disk.FULL_PLAN
    memory_bytes_per_s = compute.measure_memory("cpu", plan, repeater)
    has_gpu, num_threads = torch.cuda.is_available(), torch.get_num_threads()
    # Beside a GPU, the CPU computes with fewer threads.
    with num_threads_of(attending_threads(num_threads) if has_gpu else num_threads):
        cpu = Cpu(
            name=_cpu_name(),
            num_cores=len(os.sched_getaffinity(0)),
            memory_bytes=memory_bytes,
            memory_bytes_per_s=memory_bytes_per_s,
            runtime_bytes=runtime_bytes,
            compute=compute.measure_compute("cpu", plan, repeater),
        )
        gpu = _measure_gpu(plan, repeater) if has_gpu else None
        measured_disk = disk.measure_disk(offload_dir, disk_plan, repeater)
        contention = measure_contention(offload_dir, plan, cpu.compute, has_gpu, repeater)
    return HardwareProfile(
        name=f"{gpu.name} with {cpu.name}" if gpu else f"{cpu.name}, {cpu.num_cores} cores",
        source="measured with python -m profiles.measure" + (" --quick" if quick else ""),
        date=datetime.date.today().isoformat(),
        cpu=cpu,
        disk=measured_disk,
        gpu=gpu,
        versions=_versions(),
        measurements=repeater.measurements,
        contention=contention,
    )


def _measure_gpu(plan: compute_plan.ComputePlan, repeater: Repeater) -> Gpu:
    without_cudnn_attention()
    # A batch's attention takes milliseconds in a run.
    attend, _ = decode_attention_call("cpu", DTYPE, replace(plan, num_cache_rows=ATTENDED_ROWS))
    # A GPU needs more work than a CPU before it shows its speed.
    plan = replace(plan, out_features=11008, num_prompts=8, num_heads=32, num_cache_rows=1024)
    free_bytes, _ = torch.cuda.mem_get_info()
    h2d, d2h = measure_links(repeater)
    gpu = Gpu(
        name=torch.cuda.get_device_name(),
        memory_bytes=free_bytes,
        memory_bytes_per_s=compute.measure_memory("cuda", plan, repeater),
        compute=compute.measure_compute("cuda", plan, repeater, beside=attend),
        h2d=h2d,
        d2h=d2h,
    )
    torch.cuda.empty_cache()
    return gpu


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.machine())


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="profiles.measure",
        description="Measure this machine and write its hardware profile.",
        example="python -m profiles.measure --output profile.json --cpu-memory 8GiB",
    )
    parser.add_argument(
        "--output",
        type=output_path,
        default=Path("profile.json"),
        help="profile to write (default: profile.json)",
    )
    parser.add_argument("--quick", action="store_true", help="take fewer samples, in under 20 s")
    parser.add_argument(
        "--offload-dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder on the disk to measure (default: the current folder)",
    )
    parser.add_argument("--name", help="name of the machine (default: that of its processors)")
    parser.add_bytes("--gpu-memory", help="GPU memory to record (default: what is free)")
    parser.add_bytes("--cpu-memory", help="CPU memory to record (default: what is usable)")
    parser.add_bytes("--disk", help="disk space to record (default: what is free)")
    parser.add_bytes("--emulate-gpu", help="set this much CPU memory aside as an emulated GPU tier")
    parser.add_bytes(
        "--emulated-link", help="bytes per second to and from the emulated GPU, such as 8GB"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the profile as one line of JSON at the end"
    )
    return parser


def _check(flags: argparse.Namespace) -> None:
    """Refuse what can be refused before a minute of measuring."""
    if (flags.emulate_gpu is None) != (flags.emulated_link is None):
        raise InputError(
            "--emulate-gpu and --emulated-link",
            got="one of them",
            allowed="both or neither, e.g. --emulate-gpu 2GiB --emulated-link 8GB",
        )
    if flags.emulated_link == 0:
        raise InputError("--emulated-link", got=0, allowed="a rate above 0, such as 8GB")
    has_gpu = torch.cuda.is_available()
    if flags.emulate_gpu is not None and has_gpu:
        raise InputError(
            "--emulate-gpu",
            got=torch.cuda.get_device_name(),
            allowed="a machine without a GPU",
            hint="CUDA_VISIBLE_DEVICES= to hide it",
        )
    if flags.gpu_memory and not has_gpu and flags.emulate_gpu is None:
        raise InputError(
            "--gpu-memory",
            got="no GPU on this machine",
            allowed="0",
            hint="--emulate-gpu 2GiB --emulated-link 8GB",
        )


def main(arguments: list[str]) -> None:
    """Measure, save, print."""
    flags = parser().parse_args(arguments)
    _check(flags)
    with checked_outputs({"--output": flags.output}, {}):
        _measure(flags)


def _measure(flags: argparse.Namespace) -> None:
    busy_share = psutil.cpu_percent(LOOK_S) / 100
    if busy_share > BUSY_SHARE:
        logger.warning(
            "other programs use %.0f %% of this machine: the profile shows only the rest;"
            " try: measure again when they have ended, or leave them cores: OMP_NUM_THREADS=%d",
            100 * busy_share,
            max(1, int(torch.get_num_threads() * (1 - busy_share))),
        )
    kind = memory_file_system(flags.offload_dir)
    if kind is not None:
        logger.warning(
            "--offload-dir %s is in memory (%s), so its rates are those of memory, and its files"
            " count as cpu memory; try: a folder on a disk",
            flags.offload_dir,
            kind,
        )
    start = time.perf_counter()
    with tqdm(desc="measuring", unit=" figures", leave=False, disable=None) as bar:

        def show(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        profile = measure_profile(offload_dir=flags.offload_dir, quick=flags.quick, progress=show)
    if flags.emulate_gpu is not None:
        profile = with_emulated_gpu(
            profile, memory_bytes=flags.emulate_gpu, link_bytes_per_s=flags.emulated_link
        )
    profile = profile.with_budget(
        gpu_memory=flags.gpu_memory, cpu_memory=flags.cpu_memory, disk=flags.disk
    )
    if flags.name is not None:
        profile = replace(profile, name=flags.name)
    profile.save(flags.output)
    print(format_profile(profile))
    seconds = time.perf_counter() - start
    print(f"\nmeasured in {format_seconds(seconds)}, written to {flags.output}")
    if flags.quick:
        print(QUICK_WARNING)
    if flags.json:
        summary = to_json(replace(profile, measurements=()))
        print(json.dumps({"output": str(flags.output), "measured_s": seconds, "profile": summary}))


if __name__ == "__main__":
    run(main)
