"""The journal of a job: what it is, and which lines have an answer.

It begins with the job as a line of JSON. Then comes a record for each answer: the line that it
answers, its bytes and their hash. An answer counts where it and its record are both there, in
whatever order a power cut has left them. So nothing depends on what reaches the disk first.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from profiles.errors import InputError, RunError, one_line
from profiles.outputs import NO_REPLACING
from profiles.whole_file import replace_file

logger = logging.getLogger(__name__)

SUFFIX = ".job"
VERSION = 1
# Line, bytes of its answer, their hash. A record ends with the hash of these three.
FACTS, RECORD = struct.Struct("<IIQ"), struct.Struct("<IIQQ")
# Of answers by their bytes and hash: the lines that they answer.
Recorded = dict[tuple[int, int], list[int]]


def journal_path(output: Path) -> Path:
    """Return the journal of a file of answers, which is beside it."""
    target = Path(os.path.realpath(output))
    return target.with_name(target.name + SUFFIX)


class Journal:
    """An open journal. No other process may have it open.

    Parameters
    ----------
    descriptor
        Of its file; -1 where there can be none.

    Attributes
    ----------
    manifest
        What the job is.
    recorded
        The records that were there when it was opened.
    is_there
        Whether it has a file.
    """

    def __init__(self, path: Path, descriptor: int, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.recorded: Recorded = {}
        self._file = descriptor
        self.is_there = descriptor >= 0
        self._size = 0 if descriptor < 0 else os.fstat(descriptor).st_size

    @classmethod
    def create(cls, output: Path, manifest: dict[str, Any]) -> Journal:
        """Begin the journal of a file of answers.

        Without one the job runs all the same, where the folder takes no new file.

        Raises
        ------
        InputError
            Where there is a journal already.
        RunError
            Where it cannot be written.
        """
        path = journal_path(output)
        refuse_unfinished(output)
        line = json.dumps({"zigzag_job": VERSION, **manifest})
        try:
            replace_file(path, lambda handle: handle.write(line + "\n"))
            return cls(path, _open_locked(path), manifest)
        except OSError as error:
            if error.errno not in NO_REPLACING:
                told = f"write of {path}: {error.strerror}"
                raise RunError(one_line(told)) from error
            logger.warning("%s: %s; the job runs, and --resume cannot go on with it", path, error)
            return cls(path, -1, manifest)

    @classmethod
    def read(cls, output: Path) -> Journal:
        """Open the journal of a file of answers, to go on; raises ``InputError`` without one."""
        path = journal_path(output)
        try:
            descriptor = _open_locked(path)
        except OSError as error:
            raise InputError(
                f"--resume: {path}",
                got=error.strerror,
                allowed="the journal of a job that has not ended",
                hint="the command without --resume, which begins anew",
            ) from None
        with os.fdopen(os.dup(descriptor), "rb") as handle:
            handle.seek(0)
            first, rest = handle.readline(), handle.read()
        try:
            manifest = json.loads(first)
            is_known = manifest.pop("zigzag_job") == VERSION
        except (ValueError, KeyError, AttributeError, TypeError):
            is_known = False
        if not is_known:
            os.close(descriptor)
            allowed = "a journal of this version"
            raise InputError(f"--resume: {path}", got="another file", allowed=allowed)
        journal = cls(path, descriptor, manifest)
        # A torn record at the end would shift those that follow.
        journal._size = len(first) + len(rest) // RECORD.size * RECORD.size
        os.ftruncate(descriptor, journal._size)
        for record in RECORD.iter_unpack(rest[: journal._size - len(first)]):
            line, size, hashed, check = record
            if check == hash_of(FACTS.pack(line, size, hashed)):
                lines = journal.recorded.setdefault((size, hashed), [])
                if line not in lines:
                    lines.append(line)
        return journal

    def add(self, answers: Iterable[tuple[int, bytes]]) -> None:
        """Record the answers of some lines; raises ``OSError``."""
        if self._file < 0:
            return
        facts = [FACTS.pack(line, len(data), hash_of(data)) for line, data in answers]
        data = b"".join(each + hash_of(each).to_bytes(8, "little") for each in facts)
        append(self._file, data, self._size)
        self._size += len(data)

    def sync(self) -> None:
        """Wait for the disk."""
        if self._file >= 0:
            os.fsync(self._file)

    def close(self) -> None:
        """Close it, so that a later process can go on."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Remove it: there is nothing to go on with."""
        if self._file >= 0:
            self.path.unlink(missing_ok=True)
            self.is_there = False
            self.close()


def refuse_unfinished(output: Path) -> None:
    """Refuse to begin anew where a job has not ended; raises ``InputError``."""
    path = journal_path(output)
    if path.exists():
        raise InputError(
            f"--output {output}",
            got=f"the answers of a job that has not ended, by its journal {path.name}",
            allowed="another file, or --resume to go on",
            hint=f"rm {path}, to begin anew",
        )


def hash_of(data: bytes) -> int:
    """Return 64 bits that tell bytes from others."""
    return xxhash.xxh3_64(data).intdigest()


def append(descriptor: int, data: bytes, size: int) -> None:
    """Append bytes to a file of ``size`` bytes: all of them, or none and an ``OSError``."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except BaseException:
        os.ftruncate(descriptor, size)
        raise


def _open_locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(
            f"journal {path}", got="one in use", allowed="one process at a time"
        ) from None
    except OSError:
        # Some file systems have no locks.
        return descriptor
    return descriptor
