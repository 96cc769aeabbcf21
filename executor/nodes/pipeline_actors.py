"""The processes of one pipeline: one for each stage, and one that directs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from executor.nodes.ray_nodes import NodeActor, ray_nodes
from executor.nodes.share import NodeJob, StageJob


class PipelineActors:
    """Starts and ends the processes of all stages together, as ``NodeActor`` does with one.

    Parameters
    ----------
    stages
        The actors of the stages, in the order of their layers.
    jobs
        What each of them runs.
    in_use
        All actors of the job. A node without one may take the place of a node that is lost.
    """

    def __init__(
        self, stages: Sequence[NodeActor], jobs: Sequence[StageJob], in_use: Sequence[NodeActor]
    ) -> None:
        self._stages, self._jobs, self._in_use = list(stages), jobs, in_use
        self._director: NodeActor | None = None

    @property
    def name(self) -> str:
        """The names of the nodes of all stages."""
        return "+".join(stage.name for stage in self._stages)

    @property
    def members(self) -> Sequence[NodeActor]:
        """The actors that compute: those of the stages."""
        return self._stages

    @property
    def handle(self) -> Any:
        """The actor that takes requests."""
        assert self._director is not None
        return self._director.handle

    def begin(self) -> None:
        """Start the processes again."""
        for stage in self._stages:
            stage.begin()

    def start(self, job: NodeJob) -> Any:
        """Call for the start of a job."""
        # Tokens come back to the node of the first stage, which needs them.
        self._director = NodeActor(self._stages[0].node, is_director=True)
        stages = [stage.handle for stage in self._stages]
        return self.handle.start_pipeline.remote(job, stages, self._jobs)

    def end(self) -> None:
        """End all processes."""
        if self._director is not None:
            self._director.end()
        for stage in self._stages:
            stage.end()

    def find_node(self) -> bool:
        """Replace lost nodes by ones without work; returns whether each stage has a node."""
        for stage in self._stages:
            if stage.find_node():
                continue
            taken = {actor.node.node_id for actor in self._in_use}
            spare = next((node for node in ray_nodes() if node.node_id not in taken), None)
            if spare is None:
                return False
            stage.node = spare
        return True
