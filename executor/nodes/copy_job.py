"""A job of copies, each on one node or on those of a pipeline, which take prompts as they can."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

from costmodel.cluster.plan import ClusterPlan
from costmodel.plan.prefixes import Prefixes
from costmodel.schedule.admission import longest_first
from executor.cli.cluster_bar import ClusterBar
from executor.cli.job_options import JobOptions
from executor.jobs.job_run import JobRun
from executor.nodes.cluster_trace import ClusterTrace
from executor.nodes.copy_plan import (
    CopyPlanner,
    PlannedOnNodes,
    lacks_of,
    name_of,
    with_workload,
)
from executor.nodes.copy_run import CopyNode, CopyRun
from executor.nodes.facts import NodeFacts, check_alike, no_nodes_left, own_facts
from executor.nodes.pipeline_actors import PipelineActors
from executor.nodes.pipeline_plan import check_pipeline, stage_policy
from executor.nodes.ray_nodes import NodeActor, folder_on, outcomes, ray_nodes
from executor.nodes.share import Handed, NodeJob, NodePlan, StageJob
from profiles.errors import InputError, RunError
from profiles.hardware import HardwareProfile
from profiles.units import format_count, format_figure

logger = logging.getLogger(__name__)

# A machine with much to do takes long to start a process.
LEAST_START_S = 120.0


class CopyJob:
    """The nodes of a job and their processes. A context manager.

    Parameters
    ----------
    model
        The checkpoint, by its path on every node: a shared folder, or a copy on each.
    only
        Names of the nodes to use; all where there is none.
    timeout_s
        A node with work that makes no step for so long has failed.
    profiles
        Those of nodes, by name, where they are known.
    plan
        What each node runs; ``None`` lets every node search a policy for the whole model.
    trace
        The file of a timeline to write.
    """

    def __init__(
        self,
        model: Path,
        *,
        only: Sequence[str] = (),
        timeout_s: float,
        profiles: Mapping[str, HardwareProfile] | None = None,
        plan: ClusterPlan | None = None,
        trace: Path | None = None,
    ) -> None:
        # A node's process has a working folder of its own.
        self._model, self._timeout_s = Path(model).absolute(), timeout_s
        copies = plan.copies if plan else ()
        self._pipelines = [copy for copy in copies if len(copy.stages) > 1]
        for copy in self._pipelines:
            check_pipeline(copy, self._model)
        found = ray_nodes(only)
        if not found:
            raise InputError("nodes", got="none that runs anything", allowed="one or more")
        self._actors = [NodeActor(node) for node in found]
        policies = {c.stages[0].node: c.stages[0].policy for c in copies if len(c.stages) == 1}
        self._staged = {stage.node for copy in self._pipelines for stage in copy.stages}
        self._planner = CopyPlanner(
            [actor for actor in self._actors if actor.name not in self._staged],
            self._model,
            profiles or {},
            policies,
            self._pipelines,
            plan.links if plan else None,
            timeout_s=timeout_s,
        )
        self._nodes: list[CopyNode] = []
        self._trace = ClusterTrace(trace, len(self._actors)) if trace else None
        self._seconds = 0.0

    def __enter__(self) -> CopyJob:
        try:
            named = self._ask_facts()
            self._facts = own_facts(self._model)
            check_alike([("this machine", self._facts), *named], self._model)
        except BaseException:
            self.close()
            raise
        return self

    def _ask_facts(self) -> list[tuple[str, NodeFacts]]:
        """Ask all nodes what they are, and leave out those that fail.

        Raises
        ------
        RunError
            Where the last node fails, and for a node that has a stage of the plan.
        """
        calls = [actor.handle.facts.remote(self._model) for actor in self._actors]
        named: list[tuple[str, NodeFacts]] = []
        failed: list[tuple[NodeActor, RunError]] = []
        for actor, found in outcomes(self._actors, calls, max(self._timeout_s, LEAST_START_S)):
            if isinstance(found, NodeFacts):
                named.append((actor.name, found))
            elif isinstance(found, RunError):
                failed.append((actor, found))
            else:
                raise found
        for actor, error in failed:
            if actor.name in self._staged:
                told = "a stage of the plan runs there; try: start the node again, then --resume"
                raise RunError(f"{error}; {told}")
            if not named:
                raise no_nodes_left(str(error))
            logger.warning("%s; it is left out", error)
            self._planner.leave_out(actor)
        return named

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes of all nodes."""
        for actor in self._actors:
            actor.end()

    def options(self, options: JobOptions) -> JobOptions:
        """Return options by which the nodes plan a job."""
        told: dict[str, Any] = {
            field.name: getattr(options, field.name) for field in fields(options)
        }
        told["offload_dir"] = options.offload_dir.absolute()
        self._options = PlannedOnNodes(**told, planner=self._planner)
        return self._options

    def begin(self, job: JobRun) -> None:
        """Prepare a job that was planned with these options."""
        lengths = job.job.run_lengths()
        self._lengths, workload = lengths, job.job.policy.workload
        actors: list[NodeActor | PipelineActors] = [*self._actors, *self._pipeline_actors()]
        for actor in actors:
            plan = self._planner.plans.get(actor.name)
            if plan is None:
                continue
            plan = with_workload(plan, workload)
            shares = self._options.shares_prefixes and plan.policy.shares_prefixes
            node_job = NodeJob(
                model=self._model,
                plan=plan,
                offload_dir=folder_on(self._options.offload_dir, actor.name),
                lengths=lengths if shares else lengths.sharing(Prefixes.none(len(lengths))),
                num_spans=self._num_spans,
            )
            self._nodes.append(CopyNode(actor=actor, job=node_job, lacks=lacks_of(plan, lengths)))

    @property
    def _num_spans(self) -> int:
        return self._trace.num_spans if self._trace else 0

    def _pipeline_actors(self) -> Iterator[PipelineActors]:
        by_name = {actor.name: actor for actor in self._actors}
        for copy in self._pipelines:
            jobs = []
            # Nodes are planned for the same work as the pipeline is.
            workload = self._planner.plans[name_of(copy)].policy.workload
            for place, stage in enumerate(copy.stages):
                policy = stage_policy(copy, place, workload)
                assert policy.hardware is not None
                jobs.append(
                    StageJob(
                        model=self._model,
                        policy=policy,
                        hardware=policy.hardware,
                        offload_dir=folder_on(self._options.offload_dir, stage.node),
                        num_spans=self._num_spans,
                        facts=self._facts,
                    )
                )
            stages = [by_name[stage.node] for stage in copy.stages]
            yield PipelineActors(stages, jobs, self._actors)

    def run(self, job: JobRun) -> None:
        """Run it, and write each answer as its requests end."""
        table, prompts = job.read.table, job.prompts

        def handed(number: int) -> Handed:
            row = prompts.rows[number]
            return Handed(
                request=number,
                prompt_ids=tuple(prompts[number]),
                params=table.params(row),
                identity=table.identities[row],
            )

        order = longest_first(self._lengths).tolist()
        running = CopyRun(self._nodes, handed, order, self._timeout_s)
        if self._trace:
            self._trace.begin([a for node in self._nodes for a in node.actor.members])
        start_s = time.perf_counter()
        bar = ClusterBar(self._lengths, len(self._nodes))
        with closing(running), bar, job.answering() as take:
            bar.begin()
            for finished in running.run():
                take(finished)
                bar.ended(finished)
            self._seconds = time.perf_counter() - start_s
            if self._trace:
                self._trace.take(running.actors)
        if self._trace:
            self._trace.write()

    def describe_plan(self) -> str:
        """Return what each node is predicted to do."""
        count = len(self._nodes)
        lines = ["one copy of the model:" if count == 1 else f"{count} copies of the model:"]
        lines += [f"  {node.name}: {_told(node.job.plan)}" for node in self._nodes]
        total = sum(node.predicted for node in self._nodes)
        return "\n".join([*lines, f"  together {format_figure(total)} token/s predicted"])

    def describe_run(self) -> str:
        """Return what each node has done."""
        lines = []
        for node in self._nodes:
            told = f"  {node.name}: {format_count(node.num_answered, 'prompt')} answered"
            told += f", {format_figure(node.num_tokens / self._seconds)} token/s"
            if node.num_failures:
                told += f", failed {format_count(node.num_failures, 'time')}"
            lines.append(told)
        total = sum(node.num_tokens for node in self._nodes) / self._seconds
        told = f"  together {format_figure(total)} token/s, loading included"
        return "\n".join([f"measured in {format_figure(self._seconds)} s:", *lines, told])

    def as_json(self) -> dict[str, Any]:
        """Return the figures of the run."""
        return {
            "seconds": self._seconds,
            "nodes": [
                {
                    "name": node.name,
                    "answered": node.num_answered,
                    "output_tokens": node.num_tokens,
                    "failures": node.num_failures,
                    "predicted_tok_per_s": node.predicted,
                }
                for node in self._nodes
            ],
        }


def _told(plan: NodePlan) -> str:
    policy = plan.policy
    kind = "blocks of" if policy.lanes is None else "lanes"
    rate = format_figure(plan.predicted.throughput_tok_per_s)
    return f"{kind} {policy.block_size}, {rate} token/s predicted"
