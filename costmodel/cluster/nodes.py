"""The machines of a cluster, the network between them, and the JSON file of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from costmodel.pricing.passes import FloatArray
from profiles.errors import InputError
from profiles.files import dump_json, from_json, read_json, to_json
from profiles.hardware import HardwareProfile
from profiles.outputs import write_output
from profiles.rate_curve import require_not_negative, require_positive
from profiles.recorded import find_profile

SCHEMA_VERSION = 1
# Ray sends results up to this size with its calls (``max_direct_call_object_size``).
INLINE_BYTES = 100 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine of a cluster, with the budgets that it grants.

    Parameters
    ----------
    name
        What the cluster calls it; no two nodes share a name.
    """

    name: str
    hardware: HardwareProfile

    def __post_init__(self) -> None:
        if not self.name:
            raise InputError("node.name", got="nothing", allowed="a name")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLink:
    """The network between two nodes, in one direction, as Ray uses it.

    Parameters
    ----------
    bytes_per_s
        Rate of large messages.
    latency_s
        Seconds of a message without content.
    store_s
        Seconds that a message of more than ``INLINE_BYTES`` takes on top: Ray puts it into its
        store of objects, from which the other node fetches it.
    """

    bytes_per_s: float
    latency_s: float = 0.0
    store_s: float = 0.0

    def __post_init__(self) -> None:
        require_positive("link.bytes_per_s", self.bytes_per_s)
        require_not_negative("link.latency_s", self.latency_s)
        require_not_negative("link.store_s", self.store_s)

    def seconds(self, num_bytes: FloatArray) -> FloatArray:
        """Return the seconds of messages of these sizes, float64 [messages]."""
        store_s = np.where(num_bytes > INLINE_BYTES, self.store_s, 0.0)
        return self.latency_s + store_s + num_bytes / self.bytes_per_s


# A link that costs nothing, where no network is known.
FREE_LINK = NodeLink(bytes_per_s=1e12)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLink:
    """The link from the node ``source`` to the node ``target``."""

    source: str
    target: str
    link: NodeLink


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """The network of a cluster.

    Parameters
    ----------
    default
        Of all pairs without a link of their own.
    pairs
        Pairs with another link. Each direction is a pair.
    """

    default: NodeLink
    pairs: tuple[PairLink, ...] = ()

    def between(self, source: str, target: str) -> NodeLink:
        """Return the link from one node to another."""
        for pair in self.pairs:
            if (pair.source, pair.target) == (source, target):
                return pair.link
        return self.default


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Machines and the network between them."""

    nodes: tuple[Node, ...]
    links: Links
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise InputError(
                "cluster schema_version", got=self.schema_version, allowed=str(SCHEMA_VERSION)
            )
        if not self.nodes:
            raise InputError("cluster.nodes", got="none", allowed="one node or more")
        counts = Counter(node.name for node in self.nodes)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise InputError("cluster.nodes", got=f"{twice[0]} twice", allowed="names that differ")
        ends = [end for pair in self.links.pairs for end in (pair.source, pair.target)]
        if unknown := [name for name in ends if name not in counts]:
            raise InputError(
                "cluster.links.pairs", got=f"node {unknown[0]!r}", allowed=", ".join(counts)
            )
        pairs = Counter((pair.source, pair.target) for pair in self.links.pairs)
        if again := [f"{a} to {b}" for (a, b), count in pairs.items() if count > 1]:
            raise InputError(
                "cluster.links.pairs", got=f"{again[0]} twice", allowed="one link from node to node"
            )

    def node(self, name: str) -> Node:
        """Return a node by its name; raises ``InputError`` for any other name."""
        for node in self.nodes:
            if node.name == name:
                return node
        names = ", ".join(node.name for node in self.nodes)
        raise InputError("node", got=repr(name), allowed=names)

    def only(self, names: Collection[str]) -> Cluster:
        """Return the cluster of the nodes with these names, all nodes where there are none.

        Raises
        ------
        InputError
            For a name that no node has.
        """
        if not names:
            return self
        nodes = tuple(self.node(name) for name in dict.fromkeys(names))
        pairs = [pair for pair in self.links.pairs if {pair.source, pair.target} <= set(names)]
        return replace(self, nodes=nodes, links=replace(self.links, pairs=tuple(pairs)))

    def save(self, path: Path) -> None:
        """Write the cluster as JSON, whole or not at all, without raw measurements."""
        plain = [replace(n, hardware=replace(n.hardware, measurements=())) for n in self.nodes]
        cluster = replace(self, nodes=tuple(plain))
        write_output(path, partial(dump_json, to_json(cluster)))

    @classmethod
    def load(cls, path: Path) -> Cluster:
        """Read a cluster; raises ``InputError`` with file and key on anything out of place.

        A node's hardware may also be what ``find_profile`` takes: the name of a recorded machine,
        or a profile file.
        """
        raw = read_json(path, "cluster")
        nodes = raw.get("nodes")
        for place, node in enumerate(nodes if isinstance(nodes, list) else ()):
            if isinstance(node, dict) and isinstance(node.get("hardware"), str):
                try:
                    node["hardware"] = to_json(find_profile(node["hardware"]))
                except InputError as error:
                    raise error.inside(f"cluster {path}.nodes[{place}]") from None
        return from_json(cls, raw, f"cluster {path}")


def equal_nodes(hardware: HardwareProfile, count: int, link: NodeLink) -> Cluster:
    """Return a cluster of ``count`` machines of one kind, with one link for all pairs."""
    if count < 1:
        raise InputError("number of nodes", got=count, allowed="1 or more")
    nodes = (Node(name=f"node-{i}", hardware=hardware) for i in range(count))
    return Cluster(nodes=tuple(nodes), links=Links(default=link))
