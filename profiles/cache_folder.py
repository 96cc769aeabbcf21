"""Where this program keeps what it need not make again: compiled kernels, this machine's profile.

A library found there is loaded, so that a folder counts only where no other user can write.
"""

from __future__ import annotations

import logging
import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

NAME = "zigzag"


@cache
def warn_once(text: str) -> None:
    """Log a warning the first time only."""
    logger.warning("%s", text)


def cache_folder() -> Path | None:
    """Return the folder to keep things in, made if need be.

    ``None``, with a warning, where no place can be written; nothing is kept then.
    """
    return next(cache_folders(), None)


def cache_folders() -> Iterator[Path]:
    """Make and yield all places that can be written; warns where that is not the preferred one."""
    reasons = [] if _own_cache() else ["no home folder is known"]
    for folder in _candidates():
        reason = _make(folder) or why_untrusted(folder) or _why_not_writable(folder)
        if reason is not None:
            reasons.append(reason)
            continue
        if reasons:
            warn_once(f"the cache is in {folder}: {'; '.join(reasons)}")
            reasons.clear()
        yield folder
    if reasons:
        warn_once(f"no more places for a cache: {'; '.join(reasons)}; try: set XDG_CACHE_HOME")


def readable_folders() -> list[Path]:
    """Return the folders that exist and that no other user can write, the preferred first."""
    return [folder for folder in _candidates() if why_untrusted(folder) is None]


def why_untrusted(path: Path) -> str | None:
    """Return why a file or folder may hold what another user wrote; ``None`` where it cannot.

    Its owner is this user or root, and nobody else may write.
    """
    try:
        found, link = path.stat(), path.lstat()
    except OSError as error:
        return f"{path}: {error.strerror}"
    # Who owns a link may make it point elsewhere.
    return why_not_own(path, link) or why_not_own(path, found)


def why_not_own(path: Path, found: os.stat_result) -> str | None:
    """Judge a file or folder as ``why_untrusted`` does, by the status of what was opened."""
    if found.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to another user"
    if not stat.S_ISLNK(found.st_mode) and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by other users"
    return None


def _candidates() -> Iterator[Path]:
    """Yield the places for a cache: the user's own, then a private one for temporary files."""
    own = _own_cache()
    if own is not None:
        yield own
    try:
        yield Path(tempfile.gettempdir(), f"{NAME}-{os.geteuid()}")
    except FileNotFoundError as error:
        logger.info("no folder for temporary files: %s", error)


def _own_cache() -> Path | None:
    # The XDG specification has relative paths ignored.
    bases = (Path(os.environ.get("XDG_CACHE_HOME", "")), Path(_home(), ".cache"))
    return next((base / NAME for base in bases if base.is_absolute()), None)


def _home() -> str:
    """Return the user's home folder, empty where neither HOME nor the list of users names one."""
    try:
        return os.environ.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return ""


def _make(folder: Path) -> str | None:
    """Make a folder that only this user can write; returns why that is not possible."""
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        found = folder.lstat()
        if found.st_uid == os.geteuid() and stat.S_ISDIR(found.st_mode) and found.st_mode & 0o022:
            # An older version made it as the user's umask had it.
            folder.chmod(stat.S_IMODE(found.st_mode) & ~0o022)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None


def _why_not_writable(folder: Path) -> str | None:
    # A full disk and a mount for reading only are found by writing alone.
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(b"\0")
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None
