"""What this machine has and lacks for a run; nothing is measured, built or kept."""

from __future__ import annotations

import math
import os
import re
import resource
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from executor.machine.findings import Finding, State
from executor.machine_profile import kept_profile
from profiles.aligned_io import PAGE_BYTES, DirectFile, aligned_buffer
from profiles.control_groups import cpu_quota
from profiles.errors import InputError, RunError, one_line
from profiles.hardware import HardwareProfile
from profiles.kernels.build import chosen_compiler, kept_libraries
from profiles.kernels.call import gpu_kernels
from profiles.kernels.toolchain import find_toolchain
from profiles.memory_limits import group_limit_bytes, usable_memory_bytes
from profiles.mounts import memory_file_system, mount_of, read_lines
from profiles.units import MIB, format_bytes

DRIVER = Path("/proc/driver/nvidia/version")
PINNED_BYTES = 64 * MIB
# Of the machine's memory: with less that is usable, other programs hold much of it.
PLENTY_SHARE = 0.5
HIDE_GPU = "try: end what uses the device, or hide it with CUDA_VISIBLE_DEVICES="
BUILDS = "the first run builds them, which takes some 20 s"


def check_cores(root: Path = Path("/")) -> Finding:
    """Check that torch does not compute with more threads than there are cores for."""
    permitted, quota = len(os.sched_getaffinity(0)), cpu_quota(root)
    threads = torch.get_num_threads()
    limit = "no quota" if quota is None else f"a control group's quota of {quota:g}"
    found = f"{permitted} of {os.cpu_count()}, {limit}; torch computes with {threads} threads"
    cores = permitted if quota is None else min(permitted, quota)
    if threads <= math.ceil(cores):
        return Finding(what="cores", found=found)
    follows = f"threads wait for each other; try: OMP_NUM_THREADS={max(1, math.floor(cores))}"
    return Finding(what="cores", state=State.NOTE, found=found, follows=follows)


def check_memory(root: Path = Path("/")) -> Iterator[Finding]:
    """Check how much memory is usable now, and which limits there are."""
    total, usable = psutil.virtual_memory().total, usable_memory_bytes(root=root)
    limit = group_limit_bytes(root)
    if limit is not None and limit < total:
        total, whose = limit, "the control group's limit"
    else:
        whose = "physical memory"
    found = f"{format_bytes(usable)} usable of {format_bytes(total)} ({whose})"
    if usable >= PLENTY_SHARE * total:
        yield Finding(what="memory", found=found)
    else:
        follows = "other programs hold the rest; try: end them"
        yield Finding(what="memory", state=State.NOTE, found=found, follows=follows)
    for flag, kind in (("-v", resource.RLIMIT_AS), ("-d", resource.RLIMIT_DATA)):
        most, _ = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            yield Finding(
                what="memory",
                state=State.NOTE,
                found=f"ulimit {flag} is {format_bytes(most)}",
                follows=f"it counts addresses, not memory; try: ulimit {flag} unlimited",
            )


def check_kernels() -> Iterator[Finding]:
    """Check the compiler and the native CPU kernels that it builds."""
    name, follows = chosen_compiler(), "the CPU computes with torch alone, several times slower"
    if not name:
        found = "forbidden by ZIGZAG_COMPILER"
        yield Finding(what="CPU kernels", state=State.NOTE, found=found, follows=follows)
        return
    kept = kept_libraries()
    try:
        toolchain = find_toolchain(name)
    except OSError as error:
        follows = "kept kernels serve until the source changes" if kept else follows
        follows += "; try: install g++ 12 or newer, or name a compiler in ZIGZAG_COMPILER"
        found = one_line(str(error))
        yield Finding(what="compiler", state=State.NOTE, found=found, follows=follows)
        vectors = ""
    else:
        yield Finding(what="compiler", found=f"{toolchain.version}, C++17 and OpenMP")
        vectors = f", {toolchain.vectors} on this CPU"
    if kept:
        yield Finding(what="CPU kernels", found=f"built{vectors}: {kept[0].parent}")
    elif vectors:
        yield Finding(what="CPU kernels", found=f"not built{vectors}", follows=BUILDS)


def check_gpu() -> Iterator[Finding]:
    """Check the CUDA device, Triton for it, and that CPU memory can be pinned."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    driver = re.search(r"\b\d+\.\d+(\.\d+)?\b", " ".join(read_lines(DRIVER)[:1]))
    if not available:
        yield _lacking_gpu(driver is not None, [str(warning.message) for warning in told])
        return
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError as error:
        found = one_line(str(error))
        yield Finding(what="CUDA device", state=State.FAIL, found=found, follows=HIDE_GPU)
        return
    found = (
        f"{torch.cuda.get_device_name()}, {format_bytes(free)} free of {format_bytes(total)},"
        f" driver {driver.group() if driver else 'unknown'}"
    )
    others = torch.cuda.device_count() - 1
    follows = f"other devices are not used: {others}" if others else ""
    yield Finding(what="CUDA device", found=found, follows=follows)
    yield _check_triton()
    yield _check_pinning()


def _lacking_gpu(has_driver: bool, told: list[str]) -> Finding:
    follows = "the CPU computes"
    if told:
        found = one_line(told[0])
    elif os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        found = "hidden by CUDA_VISIBLE_DEVICES"
    elif has_driver and torch.version.cuda is None:
        found = "a driver, but this torch is built for the CPU only"
        follows += "; try: install torch with CUDA"
    else:
        found = "none"
    return Finding(what="CUDA device", state=State.NOTE, found=found, follows=follows)


def _check_triton() -> Finding:
    if gpu_kernels() is not None:
        return Finding(what="Triton", found="compiles the GPU's kernels")
    return Finding(
        what="Triton",
        state=State.NOTE,
        found="cannot compile for this GPU, see the warning",
        follows="packed weights and caches are slower on it; try: pip install triton, and gcc",
    )


def _check_pinning() -> Finding:
    most, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if most == resource.RLIM_INFINITY else format_bytes(most)
    found = f"{format_bytes(PINNED_BYTES)} for a test; ulimit -l is {limit}"
    try:
        torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        follows = "copies to the GPU need it; try: ulimit -l unlimited"
        found = one_line(f"refused: {error}; {found}")
        return Finding(what="pinned memory", state=State.FAIL, found=found, follows=follows)
    return Finding(what="pinned memory", found=found)


def check_offload_dir(folder: Path) -> Iterator[Finding]:
    """Check that a folder, or the one that it will be made in, is a disk that can be written."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    what, mount, kind = "offload folder", mount_of(folder), memory_file_system(folder)
    system = f"{mount.kind} on {mount.source}" if mount else "an unknown file system"
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".zigzag-doctor-") as file:
            is_direct = _writes_directly(Path(file.name))
        free = shutil.disk_usage(existing).free
    except (OSError, RunError) as error:
        found = one_line(f"{folder}, {system}: {error}")
        follows = "try: another --offload-dir"
        yield Finding(what=what, state=State.FAIL, found=found, follows=follows)
        return
    found = f"{folder.resolve()}, {system}, {format_bytes(free)} free"
    if kind is not None:
        follows = f"its files are memory ({kind}); try: an --offload-dir on a disk"
        yield Finding(what=what, state=State.NOTE, found=found, follows=follows)
    else:
        yield Finding(what=what, found=found)
    if is_direct:
        yield Finding(what="direct I/O", found="reads and writes pass by the page cache")
    else:
        follows = "reads and writes go through the page cache, slower; try: another --offload-dir"
        yield Finding(what="direct I/O", state=State.NOTE, found="none there", follows=follows)


def _writes_directly(path: Path) -> bool:
    """Write and read a page; returns whether that was direct."""
    with DirectFile(path, writable=True, num_threads=1) as file:
        page = aligned_buffer(PAGE_BYTES)
        file.write_from(page, 0)
        file.read_into(page, 0)
        return file.is_direct


def check_profile(offload_dir: Path) -> Finding:
    """Check whether this machine's profile was measured and kept."""
    path = kept_profile(offload_dir)
    if path is None:
        follows = "every run without --hardware measures this machine, in some 20 s"
        found = "no folder can keep one"
    elif not path.exists():
        follows = "the first run without --hardware measures this machine, in some 20 s"
        return Finding(what="kept profile", found="none yet", follows=follows)
    else:
        try:
            return Finding(what="kept profile", found=f"{HardwareProfile.load(path).date}: {path}")
        except InputError as error:
            follows, found = "the next run without --hardware measures again", str(error)
    return Finding(what="kept profile", state=State.NOTE, found=found, follows=follows)
