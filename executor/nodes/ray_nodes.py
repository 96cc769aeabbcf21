"""The nodes of a Ray cluster, and the actor on each of them."""

from __future__ import annotations

import importlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from executor.nodes.node import NodeProcess
from executor.nodes.share import NodeJob
from profiles.errors import InputError, RunError, ZigzagError, one_line

INSTALL = "pip install 'zigzag-llm[ray]'"


def load_ray() -> ModuleType:
    """Import Ray; raises ``InputError`` that says what to install."""
    # Ray reports the use of its libraries otherwise.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise InputError(
            "zigzag cluster", got="no Ray", allowed="Ray on every node", hint=INSTALL
        ) from None


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a cluster for as long as the block runs.

    Parameters
    ----------
    address
        ``HOST:PORT``; ``auto`` for the cluster that this machine is a node of; ``local`` for this
        machine alone. A connection that is there already is used.
    """
    ray = load_ray()
    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "include_dashboard": False}
    try:
        if address == "local":
            ray.init(address="local", **quiet)
        else:
            ray.init(address=address, **{k: v for k, v in quiet.items() if "include" not in k})
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            "--ray",
            got=f"{address}: {one_line(str(error))}",
            allowed="HOST:PORT of a running cluster, auto or local",
            hint="ray start --head, then ray start --address=HOST:6379 on the others",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def folder_on(folder: Path, node: str) -> Path:
    """Return a folder of a node: ``{node}`` in the path stands for its name."""
    return Path(str(folder).replace("{node}", node))


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """A node that Ray knows, and its resources."""

    name: str
    node_id: str
    num_cpus: float
    num_gpus: float


def ray_nodes(only: Sequence[str] = ()) -> list[RayNode]:
    """Return the nodes that run anything, sorted by name; of ``only`` these where it names any.

    A node without CPUs (``ray start --num-cpus=0``) only directs others.

    Raises
    ------
    InputError
        For a name that no node has.
    """
    ray = load_ray()
    found: list[RayNode] = []
    for each in ray.nodes():
        resources = each.get("Resources", {})
        if each["Alive"] and resources.get("CPU", 0) > 0:
            name = each.get("NodeName") or each["NodeManagerAddress"]
            node = RayNode(
                name=name,
                node_id=each["NodeID"],
                num_cpus=resources["CPU"],
                num_gpus=resources.get("GPU", 0),
            )
            found.append(node)
    found.sort(key=lambda node: (node.name, node.node_id))
    # Several nodes on one machine have one address.
    counts = Counter(node.name for node in found)
    found = [
        replace(node, name=f"{node.name}-{i}") if counts[node.name] > 1 else node
        for i, node in enumerate(found)
    ]
    missing = set(only) - {node.name for node in found}
    if missing:
        told = ", ".join(node.name for node in found)
        raise InputError("nodes", got=sorted(missing)[0], allowed=told or "no node is alive")
    return [node for node in found if not only or node.name in only]


@dataclass(slots=True)
class NodeActor:
    """The actor of one node. Its process has all the node's cores and GPUs, or none of them where
    it only directs others."""

    node: RayNode
    is_director: bool = False
    handle: Any = field(init=False)

    def __post_init__(self) -> None:
        self.begin()

    @property
    def name(self) -> str:
        """The name of its node."""
        return self.node.name

    @property
    def members(self) -> Sequence[NodeActor]:
        """The actors that compute: itself."""
        return [self]

    def begin(self) -> None:
        """Start the process."""
        ray = load_ray()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Without its GPUs, Ray would hide them. It also sets the threads of OpenMP by the CPUs.
        self.handle = (
            ray.remote(NodeProcess)
            .options(
                num_cpus=0 if self.is_director else self.node.num_cpus,
                num_gpus=0 if self.is_director else self.node.num_gpus,
                scheduling_strategy=NodeAffinitySchedulingStrategy(self.node.node_id, soft=False),
                max_restarts=0,
                max_task_retries=0,
            )
            .remote()
        )

    def start(self, job: NodeJob) -> Any:
        """Call for the start of a job of copies."""
        return self.handle.start.remote(job)

    def end(self) -> None:
        """End the process."""
        load_ray().kill(self.handle)

    def find_node(self) -> bool:
        """Return whether the node is still there to begin on."""
        nodes = load_ray().nodes()
        return any(n["NodeID"] == self.node.node_id and n["Alive"] for n in nodes)


def ask_all(actors: Sequence[NodeActor], calls: Sequence[Any]) -> list[Any]:
    """Return the results of calls, one of each actor.

    Raises
    ------
    ZigzagError
        That a node has raised, or ``RunError`` with the name of a node that has failed.
    """
    return [ask(actor, call) for actor, call in zip(actors, calls, strict=True)]


def outcomes(
    actors: Sequence[NodeActor], calls: Sequence[Any], timeout_s: float
) -> Iterator[tuple[NodeActor, Any]]:
    """Yield each actor with the result of its call, or else with what ``ask`` would raise.

    Of an actor that does not answer within ``timeout_s``, that is a ``RunError``.
    """
    if not calls:
        return
    _, late = load_ray().wait(list(calls), num_returns=len(calls), timeout=timeout_s)
    for actor, call in zip(actors, calls, strict=True):
        if call in late:
            told = f"no answer for {timeout_s:.0f} s; it hangs, or other jobs have its cores"
            yield actor, RunError(f"node {actor.name}: {told}")
            continue
        try:
            yield actor, ask(actor, call)
        except ZigzagError as error:
            yield actor, error


def ask(actor: NodeActor, call: Any) -> Any:
    """Return the result of a call of an actor; raises as ``ask_all`` does."""
    ray = load_ray()
    try:
        return ray.get(call)
    except ray.exceptions.RayError as error:
        raise told_failure(actor.name, error) from error


def told_failure(name: str, error: BaseException) -> ZigzagError:
    """Return what a node has raised, or else that it has failed, in one line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, RunError):
        return RunError(f"node {name}: {cause}")
    if isinstance(cause, ZigzagError):
        return cause
    if isinstance(cause, ImportError):
        return InputError(
            f"node {name}",
            got=one_line(str(cause)),
            allowed="the same packages as here",
            hint=f"{INSTALL} on every node",
        )
    first, *_ = str(error).strip().splitlines() or [type(error).__name__]
    if cause is not None:
        first = f"{type(cause).__name__}: {cause}"
    return RunError(one_line(f"node {name}: {first}"))
