"""Threads that OpenMP keeps between operators."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from profiles.kernels import end_idle_threads


def _num_threads() -> int:
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def test_a_team_ends_and_comes_back() -> None:
    """In a thread of its own, whose team nobody else has."""
    before = torch.get_num_threads()
    counts: list[int] = []
    products: list[torch.Tensor] = []
    square = torch.rand(512, 512)

    def compute() -> None:
        torch.set_num_threads(3)
        for _ in range(2):
            products.append(square @ square)
            torch.exp(torch.ones(1 << 20))
            counts.append(_num_threads())
            end_idle_threads()
            counts.append(_num_threads())

    worker = threading.Thread(target=compute)
    worker.start()
    worker.join()
    torch.set_num_threads(before)
    with_team, without, again, _ = counts
    assert without < with_team and again > without
    assert torch.equal(*products)
