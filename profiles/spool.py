"""Text that is collected in a temporary file until it is wanted."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from profiles.errors import RunError

# Small pieces of text are written together.
PIECE_CHARS = 2**16


class Spool:
    """A growing file without a name. A context manager, after whose block the file is gone.

    A failed write raises nothing. ``copy_into`` raises if no folder had room.

    Parameters
    ----------
    what
        The content, for messages.
    folders
        Where the file may be. The first folder that takes the first piece of text gets all of it.
    """

    def __init__(self, what: str, folders: Iterable[Path]) -> None:
        self._what = what
        self._folders = folders
        self._opened = contextlib.ExitStack()
        self._pending: list[str] = []
        self._pending_chars = 0
        self._file: IO[bytes] | None = None
        self._is_lost = False

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def write(self, text: str) -> None:
        """Add text to the end."""
        if self._is_lost:
            return
        self._pending.append(text)
        self._pending_chars += len(text)
        if self._pending_chars >= PIECE_CHARS:
            self._flush()

    def copy_into(self, handle: io.TextIOWrapper) -> None:
        """Write all of the text to a file; raises ``RunError`` if a part of it was lost."""
        self._flush()
        if self._is_lost or self._file is None:
            raise RunError(f"{self._what}: no folder has room for it")
        self._file.seek(0)
        shutil.copyfileobj(self._file, handle.buffer)

    def _flush(self) -> None:
        data = "".join(self._pending).encode()
        self._pending.clear()
        self._pending_chars = 0
        if self._is_lost:
            return
        if self._file is None:
            self._file = self._begin(data)
            self._is_lost = self._file is None
        else:
            self._is_lost = not _takes(self._file, data)

    def _begin(self, data: bytes) -> IO[bytes] | None:
        """Return a file with ``data`` in it, or ``None`` if no folder has room for it."""
        for folder in self._folders:
            with contextlib.suppress(OSError):
                # Without a buffer, closing cannot fail. ``__exit__`` closes it.
                file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
                self._opened.enter_context(file)
                if _takes(file, data):
                    return file
        return None


def _takes(file: IO[bytes], data: bytes) -> bool:
    """Add bytes to a file; returns whether there was room for all of them."""
    rest = memoryview(data)
    with contextlib.suppress(OSError):
        while rest:
            rest = rest[file.write(rest) :]
    return not rest
