"""Links between the nodes of a cluster, from the seconds of their calls. No Ray."""

from __future__ import annotations

from typing import Any

import pytest

from costmodel.cluster.nodes import INLINE_BYTES, NodeLink
from executor.nodes import measuring


@pytest.mark.parametrize(
    "link",
    [
        NodeLink(bytes_per_s=1e9, latency_s=8e-4, store_s=4e-3),
        NodeLink(bytes_per_s=1e7, latency_s=2e-2),
    ],
)
def test_a_link_is_found_from_its_hops(link: NodeLink, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(one: Any, other: Any, num_bytes: int, num_hops: int) -> float:
        store_s = link.store_s if num_bytes > INLINE_BYTES else 0.0
        return link.latency_s + store_s + num_bytes / link.bytes_per_s

    monkeypatch.setattr(measuring, "_hop_seconds", seconds)
    node: Any = None
    found = measuring._link(node, node)
    assert found.bytes_per_s == pytest.approx(link.bytes_per_s)
    assert found.latency_s == pytest.approx(link.latency_s)
    assert found.store_s == pytest.approx(link.store_s, abs=1e-9)


@pytest.mark.parametrize(("num_nodes", "num_pairs"), [(1, 0), (2, 1), (3, 3), (8, 28), (9, 9)])
def test_each_pair_is_measured_once_and_of_many_nodes_neighbours(
    num_nodes: int, num_pairs: int
) -> None:
    actors: Any = range(num_nodes)
    pairs = [frozenset(pair) for pair in measuring._pairs(actors)]
    assert len(pairs) == len(set(pairs)) == num_pairs
    assert set().union(*pairs) == (set(actors) if num_pairs else set())
