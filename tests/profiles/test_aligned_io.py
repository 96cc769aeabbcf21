"""Aligned I/O: what is written is read back, and every failure says where and why."""

from __future__ import annotations

import errno
import logging
import os
import platform
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from profiles import aligned_io
from profiles.aligned_io import PAGE_BYTES, DirectFile, aligned_buffer, populate
from profiles.errors import RunError
from profiles.units import MIB


def _noise(num_bytes: int, seed: int = 0) -> memoryview:
    buffer = aligned_buffer(num_bytes)
    buffer[:] = random.Random(seed).randbytes(num_bytes)
    return buffer


@pytest.fixture
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that refuses direct I/O when the file is opened."""
    real_open = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(aligned_io, "_warned_devices", set())


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("num_pages", [1, 7, 16, 33])
def test_round_trip(num_threads: int, num_pages: int, tmp_path: Path) -> None:
    data = _noise(num_pages * PAGE_BYTES, seed=num_pages)
    path = tmp_path / "file"
    with DirectFile(
        path, writable=True, num_threads=num_threads, request_bytes=4 * PAGE_BYTES
    ) as file:
        file.write_from(data, 3 * PAGE_BYTES)
        back = aligned_buffer(len(data))
        file.read_into(back, 3 * PAGE_BYTES)
        assert back == data
    assert path.read_bytes() == bytes(3 * PAGE_BYTES) + bytes(data)
    assert path.stat().st_mode & 0o077 == 0


def test_a_part_of_a_buffer_and_of_a_file(tmp_path: Path) -> None:
    data = _noise(8 * PAGE_BYTES)
    with DirectFile(tmp_path / "file", writable=True, request_bytes=PAGE_BYTES) as file:
        file.write_from(data, 0)
        back = aligned_buffer(8 * PAGE_BYTES)
        file.read_into(back[2 * PAGE_BYTES : 5 * PAGE_BYTES], 4 * PAGE_BYTES)
    assert back[2 * PAGE_BYTES : 5 * PAGE_BYTES] == data[4 * PAGE_BYTES : 7 * PAGE_BYTES]
    assert not any(back[: 2 * PAGE_BYTES]) and not any(back[5 * PAGE_BYTES :])


@pytest.mark.usefixtures("buffered")
def test_file_system_without_direct_io(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = _noise(9 * PAGE_BYTES)
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b"):
            with DirectFile(tmp_path / name, writable=True, request_bytes=PAGE_BYTES) as file:
                assert not file.is_direct
                file.write_from(data, 0)
                back = aligned_buffer(len(data))
                file.read_into(back, 0)
                assert back == data
    assert sum("no direct I/O" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("num_bytes", [0, 5000, 3 * PAGE_BYTES])
@pytest.mark.parametrize("request_bytes", [PAGE_BYTES, 16 * PAGE_BYTES])
def test_short_file(num_bytes: int, request_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(num_bytes))
    wanted = r"short at offset \d+: file is shorter than expected"
    with (
        DirectFile(path, request_bytes=request_bytes) as file,
        pytest.raises(RunError, match=wanted),
    ):
        file.read_into(aligned_buffer(4 * PAGE_BYTES), 0)


@pytest.mark.usefixtures("buffered")
def test_short_file_through_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(5000))
    with DirectFile(path) as file, pytest.raises(RunError, match="shorter than expected"):
        file.read_into(aligned_buffer(2 * PAGE_BYTES), 0)


def _short_moves(real: Callable[..., int]) -> Callable[..., int]:
    """Move at most one page per call, as a kernel may."""
    return lambda fd, buffers, offset: real(fd, [buffers[0][:PAGE_BYTES]], offset)


def test_short_reads_and_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", _short_moves(os.preadv))
    monkeypatch.setattr(os, "pwritev", _short_moves(os.pwritev))
    data = _noise(8 * PAGE_BYTES)
    with DirectFile(tmp_path / "file", writable=True, request_bytes=4 * PAGE_BYTES) as file:
        file.write_from(data, 0)
        back = aligned_buffer(len(data))
        file.read_into(back, 0)
    assert back == data


@pytest.mark.parametrize(
    ("code", "words"), [(errno.EIO, os.strerror(errno.EIO)), (errno.ENOSPC, "the disk is full")]
)
def test_injected_errors_name_file_offset_and_reason(
    code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_offset = 5 * PAGE_BYTES

    def failing(real: Callable[..., int]) -> Callable[..., int]:
        def move(fd: int, buffers: Any, offset: int) -> int:
            if offset == bad_offset:
                raise OSError(code, os.strerror(code))
            return real(fd, buffers, offset)

        return move

    data = _noise(8 * PAGE_BYTES)
    with DirectFile(tmp_path / "victim", writable=True, request_bytes=PAGE_BYTES) as file:
        file.write_from(data, 0)
        monkeypatch.setattr(os, "preadv", failing(os.preadv))
        monkeypatch.setattr(os, "pwritev", failing(os.pwritev))
        with pytest.raises(RunError, match=f"write of .*victim at offset {bad_offset}: {words}"):
            file.write_from(data, 0)
        with pytest.raises(RunError, match=f"read of .*victim at offset {bad_offset}: {words}"):
            file.read_into(aligned_buffer(8 * PAGE_BYTES), 0)


def test_preallocate_tells_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DirectFile(tmp_path / "file", writable=True) as file:
        file.preallocate(PAGE_BYTES)
        assert (tmp_path / "file").stat().st_size == PAGE_BYTES

        def full(fd: int, offset: int, length: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(RunError, match="the disk is full"):
            file.preallocate(2 * PAGE_BYTES)


@pytest.mark.parametrize(("length", "offset"), [(100, 0), (PAGE_BYTES, 100)])
def test_unaligned_requests_are_a_bug(length: int, offset: int, tmp_path: Path) -> None:
    with DirectFile(tmp_path / "file", writable=True) as file, pytest.raises(AssertionError):
        file.write_from(aligned_buffer(PAGE_BYTES)[:length], offset)


def test_missing_file_and_closed_twice(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="none: No such file"):
        DirectFile(tmp_path / "none")
    file = DirectFile(tmp_path / "file", writable=True)
    file.close()
    file.close()


def test_populated_memory_is_physical_at_once() -> None:
    def resident_bytes() -> int:
        return int(psutil.Process().memory_info().rss)

    before = resident_bytes()
    lazy = aligned_buffer(64 * MIB)
    assert resident_bytes() - before < 8 * MIB
    populated = aligned_buffer(64 * MIB)
    populate(populated)
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    # Older systems do not know the advice, and wait until memory is touched.
    assert (resident_bytes() - before > 56 * MIB) == (release >= (5, 14))
    assert len(lazy) == len(populated)
