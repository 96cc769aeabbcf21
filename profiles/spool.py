"""Text that is collected on disk until it is wanted, wherever there is room for it."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from profiles.errors import RunError

# Small pieces of text are written together.
PIECE_CHARS = 2**16
COPIED_BYTES = 2**20


class Spool:
    """A growing file without a name. A context manager, after whose block the file is gone.

    Who writes is never disturbed: where no folder has room, that is told to who reads.

    Parameters
    ----------
    what
        What is collected, for messages.
    folders
        Where it may be, the best first. It moves on where one takes no more.
    """

    def __init__(self, what: str, folders: Iterable[Path]) -> None:
        self._what = what
        self._folders = iter(folders)
        self._pending: list[str] = []
        self._pending_chars = 0
        self._size = 0
        self._file: io.FileIO | None = None
        self._is_lost = False

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, text: str) -> None:
        """Add text to the end."""
        if self._is_lost:
            return
        self._pending.append(text)
        self._pending_chars += len(text)
        if self._pending_chars >= PIECE_CHARS:
            self._flush()

    def copy_into(self, handle: io.TextIOWrapper) -> None:
        """Write all of it to a file; raises ``RunError`` where it is not all there."""
        self._flush()
        if self._is_lost or self._file is None:
            raise RunError(f"{self._what}: no folder has room for it")
        for position in range(0, self._size, COPIED_BYTES):
            handle.buffer.write(self._read(self._file, position))

    def _flush(self) -> None:
        data = "".join(self._pending).encode()
        while self._file is None or not _fits(self._file, data, self._size):
            if not self._move():
                self._is_lost = True
                break
        self._size += len(data)
        self._pending.clear()
        self._pending_chars = 0

    def _move(self) -> bool:
        """Go on in the next folder, with what is there already; returns whether there is one."""
        for folder in self._folders:
            try:
                file = _unnamed(folder)
            except OSError:
                continue
            if self._file is not None:
                if not self._copy(self._file, file):
                    file.close()
                    continue
                self._file.close()
            self._file = file
            return True
        return False

    def _copy(self, source: io.FileIO, target: io.FileIO) -> bool:
        return all(
            _fits(target, self._read(source, position), position)
            for position in range(0, self._size, COPIED_BYTES)
        )

    def _read(self, file: io.FileIO, position: int) -> bytes:
        return os.pread(file.fileno(), min(COPIED_BYTES, self._size - position), position)


def _unnamed(folder: Path) -> io.FileIO:
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        return io.FileIO(os.dup(file.fileno()), "r+b")


def _fits(file: io.FileIO, data: bytes, position: int) -> bool:
    """Write bytes at a position; returns whether the disk took them."""
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(file.fileno(), data[done:], position + done)
    except OSError:
        return False
    return True
