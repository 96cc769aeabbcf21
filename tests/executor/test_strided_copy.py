"""Copies of runs that lie apart."""

from __future__ import annotations

import pytest
import torch

from executor.machine.arena import Arena
from executor.stores.strided_copy import copy_runs


def _check(high: torch.device) -> None:
    """Copy parts of longer rows up and down again, between memory of two kinds of length."""
    host = Arena("cpu", 10**6, torch.device("cpu"), pins=high.type == "cuda")
    with host:
        source, back = (host.allocate("x", 7 * 12 * 4).view(torch.float32) for _ in range(2))
        source = source.view(7, 12).copy_(torch.randn(7, 12))
        back = back.view(7, 12).fill_(-1)
        above = torch.zeros(7, 9, device=high)
        assert copy_runs(above[:, :8], source[:, 2:10]) == 7 * 8 * 4
        if high.type == "cuda":
            torch.cuda.synchronize()
        assert torch.equal(above[:, :8].cpu(), source[:, 2:10])
        assert bool((above[:, 8] == 0).all())
        copy_runs(back[:, 4:], above[:, :8])
        if high.type == "cuda":
            torch.cuda.synchronize()
        assert torch.equal(back[:, 4:], source[:, 2:10])
        assert bool((back[:, :4] == -1).all())


def test_runs_are_copied_and_nothing_beside_them() -> None:
    _check(torch.device("cpu"))


@pytest.mark.gpu
def test_runs_are_copied_over_the_link() -> None:
    _check(torch.device("cuda"))
