"""What is mounted where, and which folders keep their files in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MEMORY_TYPES = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
_MEMORY_DEVICES = ("/dev/ram", "/dev/zram")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One mount, as proc(5) describes it under ``/proc/pid/mountinfo``.

    Parameters
    ----------
    root
        Folder of the file system that is mounted.
    point
        Where it is seen.
    kind, source, options
        Type of the file system, what is mounted, and the options of the file system.
    """

    root: str
    point: str
    kind: str
    source: str
    options: tuple[str, ...]


def mounts(root: Path = Path("/")) -> Iterator[Mount]:
    """Yield what is mounted; ``root`` stands for ``/``, so that a test can bring its own tree."""
    for line in read_lines(root / "proc/self/mountinfo"):
        # Optional fields end at a lone dash.
        left, dash, right = line.partition(" - ")
        mount, system = left.split(), right.split()
        if not dash or len(mount) < 5 or not system:
            continue
        yield Mount(
            root=_unescape(mount[3]),
            point=_unescape(mount[4]),
            kind=system[0],
            source=_unescape(system[1]) if len(system) > 2 else "",
            options=tuple(map(_unescape, system[-1].split(","))),
        )


def mount_of(folder: Path, root: Path = Path("/")) -> Mount | None:
    """Return the mount that holds a folder, which need not exist yet; ``None`` if none is known.

    Device numbers do not serve: files of a btrfs subvolume have another than its mount.
    """
    path = Path(os.path.realpath(folder))
    holders = [mount for mount in mounts(root) if path.is_relative_to(mount.point)]
    # Of several at one place, the last hides the others.
    return max(reversed(holders), key=lambda mount: len(mount.point), default=None)


def memory_file_system(folder: Path, root: Path = Path("/")) -> str | None:
    """Return the type of a folder's file system where its files are memory, such as ``tmpfs``.

    The folder need not exist yet. ``None`` where its files are on a disk, or nothing is known.
    """
    mount = mount_of(folder, root)
    if mount is None:
        return None
    if mount.kind in _MEMORY_TYPES or mount.source.startswith(_MEMORY_DEVICES):
        return mount.kind
    upper = next((o for o in mount.options if o.startswith("upperdir=")), None)
    if mount.kind != "overlay" or upper is None:
        return None
    # A container does not see that folder, and then nothing is known.
    path = Path(upper.removeprefix("upperdir="))
    return memory_file_system(path, root) if path.exists() else None


def read_lines(path: Path) -> list[str]:
    """Return a system file's lines; none where it cannot be read, as most are not everywhere."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)
