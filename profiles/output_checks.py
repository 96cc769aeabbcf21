"""Refuse outputs that could not be written, or that would destroy something, before any work."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from profiles.errors import InputError
from profiles.outputs import (
    NO_REPLACING,
    closed_streams,
    may_be_replaced,
    open_stream,
    own_descriptor,
)
from profiles.whole_file import check_creating

ALLOWED = "a file in a folder that can be written, a pipe or a device"
REFUSED_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
}
STDOUT = 1
Identity = tuple[int, int] | str


def output_path(text: str) -> Path:
    """Read a flag's value: ``-`` is standard output, and a slash at the end means a folder."""
    if text == "-":
        return Path("/dev/stdout")
    if text.rpartition("/")[2] in ("", ".", ".."):
        raise InputError("output", got=f"{text!r}, which names a folder", allowed=ALLOWED)
    return Path(text)


@contextlib.contextmanager
def checked_outputs(
    outputs: Mapping[str, Path | None], inputs: Mapping[str, Iterable[Path]]
) -> Iterator[None]:
    """Check all files that a command writes, by their flags, and keep pipes open for the block.

    If one is standard output, messages go to standard error.

    Parameters
    ----------
    inputs
        The files that the command reads, by their flags; none of them may be written.

    Raises
    ------
    InputError
        For the first file that cannot be written, with its flag.
    """
    given = {flag: path for flag, path in outputs.items() if path is not None}
    with contextlib.ExitStack() as stack:
        taken: dict[Identity, str] = {}
        for flag, paths in inputs.items():
            taken |= {_identity(path): f"a file of {flag}" for path in paths if path.is_file()}
        for flag, path in given.items():
            descriptor = _check(flag, path)
            if descriptor is not None:
                stack.callback(os.close, descriptor)
            _claim(flag, path, taken)
        if any(own_descriptor(path) == STDOUT for path in given.values()):
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def _check(flag: str, path: Path) -> int | None:
    """Check one file. Returns an open descriptor of a stream, which keeps a pipe from ending."""
    what = f"{flag} {path}"
    try:
        kind = _kind(path)
        if kind in REFUSED_KINDS:
            raise InputError(what, got=REFUSED_KINDS[kind], allowed=ALLOWED)
        if kind is None:
            return _checked_stream(what, path)
        _check_plain(what, Path(os.path.realpath(path)))
    except OSError as error:
        raise InputError(what, got=error.strerror, allowed=ALLOWED) from error
    return None


def _kind(path: Path) -> int | None:
    """Return the kind of a file, a plain one if it is absent, and ``None`` for a stream."""
    if own_descriptor(path) is not None:
        return None
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return stat.S_IFREG
    return None if kind in (stat.S_IFIFO, stat.S_IFCHR) else kind


def _checked_stream(what: str, path: Path) -> int:
    unread = InputError(
        what, got="a pipe that nobody reads", allowed=ALLOWED, hint="starting its reader first"
    )
    if own_descriptor(path) in closed_streams:
        raise InputError(what, got="a stream that is closed", allowed=ALLOWED)
    try:
        descriptor = open_stream(path)
    except BrokenPipeError:
        raise unread from None
    poll = select.poll()
    poll.register(descriptor, 0)
    if any(event & select.POLLERR for _, event in poll.poll(0)):
        os.close(descriptor)
        raise unread
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        os.close(descriptor)
        raise InputError(what, got="a file that is open for reading only", allowed=ALLOWED)
    return descriptor


def _check_plain(what: str, target: Path) -> None:
    if not target.parent.is_dir():
        raise InputError(what, got="no such folder", allowed=ALLOWED)
    exists = target.exists()
    if exists and not os.access(target, os.W_OK, effective_ids=True):
        raise InputError(what, got="a file that cannot be written", allowed=ALLOWED)
    if not may_be_replaced(target):
        return
    try:
        check_creating(target)
    except OSError as error:
        # If the folder takes no new file, an existing one is written in place.
        if not (exists and error.errno in NO_REPLACING):
            raise


def _claim(flag: str, path: Path, taken: dict[Identity, str]) -> None:
    """Refuse a file that is an input or the output of another flag, unless it is a device."""
    is_named = own_descriptor(path) is None
    if is_named and path.is_char_device():
        return
    identity = _identity(path)
    others = taken | (_standard_files() if is_named else {})
    if identity in others:
        raise InputError(f"{flag} {path}", got=others[identity], allowed="another file")
    taken[identity] = f"the file of {flag}"


def _identity(path: Path) -> Identity:
    try:
        status = path.stat()
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def _standard_files() -> dict[Identity, str]:
    """Return the plain files to which the standard streams were redirected."""
    files: dict[Identity, str] = {}
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):
                files[status.st_dev, status.st_ino] = f"the file of standard stream {descriptor}"
    return files
