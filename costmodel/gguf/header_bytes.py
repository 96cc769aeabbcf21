"""The bytes of a GGUF header, from its start to its end, within bounds."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import BinaryIO

from profiles.errors import InputError
from profiles.units import MIB

# The largest vocabularies take some 30 MB.
MAX_HEADER_BYTES = 256 * MIB
# How much is read at once: a vocabulary has hundreds of thousands of short texts.
_PART_BYTES = MIB // 4
_LENGTH = struct.Struct("<Q")


class HeaderBytes:
    """Reads a file in large parts, and takes numbers and texts out of them.

    Nothing is allocated for more than the file has.

    Parameters
    ----------
    file
        Opened for bytes.
    path
        The file, for messages.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        self._file = file
        self._label = f"GGUF file {path.name}"
        self._part = b""
        # Where the part begins in the file, and where the next byte is in the part.
        self._begin = 0
        self._at = 0

    @property
    def position(self) -> int:
        """Bytes that have been taken."""
        return self._begin + self._at

    def left(self) -> int:
        """Return how many bytes a header may still have."""
        return min(self.file_bytes, MAX_HEADER_BYTES) - self.position

    def take(self, count: int) -> bytes:
        """Take the next bytes.

        Raises
        ------
        InputError
            Where the header has no more; also by all other methods.
        """
        self._need(count)
        self._at += count
        return self._part[self._at - count : self._at]

    def number(self, layout: str) -> int:
        """Take an integer, by its letter in ``struct``."""
        (number,) = struct.unpack(f"<{layout}", self.take(struct.calcsize(layout)))
        return int(number)

    def text(self, most: int = MAX_HEADER_BYTES) -> bytes:
        """Take a text of at most some bytes, with its length before it."""
        length = self.number("Q")
        if length > most:
            raise self.error(f"a text of {length} bytes", f"at most {most}")
        return self.take(length)

    def texts(self, count: int) -> tuple[str, ...]:
        """Take texts; what is no UTF-8 is replaced, as a token may be a part of a character."""
        found: list[str] = []
        while len(found) < count:
            self._take_whole(found, count)
            if len(found) < count:
                # The next one is not whole in this part of the file.
                found.append(self.text().decode("utf-8", "replace"))
        return tuple(found)

    def _take_whole(self, found: list[str], count: int) -> None:
        """Append texts up to ``count``, as long as they are whole in the part at hand.

        Local names and no calls: this is most of the time that a model takes to open.
        """
        part, at, end = self._part, self._at, len(self._part)
        unpack = _LENGTH.unpack_from
        while len(found) < count and at + 8 <= end:
            past = at + 8 + unpack(part, at)[0]
            if past > end:
                break
            found.append(part[at + 8 : past].decode("utf-8", "replace"))
            at = past
        self._at = at

    def _need(self, count: int) -> None:
        """Read on, so that the part at hand has the next ``count`` bytes."""
        if count > self.left():
            raise self.error(
                f"a header beyond byte {self.position + self.left()}",
                f"one within the file and {MAX_HEADER_BYTES} bytes",
                "download the file again",
            )
        missing = count - (len(self._part) - self._at)
        if missing <= 0:
            return
        read = self._file.read(max(missing, _PART_BYTES))
        if len(read) < missing:
            raise self.error("an end within the header", "a file that does not change")
        self._begin += self._at
        self._part = self._part[self._at :] + read
        self._at = 0

    def error(self, got: str, allowed: str, hint: str = "") -> InputError:
        """Make the error for a file."""
        return InputError(self._label, got=got, allowed=allowed, hint=hint)
