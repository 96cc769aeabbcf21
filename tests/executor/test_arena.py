"""Memory is handed out to the byte and never beyond the budget."""

from __future__ import annotations

import mmap

import pytest
import torch

from executor.machine.arena import Arena
from profiles.errors import RunError

CPU = torch.device("cpu")


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
    arena = Arena("cpu", 2**20, CPU)
    first, second = arena.allocate("a", 5000), arena.allocate("a", 5000)
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all() and (second == 2).all()


@pytest.mark.gpu
def test_pinned_buffers_are_exactly_as_large_as_asked() -> None:
    with Arena("cpu", 2**24, CPU, pins=True) as arena:
        buffer = arena.allocate("weights", 3 * 2**20 + 4096)
        assert buffer.is_pinned()
        assert buffer.numel() == 3 * 2**20 + 4096
        assert sum(arena.used_bytes.values()) == buffer.numel()
    assert not buffer.is_pinned()
