"""What all tests share: tests marked ``gpu`` are skipped where there is no CUDA device."""

from __future__ import annotations

import os

# Before torch is imported, in this process and in those that tests start. OpenMP's threads sleep
# while they wait: spinning, those of a dozen tiny runs take ten times the cores' time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton, so that its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU on a machine without one."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
