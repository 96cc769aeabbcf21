"""The control groups that hold this process, of version 1 and 2, and the cores that they leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from profiles.mounts import mounts, read_lines

# Version 1 writes "no limit" as the largest whole number of pages in 63 bits.
_UNLIMITED = 2**62


def group_folders(controller: str, root: Path = Path("/")) -> Iterator[tuple[str, Path]]:
    """Yield ``cgroup`` or ``cgroup2`` and the folder of each group that may limit this process.

    These are its own group and those above it. Both versions are read, as a machine may mount both.

    Parameters
    ----------
    controller
        Such as ``memory``.
    root
        Folder that stands for ``/``, so that a test can bring its own tree.
    """
    groups = _own_groups(controller, root)
    for kind, mount_root, mount_point in _mounts_of(controller, root):
        if kind in groups:
            point = root / mount_point.lstrip("/")
            for folder in _folders_upwards(groups[kind], mount_root, point):
                yield kind, folder


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many cores the control groups let this process use; ``None`` for no limit."""
    quotas = []
    for kind, folder in group_folders("cpu", root):
        if kind == "cgroup2":
            words = " ".join(read_lines(folder / "cpu.max")).split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            words = [" ".join(read_lines(folder / name)).strip() for name in names]
        # "max" and -1 stand for no limit.
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def number(path: Path) -> int | None:
    """Return a file's number; ``None`` for no limit, or where it cannot be read."""
    text = " ".join(read_lines(path)).strip()
    if not text.isdigit() or int(text) >= _UNLIMITED:
        return None
    return int(text)


def numbers(path: Path) -> Mapping[str, int]:
    """Return the numbers of a file of names and numbers."""
    pairs = (line.split()[:2] for line in read_lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _own_groups(controller: str, root: Path) -> dict[str, str]:
    """Return the process's path in each hierarchy that may limit it, by mount type."""
    groups = {}
    for line in read_lines(root / "proc/self/cgroup"):
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        hierarchy, controllers, path = parts
        if controller in controllers.split(","):
            groups["cgroup"] = path
        elif hierarchy == "0" and not controllers:
            groups["cgroup2"] = path
    return groups


def _mounts_of(controller: str, root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield type, root and mount point of the hierarchies that may limit the process."""
    found = False
    for mount in mounts(root):
        if mount.kind == "cgroup2" or (mount.kind == "cgroup" and controller in mount.options):
            found = True
            yield mount.kind, mount.root, mount.point
    if not found:
        yield "cgroup", "/", f"/sys/fs/cgroup/{controller}"
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
