"""The profiles of all nodes, and the links between them as Ray uses them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path

from costmodel.cluster.nodes import FREE_LINK, Cluster, Links, Node, NodeLink, PairLink
from executor.nodes.ray_nodes import NodeActor, ask, ask_all
from profiles.hardware import HardwareProfile
from profiles.units import MIB

# Of larger clusters, only the links between neighbours are measured.
MOST_FULL = 8
LARGE_BYTES = 32 * MIB
NUM_SMALL, NUM_LARGE = 5, 2


def measure_cluster(
    actors: Sequence[NodeActor], folders: Sequence[Path], *, large_bytes: int = LARGE_BYTES
) -> Cluster:
    """Let every node measure itself, all at the same time, and then each link alone.

    Parameters
    ----------
    folders
        The offload folder of each node.
    large_bytes
        Bytes of the messages that the rate is measured with.
    """
    calls = [
        actor.handle.profile.remote(folder) for actor, folder in zip(actors, folders, strict=True)
    ]
    profiles: list[HardwareProfile] = ask_all(actors, calls)
    named = zip(actors, profiles, strict=True)
    nodes = tuple(Node(name=actor.name, hardware=found) for actor, found in named)
    pairs = [
        PairLink(source=source.name, target=target.name, link=_link(source, target, large_bytes))
        for source, target in _pairs(actors)
    ]
    return Cluster(nodes=nodes, links=Links(default=_typical(pairs), pairs=tuple(pairs)))


def _pairs(actors: Sequence[NodeActor]) -> Iterator[tuple[NodeActor, NodeActor]]:
    if len(actors) <= MOST_FULL:
        yield from permutations(actors, 2)
        return
    for place, actor in enumerate(actors):
        yield actor, actors[(place + 1) % len(actors)]


def _link(source: NodeActor, target: NodeActor, large_bytes: int) -> NodeLink:
    latency_s = min(_seconds(source, target, 0) for _ in range(NUM_SMALL))
    seconds = min(_seconds(source, target, large_bytes) for _ in range(NUM_LARGE))
    return NodeLink(bytes_per_s=large_bytes / max(seconds - latency_s, 1e-9), latency_s=latency_s)


def _seconds(source: NodeActor, target: NodeActor, num_bytes: int) -> float:
    """Return the seconds of a message. A new one each time: a node keeps what it has received."""
    message = source.handle.message.remote(num_bytes)
    # It is there before the clock starts.
    ask(source, source.handle.facts.remote(None))
    seconds: float = ask(target, target.handle.receive.remote([message]))
    return seconds


def _typical(pairs: Sequence[PairLink]) -> NodeLink:
    """Return a link of median rate and latency; one node alone has a link that costs nothing."""
    if not pairs:
        return FREE_LINK
    return NodeLink(
        bytes_per_s=statistics.median(pair.link.bytes_per_s for pair in pairs),
        latency_s=statistics.median(pair.link.latency_s for pair in pairs),
    )
