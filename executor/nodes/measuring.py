"""The profiles of all nodes, and the links between them as Ray uses them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path

from costmodel.cluster.nodes import (
    FREE_LINK,
    INLINE_BYTES,
    Cluster,
    Links,
    Node,
    NodeLink,
    PairLink,
)
from executor.nodes.ray_nodes import NodeActor, ask, ask_all, load_ray
from profiles.hardware import HardwareProfile
from profiles.units import MIB

# Of larger clusters, only the links between neighbours are measured.
MOST_FULL = 8
# Ray keeps results up to INLINE_BYTES with its calls, and larger ones in its store of objects.
STORED_BYTES, LARGE_BYTES = 2 * INLINE_BYTES, 32 * MIB
# Hops of a chain, there and back, and how often a chain runs.
NUM_HOPS, NUM_LARGE_HOPS, NUM_CHAINS = 20, 4, 3


def measure_cluster(actors: Sequence[NodeActor], folders: Sequence[Path]) -> Cluster:
    """Let every node measure itself, all at the same time, and then each link alone.

    Parameters
    ----------
    folders
        The offload folder of each node.
    """
    calls = [
        actor.handle.profile.remote(folder) for actor, folder in zip(actors, folders, strict=True)
    ]
    profiles: list[HardwareProfile] = ask_all(actors, calls)
    named = zip(actors, profiles, strict=True)
    nodes = tuple(Node(name=actor.name, hardware=found) for actor, found in named)
    pairs = []
    for one, other in _pairs(actors):
        link = _link(one, other)
        pairs += [
            PairLink(source=a.name, target=b.name, link=link)
            for a, b in ((one, other), (other, one))
        ]
    return Cluster(nodes=nodes, links=Links(default=_typical(pairs), pairs=tuple(pairs)))


def _pairs(actors: Sequence[NodeActor]) -> Iterator[tuple[NodeActor, NodeActor]]:
    """Return the pairs to measure, each once."""
    if len(actors) <= MOST_FULL:
        return combinations(actors, 2)
    return pairwise([*actors, actors[0]])


def _link(one: NodeActor, other: NodeActor) -> NodeLink:
    """Measure a link as stages use it. Both directions count as equal."""
    latency_s = _hop_seconds(one, other, 0, NUM_HOPS)
    stored_s = _hop_seconds(one, other, STORED_BYTES, NUM_HOPS)
    large_s = _hop_seconds(one, other, LARGE_BYTES, NUM_LARGE_HOPS)
    bytes_per_s = (LARGE_BYTES - STORED_BYTES) / max(large_s - stored_s, 1e-9)
    store_s = max(stored_s - latency_s - STORED_BYTES / bytes_per_s, 0.0)
    return NodeLink(bytes_per_s=bytes_per_s, latency_s=latency_s, store_s=store_s)


def _hop_seconds(one: NodeActor, other: NodeActor, num_bytes: int, num_hops: int) -> float:
    """Return the seconds from a call of one node to the call of the other that takes its result."""
    found = []
    for _ in range(NUM_CHAINS):
        message = one.handle.message.remote(num_bytes)
        # It is there before the clock starts.
        ask(one, one.handle.facts.remote(None))
        start_s = time.perf_counter()
        for _ in range(num_hops // 2):
            message = one.handle.relay.remote(other.handle.relay.remote(message))
        load_ray().wait([message], fetch_local=False)
        found.append((time.perf_counter() - start_s) / num_hops)
    # A wait does not raise what has failed; a call does, with the name of the node.
    for actor in (one, other):
        ask(actor, actor.handle.facts.remote(None))
    return min(found)


def _typical(pairs: Sequence[PairLink]) -> NodeLink:
    """Return a link of median values; one node alone has a link that costs nothing."""
    if not pairs:
        return FREE_LINK
    links = [pair.link for pair in pairs]
    return NodeLink(
        bytes_per_s=statistics.median(link.bytes_per_s for link in links),
        latency_s=statistics.median(link.latency_s for link in links),
        store_s=statistics.median(link.store_s for link in links),
    )
