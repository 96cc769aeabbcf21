"""The lines of an input file: plain, compressed or from a pipe; each can be read again later."""

from __future__ import annotations

import codecs
import gzip
import importlib
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from profiles.errors import InputError

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
PART_BYTES = 2**20
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class InputFile:
    """A file of lines. A context manager.

    What cannot be read twice, a pipe or compressed text, is kept in a temporary file without a
    name. Compression is told by the first bytes, so that a pipe may be compressed, too.

    Parameters
    ----------
    path
        The file, which is open from here on.
    folder
        Where the temporary file may be.

    Raises
    ------
    InputError
        Where the file cannot be read.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = Path(path)
        self._label = f"prompts {path}"
        try:
            self._file = self._open(folder)
        except OSError as error:
            raise self._error(error.strerror or str(error), "a readable file") from None
        self._begin = len(codecs.BOM_UTF8) if self._peek(3) == codecs.BOM_UTF8 else 0

    def __enter__(self) -> InputFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield each line with its first byte's position, without the byte order mark."""
        position = self._begin
        self._file.seek(position)
        for line in self._file:
            yield position, line
            position += len(line)

    def line_at(self, position: int, num_bytes: int) -> bytes:
        """Read a line again."""
        return os.pread(self._file.fileno(), num_bytes, position)

    def _open(self, folder: Path) -> IO[bytes]:
        file: IO[bytes] = self.path.open("rb")
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISCHR(mode) and not file.isatty():
            file.close()
            raise self._error("a device", "a file or a pipe")
        if not stat.S_ISREG(mode):
            with file:
                file = _spooled(_parts_of(file), folder)
        self._file = file
        if self._peek(2) in UTF16:
            hint = f"iconv -f UTF-16 -t UTF-8 {self.path}"
            raise self._error("text in UTF-16", "UTF-8", hint)
        head = self._peek(len(ZSTD))
        if head.startswith(GZIP):
            parts = _parts_of(gzip.GzipFile(fileobj=file))
            return self._unpacked(parts, folder, (EOFError, zlib.error, gzip.BadGzipFile))
        if head == ZSTD:
            make, error = self._zstd()
            return self._unpacked(_unzstd(file, make), folder, (EOFError, error))
        return file

    def _peek(self, count: int) -> bytes:
        return os.pread(self._file.fileno(), count, 0)

    def _unpacked(
        self, parts: Iterator[bytes], folder: Path, errors: tuple[type[Exception], ...]
    ) -> IO[bytes]:
        packed = self._file
        packed.seek(0)
        try:
            with packed:
                return _spooled(parts, folder)
        except errors as error:
            raise self._error(f"broken compressed text ({error})", "a whole file") from None

    def _zstd(self) -> tuple[Callable[[], Any], type[Exception]]:
        """Return what makes a decompressor, and its error."""
        for name in ("compression.zstd", "zstandard"):
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            if name == "zstandard":
                return module.ZstdDecompressor().decompressobj, module.ZstdError
            return module.ZstdDecompressor, module.ZstdError
        raise self._error(
            "zstd, which this Python cannot read",
            "plain text or gzip",
            f"pip install zstandard, or: zstd -dc {self.path} | ... --prompts /dev/stdin",
        )

    def _error(self, got: str, allowed: str, hint: str = "") -> InputError:
        return InputError(self._label, got=got, allowed=allowed, hint=hint)


def _parts_of(file: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    return iter(partial(file.read, PART_BYTES), b"")


def _unzstd(file: IO[bytes], make: Callable[[], Any]) -> Iterator[bytes]:
    """Yield the text of one or more frames; raises ``EOFError`` where the last one is torn."""
    frame = None
    for part in _parts_of(file):
        left = part
        while left:
            frame = frame or make()
            yield frame.decompress(left)
            left = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends early")


def _spooled(parts: Iterator[bytes], folder: Path) -> IO[bytes]:
    """Return a file without a name that can be read anywhere."""
    spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    try:
        for part in parts:
            spool.write(part)
        spool.flush()
    except BaseException:
        spool.close()
        raise
    return spool
