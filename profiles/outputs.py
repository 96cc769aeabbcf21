"""The output files of a command. Content that cannot be written is rescued to another folder.

A plain file is replaced as a whole, and a symbolic link stays one. A file is written in place if
it has other names, another owner, a group that cannot be kept, or a folder that takes no new files.
Pipes and devices are written through.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from profiles.errors import RunError, one_line
from profiles.whole_file import Render, replace_file, text_file, write_synced

logger = logging.getLogger(__name__)

STANDARD_STREAMS = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
# Descriptors of standard streams that were closed when the process began, and now lead nowhere.
closed_streams: set[int] = set()
# More links than the kernel follows.
MOST_LINKS = 40
# After these errors, an existing file may still be written in place.
NO_REPLACING = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EBUSY,
    errno.EXDEV,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
}
RESCUE_PREFIX = "zigzag-rescue-"


class OutputError(RunError):
    """A file could not be written; its content is kept elsewhere.

    Parameters
    ----------
    rescue
        The file with the content; ``None`` if no folder took it.
    """

    def __init__(self, path: Path, error: OSError, rescue: Path | None) -> None:
        kept = f"all of it is in {rescue}" if rescue else "no other folder took it either"
        super().__init__(one_line(f"write of {path}: {error.strerror}; {kept}"))
        self.rescue = rescue


class OutputFile:
    """A file to write, perhaps several times.

    Parameters
    ----------
    path
        As the user gave it.

    Attributes
    ----------
    kept_in
        The file with the latest content: ``path``, or the rescue file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept_in: Path | None = None

    def write(self, render: Render) -> None:
        """Write the file anew; ``render`` writes its content to a text file, once or again.

        Raises
        ------
        OutputError
            If that fails.
        """
        try:
            self._write_or_rescue(render)
        except (KeyboardInterrupt, SystemExit):
            # The write is finished first. A stream cannot be written again.
            if is_stream(self.path):
                self.kept_in = _rescue(self.path, render)
                logger.warning("%s was cut off; all of it is in %s", self.path, self.kept_in)
            else:
                self._write_or_rescue(render)
            raise

    def _write_or_rescue(self, render: Render) -> None:
        try:
            _write_file(self.path, render)
            self.kept_in = self.path
        except OSError as error:
            self.kept_in = _rescue(self.path, render)
            raise OutputError(self.path, error, self.kept_in) from error


def write_output(path: Path, render: Render) -> None:
    """Write a file once; see ``OutputFile.write``."""
    OutputFile(Path(path)).write(render)


def is_stream(path: Path) -> bool:
    """Whether a path is a pipe, a device or an open descriptor, which cannot be written anew."""
    if own_descriptor(path) is not None:
        return True
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def own_descriptor(path: Path) -> int | None:
    """Return the descriptor of this process for which a path stands, such as ``/dev/fd/63``.

    Opening such a file anew would overwrite its earlier content from the start.
    """
    for _ in range(MOST_LINKS):
        if str(path) in STANDARD_STREAMS:
            return STANDARD_STREAMS[str(path)]
        folder = os.path.realpath(path.parent)
        if re.fullmatch(rf"/proc/{os.getpid()}(/task/\d+)?/fd", folder) and path.name.isdecimal():
            return int(path.name)
        try:
            path = path.parent / path.readlink()
        except OSError:
            return None
    return None


def open_stream(path: Path) -> int:
    """Open a pipe or a device for writing; a pipe without a reader raises ``OSError``."""
    descriptor = own_descriptor(path)
    if descriptor is not None:
        return os.dup(descriptor)
    flags = os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC
    try:
        # Without a reader, a pipe would wait for one.
        descriptor = os.open(path, flags | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO or not path.is_fifo():
            raise
        raise BrokenPipeError(errno.EPIPE, "nobody reads it") from None
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return descriptor


def spare_folders(path: Path) -> Iterator[Path]:
    """List folders for content of ``path`` that its own folder cannot take."""
    if not is_stream(path):
        yield Path(os.path.realpath(path)).parent
    yield Path()
    yield Path(os.environ.get("TMPDIR") or "/tmp")
    yield Path("/var/tmp")
    # In memory, in case all disks are full.
    yield Path("/dev/shm")


def may_be_replaced(path: Path) -> bool:
    """Whether replacing a plain file changes neither its owner nor its other names."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return True
    return status.st_uid == os.geteuid() and status.st_nlink == 1


def _write_file(path: Path, render: Render) -> None:
    if is_stream(path):
        with text_file(open_stream(path)) as handle:
            render(handle)
        return
    # A symbolic link stays, and its target is written.
    target = Path(os.path.realpath(path))
    if may_be_replaced(target):
        try:
            replace_file(target, render)
            return
        except OSError as error:
            if error.errno not in NO_REPLACING or not target.is_file():
                raise
    write_synced(os.open(target, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC), render)


def _rescue(path: Path, render: Render) -> Path | None:
    """Write a new file in the first folder that takes it, and return its path."""
    name = RESCUE_PREFIX + secrets.token_hex(4) + path.suffix[:16]
    for folder in spare_folders(path):
        rescue = folder / name
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            write_synced(os.open(rescue, flags, 0o600), render)
            return rescue
        except BaseException as error:
            with contextlib.suppress(OSError):
                rescue.unlink()
            if not isinstance(error, OSError):
                raise
    return None
