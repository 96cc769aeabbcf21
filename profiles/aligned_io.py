"""Reads and writes past the page cache, from a few threads into page-aligned buffers."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import logging
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from profiles.errors import RunError
from profiles.units import MIB

logger = logging.getLogger(__name__)

# Offsets, lengths and addresses of direct I/O are whole pages.
PAGE_BYTES = 4096
REQUEST_BYTES = 4 * MIB
NUM_THREADS = 4
_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)
# From linux/mman.h; Python has no name for it yet.
_MADV_POPULATE_WRITE = 23
_HUGE_BYTES = 4 * MIB
_POPULATED_AT_ONCE_BYTES = 64 * MIB

# Buffers (whole pages, aligned), each with its offset in a file (whole pages).
Parts = Sequence[tuple[memoryview, int]]

_warned_devices: set[int] = set()
_warned_lock = threading.Lock()


def aligned_buffer(num_bytes: int) -> memoryview:
    """Return zeroed private memory that starts on a page; it is freed with the view.

    It is exactly as large as asked, in huge pages where it is large and the system has them, and
    physical only once touched.
    """
    assert num_bytes > 0
    # Python's default is shared memory, for which most systems ignore the advice below.
    region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _MADV_HUGEPAGE is not None and num_bytes >= _HUGE_BYTES:
        region.madvise(_MADV_HUGEPAGE)
    return memoryview(region)


def populate(buffer: memoryview) -> None:
    """Make memory that begins on a page physical; needs Linux 5.14 or newer, else does nothing.

    The kernel fills it with zeros, a part on each of two cores.

    Raises
    ------
    OSError
        When there is no room.
    """
    madvise = _madvise()
    num_bytes = len(buffer)
    start = ctypes.addressof(ctypes.c_char.from_buffer(buffer))

    def populate_part(first: int) -> int:
        length = min(_POPULATED_AT_ONCE_BYTES, num_bytes - first)
        # Unlike Python's own, this call lets other threads run.
        failed = madvise(
            ctypes.c_void_p(start + first), ctypes.c_size_t(length), _MADV_POPULATE_WRITE
        )
        return ctypes.get_errno() if failed else 0

    parts = range(0, num_bytes, _POPULATED_AT_ONCE_BYTES)
    if len(parts) == 1:
        _check_populated(populate_part(0))
        return
    with ThreadPoolExecutor(2) as pool:
        for code in pool.map(populate_part, parts):
            _check_populated(code)


@functools.cache
def _madvise() -> Callable[..., int]:
    return ctypes.CDLL(None, use_errno=True).madvise


def _check_populated(code: int) -> None:
    if code not in (0, errno.EINVAL):
        raise OSError(code, os.strerror(code))


def open_direct(path: Path, flags: int) -> int:
    """Open ``path`` past the page cache; buffered, with a warning, where that is not possible.

    Parameters
    ----------
    flags
        As for ``os.open``, e.g. ``os.O_RDWR | os.O_CREAT``.

    Raises
    ------
    RunError
        With path and reason when the file cannot be opened at all.
    """
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise RunError(f"{path}: {error.strerror}") from error
    try:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
    _warn_once(path, os.fstat(fd).st_dev)
    return fd


def _warn_once(path: Path, device: int) -> None:
    with _warned_lock:
        if device in _warned_devices:
            return
        _warned_devices.add(device)
    logger.warning(
        "the file system of %s has no direct I/O; reading and writing through the page cache, "
        "whose pages are dropped after each request",
        path,
    )


class DirectFile:
    """A file that is read and written in whole pages past the page cache.

    One call is cut into requests of ``request_bytes``, which ``num_threads`` threads work off.
    Any thread may call; calls on overlapping bytes are the caller's to order.

    Parameters
    ----------
    path
        The file. It is created, readable by its owner only, when ``writable``.
    writable
        Open for reading and writing instead of reading.
    """

    def __init__(
        self,
        path: Path,
        *,
        writable: bool = False,
        num_threads: int = NUM_THREADS,
        request_bytes: int = REQUEST_BYTES,
    ) -> None:
        assert request_bytes % PAGE_BYTES == 0 and request_bytes > 0
        self.path = Path(path)
        self._request_bytes = request_bytes
        self._num_threads = num_threads
        self._fd = open_direct(self.path, os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY)
        self.is_direct = bool(fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_DIRECT)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="aligned-io")

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is under way and close the file; a second call does nothing."""
        self._pool.shutdown(cancel_futures=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def preallocate(self, num_bytes: int) -> None:
        """Reserve the file's first bytes, so that a disk too small is told before any work.

        Raises
        ------
        RunError
            With path and reason; a full disk is told as such.
        """
        try:
            os.posix_fallocate(self._fd, 0, num_bytes)
        except OSError as error:
            raise self._failure("allocation", num_bytes, error) from error

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` (whole pages, aligned) from ``offset`` (whole pages) on.

        Raises
        ------
        RunError
            With path, offset and reason; also when the file ends before the buffer is full.
        """
        self.read_parts([(buffer, offset)])

    def write_from(self, buffer: memoryview, offset: int) -> None:
        """Write all of ``buffer`` (whole pages, aligned) from ``offset`` (whole pages) on.

        Raises
        ------
        RunError
            With path, offset and reason; a full disk is told as such.
        """
        self.write_parts([(buffer, offset)])

    def read_parts(self, parts: Parts) -> None:
        """Fill several buffers, each from an offset of its own, at once; see ``read_into``."""
        self._spread(self._read, parts)

    def write_parts(self, parts: Parts) -> None:
        """Write several buffers, each at an offset of its own, at once; see ``write_from``."""
        self._spread(self._write, parts)

    def sync(self) -> None:
        """Make everything written so far survive a crash."""
        os.fsync(self._fd)

    def _spread(self, move: Callable[[memoryview, int], None], parts: Parts) -> None:
        size = self._request_bytes
        requests = []
        for buffer, offset in parts:
            assert buffer.contiguous and buffer.itemsize == 1
            assert offset % PAGE_BYTES == 0 and buffer.nbytes % PAGE_BYTES == 0, (
                offset,
                buffer.nbytes,
            )
            starts = range(0, buffer.nbytes, size)
            requests += [(buffer[start : start + size], offset + start) for start in starts]
        if len(requests) < 2:
            for request in requests:
                move(*request)
            return
        # Threads draw their next request from one iterator, which costs less than a future each.
        left = iter(requests)

        def work_off() -> None:
            for request in left:
                move(*request)

        num_workers = min(self._num_threads, len(requests))
        futures = [self._pool.submit(work_off) for _ in range(num_workers)]
        # The caller may use the buffer for something else as soon as this returns or raises.
        wait(futures)
        for future in futures:
            future.result()

    def _read(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < buffer.nbytes:
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise self._failure("read", offset + done, error) from error
            done += count
            # A direct read stops inside a page only where the file ends.
            if count == 0 or (self.is_direct and done % PAGE_BYTES):
                raise RunError(
                    f"read of {self.path} at offset {offset}: file is shorter than expected, "
                    f"{buffer.nbytes} bytes wanted, {done} there"
                )
        if not self.is_direct:
            os.posix_fadvise(self._fd, offset, buffer.nbytes, os.POSIX_FADV_DONTNEED)

    def _write(self, buffer: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < buffer.nbytes:
                done += os.pwritev(self._fd, [buffer[done:]], offset + done)
            if not self.is_direct:
                os.fdatasync(self._fd)
                os.posix_fadvise(self._fd, offset, buffer.nbytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._failure("write", offset + done, error) from error

    def _failure(self, verb: str, offset: int, error: OSError) -> RunError:
        reason = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            reason = "the disk is full"
        return RunError(f"{verb} of {self.path} at offset {offset}: {reason}")
