"""Several nodes of a Ray cluster on one machine, each with a disk that is held to a rate."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from executor.engine.channels import Channel, Throttle
from executor.machine import tiers
from executor.nodes import ray_nodes
from executor.nodes.facts import NodeFacts
from executor.nodes.node import Node

# Every node's store of objects.
STORE_BYTES = 80 * 2**20
ROOT = Path(__file__).parents[2]
# What a node's process reads of its environment.
DISK_RATE, VERSION = "ZIGZAG_TEST_DISK_RATE", "ZIGZAG_TEST_VERSION"
PID_FILE = "ZIGZAG_TEST_PID_FILE"


class HeldNode(Node):
    """A node whose disk has the rate, and whose program the version, of its environment."""

    def __init__(self) -> None:
        super().__init__()
        Path(os.environ[PID_FILE]).write_text(str(os.getpid()))
        if rate := os.environ.get(DISK_RATE):
            hold_disk(float(rate))

    def facts(self, model: Path | None) -> NodeFacts:
        """Return what the node is."""
        found = super().facts(model)
        told = os.environ.get(VERSION)
        return replace(found, versions=found.versions | {"zigzag": told}) if told else found


def hold_disk(bytes_per_s: float) -> None:
    """Hold what this process reads of weights to a rate."""
    make = tiers.Machine.make_channels

    def make_held(self: tiers.Machine, **options: Any) -> list[Channel]:
        channels = make(self, **options)
        for channel in channels:
            if channel.name == "disk_read":
                channel.throttle = Throttle(bytes_per_s)
        return channels

    tiers.Machine.make_channels = make_held  # type: ignore[method-assign]


@contextmanager
def nodes_at_work(env_of: Mapping[str, Mapping[str, str]]) -> Iterator[Cluster]:
    """Start nodes with these names, each with variables of its environment, and connect to them."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "node_name": "head",
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
        },
    )
    try:
        for name, env in env_of.items():
            add_node(cluster, name, env)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        vars(ray_nodes)["Node"] = HeldNode
        yield cluster
    finally:
        vars(ray_nodes)["Node"] = Node
        ray.shutdown()
        cluster.shutdown()


def add_node(cluster: Cluster, name: str, env: Mapping[str, str] | None = None) -> Any:
    """Add a node to a cluster; returns what ``Cluster.remove_node`` takes."""
    own = {
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(ROOT),
        PID_FILE: str(_pids(cluster) / name),
    }
    return cluster.add_node(
        num_cpus=1,
        node_name=name,
        object_store_memory=STORE_BYTES,
        env_vars=own | dict(env or {}),
    )


def pid_on(cluster: Cluster, name: str) -> int:
    """Return the process that began last on a node."""
    return int((_pids(cluster) / name).read_text())


def _pids(cluster: Cluster) -> Path:
    return Path(cluster.head_node.get_session_dir_path())
