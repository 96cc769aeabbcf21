"""How much memory this process may have now: of the machine, of its control groups, of its limits.

Memory of other processes is subtracted. Memory of this process counts as predictions count it.
Swap never counts.
"""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from profiles.control_groups import group_folders, number, numbers
from profiles.mounts import read_lines

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
        kib = numbers(root / "proc/meminfo")
        if {"CommitLimit:", "Committed_AS:"} <= kib.keys():
            yield (kib["CommitLimit:"] - kib["Committed_AS:"]) * 1024


def group_limit_bytes(root: Path = Path("/")) -> int | None:
    """Return the lowest limit on memory of the control groups; ``None`` for no limit."""
    limits = (_limit(kind, folder) for kind, folder in group_folders("memory", root))
    return min((limit for limit in limits if limit is not None), default=None)


def _free_in_groups(root: Path) -> Iterator[int]:
    """Yield what this process's control group and those above it leave.

    Page cache counts as free, but for what has yet to be written. Files of a tmpfs do not: the
    kernel counts them apart.
    """
    for kind, folder in group_folders("memory", root):
        limit = _limit(kind, folder)
        if limit is not None:
            yield limit - _working_set_bytes(folder, kind)


def _limit(kind: str, folder: Path) -> int | None:
    limits = (number(folder / name) for name in _LIMITS[kind])
    return min((limit for limit in limits if limit is not None), default=None)


def _working_set_bytes(folder: Path, kind: str) -> int:
    stat = numbers(folder / "memory.stat")
    cached, unwritten = (
        sum(stat.get(_PREFIX[kind] + name, 0) for name in names)
        for names in (
            ("inactive_file", "active_file"),
            ("dirty", "writeback") if kind == "cgroup" else ("file_dirty", "file_writeback"),
        )
    )
    return max(0, (number(folder / _USAGE[kind]) or 0) - max(0, cached - unwritten))
