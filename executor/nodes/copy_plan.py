"""The policy of every node of a job of copies, each searched on its node."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from costmodel.cluster.estimate import estimate_pipeline
from costmodel.cluster.nodes import FREE_LINK, Links, Node
from costmodel.cluster.plan import CopyPlan
from costmodel.model.spec import ModelSpec
from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import Policy, Prediction
from costmodel.plan.workload import Workload
from executor.checkpoint.opening import OpenedCheckpoint
from executor.cli.job_options import JobOptions
from executor.jobs.lane_room import room_lacks
from executor.jobs.planning import CHOSEN, chosen_before
from executor.nodes.pipeline_plan import stage_policy, whole_policy
from executor.nodes.ray_nodes import NodeActor, folder_on, outcomes
from executor.nodes.share import NodePlan
from profiles.errors import InfeasibleError, InputError, ZigzagError
from profiles.hardware import HardwareProfile

logger = logging.getLogger(__name__)


# A node may measure itself before it plans, which takes minutes.
LEAST_PLANNING_S = 900.0


class CopyPlanner:
    """Lets every node plan the whole job for itself.

    Parameters
    ----------
    actors
        The nodes. One that fails is left out from then on.
    model
        The checkpoint, by its path on every node.
    profiles, policies
        Those of nodes, by name, where they are known; others measure themselves and search.
    pipelines
        Copies whose layers are cut over several nodes.
    links
        The network between these; ``None`` costs nothing.
    timeout_s
        A node that gives no plan for so long has failed; not before ``LEAST_PLANNING_S``.

    Attributes
    ----------
    plans
        By the name of each node or pipeline that can run the job, from the last call of ``plan``.
    """

    def __init__(
        self,
        actors: Sequence[NodeActor],
        model: Any,
        profiles: Mapping[str, HardwareProfile],
        policies: Mapping[str, Policy],
        pipelines: Sequence[CopyPlan] = (),
        links: Links | None = None,
        timeout_s: float = LEAST_PLANNING_S,
    ) -> None:
        self._actors, self._model = list(actors), model
        self._timeout_s = max(timeout_s, LEAST_PLANNING_S)
        self._profiles, self._policies = profiles, policies
        self._pipelines, self._links = pipelines, links or Links(default=FREE_LINK)
        self.plans: dict[str, NodePlan] = {}

    def plan(self, options: JobOptions, model: ModelSpec, workload: Workload) -> NodePlan:
        """Plan on all nodes; returns the plan with the most room for a request.

        Raises
        ------
        InfeasibleError, RunError
            Where no node can run the job, or all have failed: that of the last node.
        """
        plans, refused = self._ask(self._actors, options, workload)
        for copy in self._pipelines:
            plans[name_of(copy)] = _pipeline(copy, model, workload, self._links)
        if not plans:
            raise refused[-1]
        best = max(plans.values(), key=_room)
        others = [a for a in self._actors if a.name in plans and not _alike(plans[a.name], best)]
        if others:
            # All nodes must make the same tokens.
            made = best.policy
            told = {name: getattr(made, name) for name in CHOSEN}
            permitted = chosen_before(options.permitted, told)
            alike = replace(options, dtype=made.model.dtype, permitted=permitted)
            again, refused_again = self._ask(others, alike, workload)
            for actor in others:
                del plans[actor.name]
            plans |= {name: found for name, found in again.items() if _alike(found, best)}
            refused += refused_again
        for error in refused:
            logger.warning("%s; it is left out", error)
        self.plans = plans
        return best

    def leave_out(self, actor: NodeActor) -> None:
        """Plan without a node from now on, and end its process."""
        self._actors.remove(actor)
        actor.end()

    def _ask(
        self, actors: Sequence[NodeActor], options: JobOptions, workload: Workload
    ) -> tuple[dict[str, NodePlan], list[ZigzagError]]:
        actors = list(actors)
        calls = [
            actor.handle.plan.remote(self._model, self._options_of(actor.name, options), workload)
            for actor in actors
        ]
        plans: dict[str, NodePlan] = {}
        refused: list[ZigzagError] = []
        for actor, found in outcomes(actors, calls, self._timeout_s):
            if isinstance(found, NodePlan):
                plans[actor.name] = found
            elif isinstance(found, InfeasibleError):
                refused.append(InfeasibleError(f"node {actor.name}: {found}"))
            elif isinstance(found, InputError):
                raise found.inside(f"node {actor.name}") from found
            else:
                refused.append(found)
                self.leave_out(actor)
        return plans, refused

    def _options_of(self, name: str, options: JobOptions) -> JobOptions:
        """Return what a node plans by, of types that need no driver."""
        return JobOptions(
            policy=self._policies.get(name, options.policy),
            hardware=self._profiles.get(name, options.hardware),
            offload_dir=folder_on(options.offload_dir, name),
            gpu_memory=options.gpu_memory,
            cpu_memory=options.cpu_memory,
            disk=options.disk,
            dtype=options.dtype,
            permitted=options.permitted,
            shares_prefixes=options.shares_prefixes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedOnNodes(JobOptions):
    """Options of a job that nodes plan and run."""

    planner: CopyPlanner

    @property
    def runs_here(self) -> bool:
        """Whether this machine runs the job."""
        return False

    def choose_policy(
        self, source: OpenedCheckpoint, workload: Workload
    ) -> tuple[Policy, HardwareProfile, OpenedCheckpoint]:
        """Return the plan of the node with the most room."""
        model = source.spec.with_dtype(self.policy.model.dtype) if self.policy else source.spec
        best = self.planner.plan(self, model, workload)
        return best.policy, best.hardware, source.in_dtype(best.policy.model.dtype)


def name_of(copy: CopyPlan) -> str:
    """Return the names of the nodes of a pipeline."""
    return "+".join(stage.node for stage in copy.stages)


def _pipeline(copy: CopyPlan, model: ModelSpec, workload: Workload, links: Links) -> NodePlan:
    """Plan a pipeline, and price it for the job at hand, as nodes price their own policies."""
    policies = [stage_policy(copy, place, workload) for place in range(len(copy.stages))]
    nodes = []
    for stage in copy.stages:
        assert stage.policy.hardware is not None
        nodes.append(Node(name=stage.node, hardware=stage.policy.hardware))
    found = estimate_pipeline(policies, nodes, links)
    return NodePlan(
        policy=whole_policy(copy, model, workload),
        hardware=nodes[0].hardware,
        predicted=Prediction(
            throughput_tok_per_s=found.throughput_tok_per_s,
            latency_s=found.prefill_s + found.decode_s,
            prefill_s=found.prefill_s,
            decode_s=found.decode_s,
            lower_bound_s=0.0,
            bottleneck=found.limit,
            channel_s={},
            peak_bytes={},
        ),
    )


def with_workload(plan: NodePlan, workload: Workload) -> NodePlan:
    """Return a plan for the requests that run; a policy without lanes has made room for them."""
    if plan.policy.lanes is None:
        return plan
    return replace(plan, policy=replace(plan.policy, workload=workload))


def lacks_of(plan: NodePlan, lengths: Lengths) -> frozenset[int]:
    """Return the requests that have no room on a node."""
    return frozenset(room_lacks(plan.policy, lengths))


def _room(plan: NodePlan) -> tuple[float, float]:
    lanes = plan.policy.lanes
    tokens = float("inf") if lanes is None else lanes.pool_tokens
    return tokens, plan.predicted.throughput_tok_per_s


def _alike(plan: NodePlan, other: NodePlan) -> bool:
    names = (*CHOSEN, "model")
    return all(getattr(plan.policy, name) == getattr(other.policy, name) for name in names)
