"""Files that appear whole or not at all, and the leftovers of a killed process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from profiles.errors import RunError, one_line

# Writes a file's content.
Render = Callable[[io.TextIOWrapper], object]
# Leftovers are found and removed by these names, so no other file may have one like them. A name of
# fixed length fits wherever the file's own name fits.
TEMPORARY_PREFIX, TEMPORARY_SUFFIX = ".zigzag-", ".part"


def write_whole(path: Path, render: Render) -> None:
    """Write a text file that appears under ``path`` only when all of it is there.

    Raises
    ------
    RunError
        With the file and the reason, if it cannot be written.
    """
    try:
        replace_file(path, render)
    except OSError as error:
        raise RunError(one_line(f"write of {path}: {error.strerror}")) from error


def replace_file(path: Path, render: Render) -> None:
    """Do what ``write_whole`` does, but raise the ``OSError`` itself.

    First removes leftovers of a killed process.
    """
    path = Path(path)
    _remove_leftovers(path)
    descriptor, temporary = _open_temporary(path)
    try:
        # The other descriptor holds the lock until the file has its name.
        write_synced(os.dup(descriptor), render)
        temporary.replace(path)
    except BaseException:
        # The folder may be gone, too.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(descriptor)


def write_synced(descriptor: int, render: Render) -> None:
    """Write a text file to a descriptor, up to the disk, and close the descriptor."""
    with text_file(descriptor) as handle:
        render(handle)
        handle.flush()
        os.fsync(descriptor)


def text_file(descriptor: int) -> io.TextIOWrapper:
    """Return a descriptor as a UTF-8 text file that owns it.

    Halves of surrogate pairs, from names that are not UTF-8, are written as JSON escapes.
    """
    return os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace")


def check_creating(path: Path) -> None:
    """Raise ``OSError`` unless a file that is not empty can be made beside ``path``."""
    descriptor, temporary = _open_temporary(path)
    try:
        # A full disk still takes empty files.
        os.write(descriptor, bytes(4096))
    finally:
        os.close(descriptor)
        temporary.unlink()


def _prefix(path: Path) -> str:
    return TEMPORARY_PREFIX + hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]


def _open_temporary(path: Path) -> tuple[int, Path]:
    """Make a file beside ``path`` and lock it. The lock tells others that it is in use."""
    try:
        old = path.stat()
    except OSError:
        old = None
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    while True:
        temporary = path.parent / f"{_prefix(path)}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
        descriptor = os.open(temporary, flags, 0o666 if old is None else 0o600)
        # Without locks nobody removes leftovers, and nothing else is lost.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if old is not None:
            try:
                _take_permissions(descriptor, old)
            except OSError:
                os.close(descriptor)
                temporary.unlink(missing_ok=True)
                raise
        # Another process may have taken it for a leftover just before.
        if os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)


def _take_permissions(descriptor: int, old: os.stat_result) -> None:
    """Give a new file the group and the mode of the file that it replaces.

    Raises ``PermissionError`` where this user cannot give it the group.
    """
    if os.fstat(descriptor).st_gid != old.st_gid:
        try:
            os.fchown(descriptor, -1, old.st_gid)
        except OSError as error:
            raise PermissionError(errno.EPERM, "its group cannot be kept") from error
    # Some file systems have one mode for all files.
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def _remove_leftovers(path: Path) -> None:
    # Some folders can be written and not listed.
    with contextlib.suppress(OSError):
        for other in path.parent.iterdir():
            if other.name.startswith(_prefix(path)) and other.suffix == TEMPORARY_SUFFIX:
                remove_leftover(other)


def remove_leftover(path: Path, *, unless: Path | None = None) -> None:
    """Remove a file, unless a live process holds its lock or the file ``unless`` exists."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    # It stays if it is locked, if there are no locks, or if it is another user's.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A file without a name was removed meanwhile. Another file may have its name by now.
        if os.fstat(descriptor).st_nlink and not (unless and unless.exists()):
            path.unlink()
    os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make files created, renamed and removed in a folder survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
