"""Files that appear whole or not at all, and what a killed process leaves of them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from profiles.errors import RunError, one_line

# Writes a file's content.
Render = Callable[[io.TextIOWrapper], object]
# Peculiar, because leftovers are found, and removed, by their names. A name of fixed length has
# room wherever the file's own name has.
TEMPORARY_PREFIX, TEMPORARY_SUFFIX = ".zigzag-", ".part"


def write_whole(path: Path, render: Render) -> None:
    """Write a text file that appears under ``path`` only when all of it is there.

    Raises
    ------
    RunError
        With the file and the reason, where it cannot be written.
    """
    try:
        with replacing(path) as handle:
            render(handle)
    except OSError as error:
        raise RunError(one_line(f"write of {path}: {error.strerror}")) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a text file that appears under ``path`` only when the block ends without an error.

    What a killed process has left of the same file is removed first.
    """
    path = Path(path)
    _remove_leftovers(path)
    descriptor, temporary = _open_temporary(path)
    try:
        with text_file(descriptor) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
            # Closing ends the lock, so it has its name before that.
            temporary.replace(path)
    except BaseException:
        # What went wrong may have taken the folder, too.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def text_file(descriptor: int) -> io.TextIOWrapper:
    """Return a descriptor as a UTF-8 text file that owns it.

    Halves of surrogate pairs, from names that are not UTF-8, become what JSON writes for them.
    """
    return os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace")


def check_creating(path: Path) -> None:
    """Raise ``OSError`` unless a file with something in it can be made beside ``path``."""
    descriptor, temporary = _open_temporary(path)
    try:
        # A full disk still makes empty files.
        os.write(descriptor, bytes(4096))
    finally:
        os.close(descriptor)
        temporary.unlink()


def _prefix(path: Path) -> str:
    return TEMPORARY_PREFIX + hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]


def _open_temporary(path: Path) -> tuple[int, Path]:
    """Make a file beside ``path`` and hold its lock, by which others know that it is in use."""
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
    # A folder may be one that can be written and not listed.
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
    # Where it is held, where there are no locks, or where it is another user's, it stays.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A file without a name was removed meanwhile, and its name may be another's by now.
        if os.fstat(descriptor).st_nlink and not (unless and unless.exists()):
            path.unlink()
    os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make what was created, renamed and removed in a folder survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
