"""What driver and nodes tell each other. No Ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import Policy, Prediction
from executor.jobs.params import RowParams
from executor.nodes.facts import NodeFacts
from executor.run.finished import Finished
from profiles.hardware import HardwareProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePlan:
    """How a node runs a job: its policy, its profile with its budgets, and the predicted run of the
    whole job on this node alone."""

    policy: Policy
    hardware: HardwareProfile
    predicted: Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJob:
    """What every engine of a node needs to begin.

    Parameters
    ----------
    model
        The checkpoint of the whole model, by its path on the node.
    offload_dir
        Folder for what the policy puts on disk.
    num_spans
        Most tasks that are noted for a timeline: the first ones.
    """

    model: Path
    offload_dir: Path
    num_spans: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJob(EngineJob):
    """What the engine of a copy needs.

    Parameters
    ----------
    plan
        What the node has planned, with the workload of the whole job.
    lengths
        Of all requests of the job.
    """

    plan: NodePlan
    lengths: Lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class StageJob(EngineJob):
    """What the engine of one stage of a pipeline needs.

    Parameters
    ----------
    policy
        Of the stage, with lanes.
    hardware
        The node's profile with its budgets.
    facts
        What the node must have like the machine that runs the command.
    """

    policy: Policy
    hardware: HardwareProfile
    facts: NodeFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """One request that is handed out.

    Parameters
    ----------
    request
        Its number in the job.
    prompt_ids
        The ids of its prompt.
    params, identity
        How its tokens are chosen (see ``RowChooser``).
    """

    request: int
    prompt_ids: tuple[int, ...]
    params: RowParams
    identity: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeNews:
    """What has happened on a node.

    Parameters
    ----------
    finished
        Requests that have ended since the last news, by their numbers in the job.
    wanted
        Requests that the node has room for.
    beats
        Steps of the run so far: pieces of weights that were loaded, and layers of batches that were
        computed. A node whose beats stand still hangs.
    error
        What has ended the run, in one line; ``None`` as long as it goes on.
    """

    finished: tuple[Finished, ...] = ()
    wanted: int = 0
    beats: int = 0
    error: str | None = None
