"""The processes of one pipeline: one for each stage, and one that directs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from executor.nodes.ray_nodes import NodeActor, RayNode
from executor.nodes.share import NodeJob, StageJob


class PipelineActors:
    """Starts and ends the processes of all stages together, as ``NodeActor`` does with one.

    Parameters
    ----------
    stages
        The actors of the stages, in the order of their layers.
    jobs
        What each of them runs.
    spares
        Nodes without work; one of them takes the place of a node that is lost.
    """

    def __init__(
        self, stages: Sequence[NodeActor], jobs: Sequence[StageJob], spares: list[RayNode]
    ) -> None:
        self._stages, self._jobs, self._spares = list(stages), jobs, spares
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

    def is_node_alive(self) -> bool:
        """Whether all stages have a node: one without work replaces one that is lost."""
        for stage in self._stages:
            if not stage.is_node_alive():
                if not self._spares:
                    return False
                stage.node = self._spares.pop()
        return True
