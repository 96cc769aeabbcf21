"""Memory is handed out to the byte and never beyond the budget."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch

from executor.machine.arena import Arena
from profiles.errors import RunError
from profiles.units import MIB

CPU = torch.device("cpu")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_counts_by_name_to_the_byte() -> None:
    arena = Arena("cpu", 10_000, CPU)
    sizes = {"weights": [4097, 3], "cache": [5000], "hidden states": [0]}
    for name, counts in sizes.items():
        for count in counts:
            assert arena.allocate(name, count).shape == (count,)
    assert dict(arena.used_bytes) == {"weights": 4100, "cache": 5000, "hidden states": 0}


def test_the_last_byte_can_be_had_and_no_more() -> None:
    arena = Arena("gpu", 8192, CPU)
    arena.allocate("weights", 8000)
    with pytest.raises(RunError, match=r"gpu memory: cache needs 193 B.* budget of 8\.\d+ KiB"):
        arena.allocate("cache", 193)
    assert sum(arena.used_bytes.values()) == 8000
    arena.allocate("cache", 192)


@pytest.mark.parametrize("num_bytes", [1, 4096, 5 * 2**20 + 7])
def test_buffers_begin_on_a_page_and_are_zero(num_bytes: int) -> None:
    buffer = Arena("cpu", 2**30, CPU).allocate("cache", num_bytes)
    assert buffer.data_ptr() % mmap.PAGESIZE == 0
    assert not buffer.any()


def test_buffers_do_not_overlap() -> None:
    arena = Arena("cpu", 2**28, CPU)
    # Small ones share regions, of which these fill more than one.
    sizes = [5000, 5000, 3 * MIB, 63 * MIB, 1, 64 * MIB, 4096, 30 * MIB, 34 * MIB]
    buffers = [arena.allocate("a", size) for size in sizes]
    for value, buffer in enumerate(buffers, start=1):
        assert buffer.data_ptr() % mmap.PAGESIZE == 0
        assert not buffer.any()
        buffer.fill_(value)
    for value, buffer in enumerate(buffers, start=1):
        assert (buffer == value).all()


@pytest.mark.skipif(
    not _HUGE_PAGES.exists() or "[never]" in _HUGE_PAGES.read_text(),
    reason="the system has no transparent huge pages",
)
def test_small_buffers_are_in_huge_pages() -> None:
    arena = Arena("cpu", 2**28, CPU)
    buffers = [arena.allocate("weights", MIB) for _ in range(32)]
    start, end = buffers[0].data_ptr(), buffers[-1].data_ptr() + MIB
    assert end - start == 32 * MIB
    huge = 0
    begin = stop = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, stop = (int(part, 16) for part in found.groups())
        elif line.startswith("AnonHugePages:") and begin <= start and end <= stop:
            huge = int(line.split()[1]) * 1024
    # Memory in pieces may leave the system without some of the pages.
    assert huge >= 16 * MIB


@pytest.mark.gpu
def test_pinned_buffers_are_exactly_as_large_as_asked() -> None:
    with Arena("cpu", 2**24, CPU, pins=True) as arena:
        buffer = arena.allocate("weights", 3 * 2**20 + 4096)
        assert buffer.is_pinned()
        assert buffer.numel() == 3 * 2**20 + 4096
        assert sum(arena.used_bytes.values()) == buffer.numel()
    assert not buffer.is_pinned()
