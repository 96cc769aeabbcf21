"""How much memory this process may have now: of the machine, of its control groups, of its limits.

Memory of other processes is subtracted. Memory of this process counts as predictions count it.
Swap never counts.
"""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from profiles.mounts import mounts, read_lines

# Version 1 writes "no limit" as the largest whole number of pages in 63 bits.
_UNLIMITED = 2**62
# Above memory.high a group is not killed, but slowed down until it hardly moves.
_LIMITS = {"cgroup": ("memory.limit_in_bytes",), "cgroup2": ("memory.max", "memory.high")}
_USAGE = {"cgroup": "memory.usage_in_bytes", "cgroup2": "memory.current"}
# Version 1 counts those of a group's children under other names.
_PREFIX = {"cgroup": "total_", "cgroup2": ""}


@dataclass(frozen=True, slots=True)
class Held:
    """What this process holds, in bytes: addresses, resident memory of its own and resident pages
    shared or of files, and addresses of its own."""

    addresses: int
    private: int
    shared: int
    data: int

    @property
    def resident(self) -> int:
        """Everything that is resident."""
        return self.private + self.shared


def held_memory(statm: str = "/proc/self/statm") -> Held:
    """Return what this process holds.

    See proc(5). Every task that computes has it read, so that it must be cheap: without Python's
    own files, it takes a few microseconds.
    """
    descriptor = os.open(statm, os.O_RDONLY)
    try:
        fields = os.read(descriptor, mmap.PAGESIZE).split()
    finally:
        os.close(descriptor)
    size, resident, shared, _, _, data = (int(field) * mmap.PAGESIZE for field in fields[:6])
    return Held(size, resident - shared, shared, data)


def usable_memory_bytes(runtime_bytes: int | None = None, root: Path = Path("/")) -> int:
    """Return the most memory that this process may hold now, with what it holds already.

    Parameters
    ----------
    runtime_bytes
        What an empty process holds. What this one holds beyond it, such as a notebook's data, is
        then not there. ``None`` where everything that it holds will be given back.
    root
        Folder that stands for ``/``, so that a test can bring its own tree.
    """
    memory = psutil.virtual_memory()
    statm = root / "proc/self/statm"
    held = held_memory(str(statm)) if statm.exists() else Held(0, 0, 0, 0)
    foreign = 0 if runtime_bytes is None else max(0, held.resident - runtime_bytes)
    # Pages of files count as free.
    own = max(0, held.private - foreign)
    free = [int(memory.available), *_free_in_groups(root), *_free_in_process(held, root)]
    return min(int(memory.total), max(0, min(free)) + own)


def _free_in_process(held: Held, root: Path) -> Iterator[int]:
    """Yield what the limits on a process's addresses leave (ulimit -v and -d, no overcommit)."""
    for kind, used in ((resource.RLIMIT_AS, held.addresses), (resource.RLIMIT_DATA, held.data)):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield limit - used
    if read_lines(root / "proc/sys/vm/overcommit_memory") == ["2"]:
        kib = _numbers(root / "proc/meminfo")
        if {"CommitLimit:", "Committed_AS:"} <= kib.keys():
            yield (kib["CommitLimit:"] - kib["Committed_AS:"]) * 1024


def _free_in_groups(root: Path) -> Iterator[int]:
    """Yield what this process's control group and those above it leave.

    Both versions are read, as a machine may mount both. Page cache counts as free, but for what
    has yet to be written. Files of a tmpfs do not: the kernel counts them apart.
    """
    groups = _own_groups(root)
    for kind, mount_root, mount_point in _memory_mounts(root):
        if kind not in groups:
            continue
        for folder in _folders_upwards(groups[kind], mount_root, root / mount_point.lstrip("/")):
            limits = [_number(folder / name) for name in _LIMITS[kind]]
            limit = min((found for found in limits if found is not None), default=None)
            if limit is not None:
                yield limit - _working_set_bytes(folder, kind)


def _working_set_bytes(folder: Path, kind: str) -> int:
    stat = _numbers(folder / "memory.stat")
    cached, unwritten = (
        sum(stat.get(_PREFIX[kind] + name, 0) for name in names)
        for names in (
            ("inactive_file", "active_file"),
            ("dirty", "writeback") if kind == "cgroup" else ("file_dirty", "file_writeback"),
        )
    )
    return max(0, (_number(folder / _USAGE[kind]) or 0) - max(0, cached - unwritten))


def _own_groups(root: Path) -> dict[str, str]:
    """Return the process's path in each hierarchy that may limit memory, by mount type."""
    groups = {}
    for line in read_lines(root / "proc/self/cgroup"):
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        number, controllers, path = parts
        if "memory" in controllers.split(","):
            groups["cgroup"] = path
        elif number == "0" and not controllers:
            groups["cgroup2"] = path
    return groups


def _memory_mounts(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield type, root and mount point of the hierarchies that may limit memory."""
    found = False
    for mount in mounts(root):
        if mount.kind == "cgroup2" or (mount.kind == "cgroup" and "memory" in mount.options):
            found = True
            yield mount.kind, mount.root, mount.point
    if not found:
        yield "cgroup", "/", "/sys/fs/cgroup/memory"
        yield "cgroup2", "/", "/sys/fs/cgroup"


def _folders_upwards(group: str, mount_root: str, mount_point: Path) -> Iterator[Path]:
    # In a container the mount shows a subtree, and the group's path may or may not begin there.
    path = PurePosixPath(group)
    if path.is_relative_to(mount_root):
        path = path.relative_to(mount_root)
    elif path.is_absolute():
        path = path.relative_to("/")
    if ".." in path.parts:
        path = PurePosixPath()
    for folder in (path, *path.parents):
        yield mount_point / folder


def _number(path: Path) -> int | None:
    text = " ".join(read_lines(path)).strip()
    if not text.isdigit() or int(text) >= _UNLIMITED:
        return None
    return int(text)


def _numbers(path: Path) -> Mapping[str, int]:
    """Return the numbers of a file of names and numbers."""
    pairs = (line.split()[:2] for line in read_lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
