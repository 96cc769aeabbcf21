"""Checksums of the pages of a file, in a table at its end."""

from __future__ import annotations

import errno
import os

import numpy as np
import xxhash

from profiles.aligned_io import PAGE_BYTES

CHECKSUM_BYTES = 4


def page_checksums(pages: memoryview) -> bytes:
    """Return the low 32 bits of each page's XXH3 hash, little-endian, one after the other."""
    rows = np.frombuffer(pages, dtype=np.uint8).reshape(-1, PAGE_BYTES)
    # Called from C for each row, which is a third faster than a loop here.
    digests = map(xxhash.xxh3_64_intdigest, rows)  # type: ignore[arg-type]  # a row is a buffer
    sums = np.fromiter(digests, np.uint64, len(rows))
    return sums.astype("<u4").tobytes()


class PageChecksums:
    """Checks each page against its checksum once: pages that were right are not hashed again.

    Threads may share one; at worst a page is hashed twice.

    Parameters
    ----------
    start
        The offset of the table, just behind the checked pages.
    """

    def __init__(self, start: int) -> None:
        assert start % PAGE_BYTES == 0
        self._start = start
        self._are_right = bytearray(start // PAGE_BYTES)

    @property
    def end(self) -> int:
        """The offset of the end of the table."""
        return self._place(self._start)

    def write(self, descriptor: int, pages: memoryview, position: int) -> None:
        """Write the checksums of the pages at ``position``."""
        sums = page_checksums(pages)
        if os.pwrite(descriptor, sums, self._place(position)) < len(sums):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def were_checked(self, position: int, num_bytes: int) -> bool:
        """Whether all pages of a range were right in an earlier check."""
        first, end = position // PAGE_BYTES, -(-(position + num_bytes) // PAGE_BYTES)
        return self._are_right.find(0, first, end) < 0

    def check(self, descriptor: int, pages: memoryview, position: int) -> bool:
        """Whether ``pages``, read at ``position``, have the checksums of the table.

        They do not where the table is truncated. Raises ``OSError``.
        """
        sums = page_checksums(pages)
        if os.pread(descriptor, len(sums), self._place(position)) != sums:
            return False
        first, num_pages = position // PAGE_BYTES, len(pages) // PAGE_BYTES
        self._are_right[first : first + num_pages] = b"\1" * num_pages
        return True

    def _place(self, position: int) -> int:
        return self._start + position // PAGE_BYTES * CHECKSUM_BYTES
