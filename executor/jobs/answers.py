"""The file of answers, which grows by whole lines as requests end."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from executor.jobs.journal import Journal, append, hash_of
from profiles.errors import RunError, one_line
from profiles.outputs import OutputFile

# Seconds between two waits for the disk.
SYNC_S = 1.0


class AnswerFile:
    """Answers in a plain file, in the order in which they come. A context manager.

    An earlier file stays as it is until the first answer.

    Parameters
    ----------
    path
        The file, which may be absent.
    journal
        From ``Journal.read``, to go on with what is recorded there; ``None`` for a new job.

    Attributes
    ----------
    lines
        The lines of the job that have an answer, in the order of the file.
    num_dropped
        Recorded answers that are no longer in the file.
    """

    def __init__(self, path: Path, journal: Journal | None = None) -> None:
        self.path = path
        self.lines = array("I")
        self.num_dropped = 0
        self._journal = journal
        # Of each answer, where it is in the file, and its bytes.
        self._begins, self._sizes = array("Q"), array("Q")
        self._file = -1
        self._synced_s = 0.0
        if journal is not None:
            with self._told():
                self._find_recorded(journal)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.fsync(self._file)
            os.close(self._file)
            self._file = -1
        if self._journal is not None:
            if not self.lines:
                self._journal.remove()
            self._journal.close()

    @property
    def num_done(self) -> int:
        """Answers in the file."""
        return len(self.lines)

    @property
    def kept_in(self) -> Path:
        """The file with the answers."""
        return self.path

    @property
    def can_go_on(self) -> bool:
        """Whether a later run can go on with the job."""
        return self._journal is not None and self._journal.is_there

    def begin(self, manifest: dict[str, Any]) -> None:
        """Begin the journal of a new job; raises ``RunError`` where it cannot be written."""
        if self._journal is None:
            self._journal = Journal.create(self.path, manifest)

    def add(self, answers: Iterable[tuple[int, str]]) -> None:
        """Append the answers of some lines; raises ``RunError``, with none of them in the file."""
        assert self._journal is not None
        found = [(line, f"{text}\n".encode(errors="backslashreplace")) for line, text in answers]
        with self._told():
            self._open()
            append(self._file, b"".join(data for _, data in found), self._size)
            try:
                self._journal.add(found)
            except BaseException:
                # Without a record it would be made again.
                os.ftruncate(self._file, self._size)
                raise
        for line, data in found:
            self._begins.append(self._size)
            self._sizes.append(len(data))
            self.lines.append(line)
        if time.monotonic() - self._synced_s > SYNC_S:
            self._sync()

    def complete(self, *, keeps_order: bool) -> None:
        """Finish the file of a job that has ended, in the order of the lines where asked."""
        assert self._journal is not None
        self._open()
        self._sync()
        order = self.lines.tolist()
        if keeps_order and order != sorted(order):
            self._rewrite(sorted(range(len(order)), key=order.__getitem__))
        self._journal.remove()

    @property
    def _size(self) -> int:
        """Bytes of the file up to the end of the last answer."""
        return self._begins[-1] + self._sizes[-1] if self.lines else 0

    def _open(self) -> None:
        """Open the file, without what is not an answer in it."""
        if self._file >= 0:
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with self._told():
            self._file = os.open(self.path, flags, 0o666)
            if self._size > sum(self._sizes):
                # Something between the answers goes.
                self._rewrite(range(len(self.lines)))
                os.close(self._file)
                self._file = os.open(self.path, flags, 0o666)
                for place, size in enumerate(self._sizes[:-1]):
                    self._begins[place + 1] = self._begins[place] + size
            os.ftruncate(self._file, self._size)

    def _sync(self) -> None:
        assert self._journal is not None
        with self._told():
            os.fsync(self._file)
            self._journal.sync()
        self._synced_s = time.monotonic()

    def _find_recorded(self, journal: Journal) -> None:
        """Find the answers that the journal knows, each once."""
        left = {key: lines[::-1] for key, lines in journal.recorded.items()}
        position = 0
        for data in _lines_of(self.path):
            if lines := left.get((len(data), hash_of(data))):
                self.lines.append(lines.pop())
                self._begins.append(position)
                self._sizes.append(len(data))
            position += len(data)
        self.num_dropped = sum(map(len, left.values()))

    def _rewrite(self, places: Iterable[int]) -> None:
        """Write the file anew with these of its answers, in this order."""
        # Where the file cannot be replaced, it is written in place, so they are copied first.
        with self._told(), tempfile.TemporaryFile() as copy:
            for place in places:
                copy.write(os.pread(self._file, self._sizes[place], self._begins[place]))
            copy.flush()
            OutputFile(self.path).write(lambda handle: _copy(copy, handle.buffer))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(one_line(f"write of {self.path}: {error.strerror}")) from error


def _copy(source: IO[bytes], handle: Any) -> None:
    source.seek(0)
    shutil.copyfileobj(source, handle)


def _lines_of(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as handle:
            yield from handle
    except FileNotFoundError:
        return
