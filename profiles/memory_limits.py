"""How much memory this process may use: installed, available, and what its cgroup allows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

# Version 1 writes "no limit" as the largest whole number of pages in 63 bits.
_UNLIMITED = 2**62
_LIMIT_FILES = {"cgroup": "memory.limit_in_bytes", "cgroup2": "memory.max"}


def usable_memory_bytes(root: Path = Path("/")) -> int:
    """Return the least of installed memory, available memory and the cgroup's limit."""
    memory = psutil.virtual_memory()
    limit = cgroup_limit_bytes(root)
    usable = min(int(memory.total), int(memory.available))
    return usable if limit is None else min(usable, limit)


def cgroup_limit_bytes(root: Path = Path("/")) -> int | None:
    """Return the tightest memory limit on this process's cgroup and those above it.

    Both versions are read, as a machine may mount both. ``None`` where nothing is limited.

    Parameters
    ----------
    root
        Folder that stands for ``/``, so that a test can bring its own tree.
    """
    groups = _own_groups(root)
    limits = [
        limit
        for kind, mount_root, mount_point in _memory_mounts(root)
        if kind in groups
        for folder in _folders_upwards(groups[kind], mount_root, root / mount_point.lstrip("/"))
        if (limit := _read_limit(folder / _LIMIT_FILES[kind])) is not None
    ]
    return min(limits, default=None)


def _own_groups(root: Path) -> dict[str, str]:
    """Return the process's path in each hierarchy that may limit memory, by mount type."""
    groups = {}
    for line in _lines(root / "proc/self/cgroup"):
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
    """Yield type, root and mount point of the hierarchies that may limit memory.

    See proc(5), ``/proc/pid/mountinfo``: optional fields end at a lone dash.
    """
    found = False
    for line in _lines(root / "proc/self/mountinfo"):
        left, dash, right = line.partition(" - ")
        mount, system = left.split(), right.split()
        if not dash or len(mount) < 5 or not system:
            continue
        is_memory = system[0] == "cgroup2" or (
            system[0] == "cgroup" and "memory" in system[-1].split(",")
        )
        if is_memory:
            found = True
            yield system[0], _unescape(mount[3]), _unescape(mount[4])
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


def _read_limit(path: Path) -> int | None:
    text = " ".join(_lines(path)).strip()
    if not text.isdigit() or int(text) >= _UNLIMITED:
        return None
    return int(text)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        # Most machines have only some of these files; what is not there limits nothing.
        return []


def _unescape(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), path)
