"""Several nodes of a Ray cluster on one machine, each with a disk that is held to a rate."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from executor.engine.channels import Channel, Throttle
from executor.machine import tiers
from executor.nodes import ray_nodes
from executor.nodes.hand_out import HandOut
from executor.nodes.node import NodeProcess
from executor.nodes.share import Handed, NodeNews
from executor.run.stage_run import StagePass, StageResult
from executor.stores.pass_rows import RowBytes
from profiles.hardware import HardwareProfile
from profiles.rate_curve import RateCurve
from tests.executor.tiny_machines import make_hardware

logger = logging.getLogger(__name__)

# Every node's store of objects.
STORE_BYTES = 80 * 2**20
# Of a slow disk, in bytes/s: jobs of tiny models take seconds.
SLOW_RATE = 3e6
START_S = 60.0
ROOT = Path(__file__).parents[2]
# What a node's process reads of its environment.
DISK_RATE, MEASURED = "ZIGZAG_TEST_DISK_RATE", "ZIGZAG_TEST_MEASURED"
# The files of a node begin so: ``.pid``, and what tests tell it in ``.fault``.
FILES = "ZIGZAG_TEST_FILES"


class HeldNode(NodeProcess):
    """A node whose disk has the rate of its environment, and which tests may tell what to do."""

    def __init__(self) -> None:
        super().__init__()
        Path(os.environ[FILES] + ".pid").write_text(str(os.getpid()))
        if rate := os.environ.get(DISK_RATE):
            hold_disk(float(rate))

    def profile(self, offload_dir: Path) -> HardwareProfile:
        """Return made-up rates, or measured ones where the environment asks for them, but the disk
        has the rate that it is held to."""
        is_measured = MEASURED in os.environ
        found = super().profile(offload_dir) if is_measured else make_hardware()
        rate = os.environ.get(DISK_RATE)
        if rate is None:
            return found
        disk = replace(found.disk, read=RateCurve.constant(float(rate)))
        return replace(found, disk=disk)

    def exchange(self, handed: Sequence[Handed], seconds: float) -> NodeNews:
        """Take requests, unless a fault strikes first."""
        if handed:
            _fail_if_told()
        return super().exchange(handed, seconds)

    def stage_pass(
        self, told: StagePass, rows: RowBytes | None, chosen: Sequence[Handed] = ()
    ) -> RowBytes | StageResult:
        """Run a pass of the stage, unless a fault strikes first."""
        _fail_if_told()
        return super().stage_pass(told, rows, chosen)


def _fail_if_told() -> None:
    """Send this process the signal of its node's fault, once."""
    told = Path(os.environ[FILES] + ".fault")
    if not told.exists():
        return
    signal_number, num_before = map(int, told.read_text().split())
    if num_before:
        told.write_text(f"{signal_number} {num_before - 1}")
        return
    told.unlink()
    os.kill(os.getpid(), signal_number)


class FairHandOut(HandOut):
    """A hand-out in which no node is so quick, or so slow, that another one gets no requests.

    A node gets requests a second time when each of ``awaited`` has answered one or has failed.
    """

    awaited: Collection[str] = ()

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__(order)
        self._awaited = set(self.awaited)
        self._served: set[str] = set()

    def take(self, node: str, count: int, without: Collection[int] = ()) -> list[int]:
        """Return requests, if it is the node's turn."""
        if self._awaited and node in self._served:
            return []
        taken = super().take(node, count, without)
        if taken:
            self._served.add(node)
        return taken

    def answered(self, node: str, request: int) -> bool:
        """Take note of an answer."""
        self._awaited.discard(node)
        return super().answered(node, request)

    def give_back(self, node: str) -> int:
        """Take note of a node that has failed."""
        self._awaited.discard(node)
        return super().give_back(node)


def wait_for(names: Collection[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand requests out as ``FairHandOut`` does."""
    monkeypatch.setattr(FairHandOut, "awaited", names)
    monkeypatch.setattr("executor.nodes.copy_run.HandOut", FairHandOut)


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
    # Where an image says so, each of two dozen processes would compile torch's modules anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    try:
        cluster = _start(env_of)
    except Exception:
        # Ray ends a raylet whose processes get too little of a busy machine.
        logger.exception("the cluster has not started, and is tried once more")
        cluster = _start(env_of)
    vars(ray_nodes)["NodeProcess"] = HeldNode
    try:
        yield cluster
    finally:
        vars(ray_nodes)["NodeProcess"] = NodeProcess
        _end(cluster)


def _start(env_of: Mapping[str, Mapping[str, str]]) -> Cluster:
    cluster = Cluster()
    try:
        cluster.add_node(
            num_cpus=0,
            node_name="head",
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            include_log_monitor=False,
            no_monitor=True,
        )
        for name, env in env_of.items():
            add_node(cluster, name, env, wait=False)
        cluster.wait_for_nodes(START_S)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    except BaseException:
        _end(cluster)
        raise
    return cluster


def _end(cluster: Cluster) -> None:
    ray.shutdown()
    for node in list(cluster.worker_nodes):
        # The grace that ``shutdown`` grants takes a second a node.
        cluster.remove_node(node, allow_graceful=False)
    cluster.shutdown()


def add_node(
    cluster: Cluster, name: str, env: Mapping[str, str] | None = None, *, wait: bool = True
) -> Any:
    """Add a node to a cluster; returns what ``Cluster.remove_node`` takes."""
    own = {
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(ROOT),
        FILES: _files(cluster, name),
    }
    return cluster.add_node(
        wait,
        num_cpus=1,
        node_name=name,
        object_store_memory=STORE_BYTES,
        env_vars=own | dict(env or {}),
    )


def process_on(cluster: Cluster, name: str) -> psutil.Process | None:
    """Return the process that began last on a node; ``None`` where it has ended."""
    files = _files(cluster, name)
    try:
        process = psutil.Process(int(Path(files + ".pid").read_text()))
        # Another program may have the number by now.
        return process if process.environ().get(FILES) == files else None
    except (OSError, ValueError, psutil.Error):
        return None


def _files(cluster: Cluster, name: str) -> str:
    return str(Path(cluster.head_node.get_session_dir_path()) / name)


def strike(cluster: Cluster, name: str, told: signal.Signals, *, num_before: int = 0) -> None:
    """Let the process of a node send itself a signal when it gets work for the next time, or so
    many times later."""
    Path(_files(cluster, name) + ".fault").write_text(f"{int(told)} {num_before}")
