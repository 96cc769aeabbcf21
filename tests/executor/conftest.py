"""The cluster that all tests on Ray share: its start takes longer than most of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def nodes() -> Iterator[Any]:
    """Nodes on this machine. Two have slow disks."""
    # Only where Ray is installed.
    from tests.executor.cluster_nodes import DISK_RATE, SLOW_RATE, nodes_at_work

    slow = {DISK_RATE: str(SLOW_RATE)}
    with nodes_at_work({"a": slow, "b": {}, "c": slow}) as found:
        yield found
