"""A copy of the model whose layers are cut over several nodes: who runs in each pass, and when.

As many blocks are in flight as there are stages. While one stage computes a block, the others
compute the blocks before and behind it. Ray moves the hidden states from node to node: a stage gets
a reference to the result of the stage before it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from costmodel.plan.pages import PoolSizes
from costmodel.plan.prefixes import Prefixes
from costmodel.schedule.admission import Admission
from costmodel.schedule.pass_lanes import PassLanes
from executor.nodes.copy_engine import CopyEngine
from executor.nodes.ray_nodes import load_ray, told_failure
from executor.nodes.share import NodeJob, StageJob
from executor.run.stage_run import NewLane, StagePass, StageResult, moved_by

# Seconds between two looks at stages that load their weights.
LOADING_S = 0.2


@dataclass(slots=True)
class BlockInFlight:
    """The sequences that pass through the stages together.

    Parameters
    ----------
    first_lane
        The number of its first lane among those of all blocks.
    admission
        Which requests have its lanes.
    last
        What its last pass has chosen.
    """

    first_lane: int
    admission: Admission
    last: StageResult = field(default_factory=StageResult)

    @property
    def num_held(self) -> int:
        """Requests that it has."""
        return len(self.admission.lanes) + self.admission.num_waiting


class PipelineEngine(CopyEngine):
    """Answers requests with the stages of a pipeline.

    Parameters
    ----------
    job
        The job. The policy of its plan is that of the whole model, with the lanes of all blocks in
        flight and the cache of one (see ``whole_policy``).
    stages
        The actors of the stages, in the order of their layers.
    stage_jobs
        What each of them runs.
    """

    def __init__(self, job: NodeJob, stages: Sequence[Any], stage_jobs: Sequence[StageJob]) -> None:
        super().__init__(job)
        self._stages, self._stage_jobs = stages, stage_jobs

    def _run_job(self) -> None:
        ray = load_ray()
        try:
            self._open()
            self._run_passes()
            # Where a stage has failed, all of their processes are ended instead.
            ray.get([stage.close_stage.remote() for stage in self._stages])
        except ray.exceptions.RayError as error:
            raise told_failure("of a stage", error) from error

    def _open(self) -> None:
        """Load the weights of all stages. Each piece of one of them is a step."""
        ray = load_ray()
        pairs = zip(self._stages, self._stage_jobs, strict=True)
        ray.get([stage.open_stage.remote(job) for stage, job in pairs])
        opening, last = self._stages, [-1] * len(self._stages)
        while opening:
            beats = ray.get([stage.loading_beats.remote() for stage in opening])
            if beats != last:
                self._beat()
            loading = [pair for pair in zip(opening, beats, strict=True) if pair[1] is not None]
            opening, last = [stage for stage, _ in loading], [count for _, count in loading]
            if opening:
                time.sleep(LOADING_S)

    def _blocks_in_flight(self) -> list[BlockInFlight]:
        policy, count = self._policy, len(self._stages)
        assert policy.lanes is not None
        size = policy.block_size // count
        return [
            BlockInFlight(
                first_lane=place * size,
                admission=Admission(
                    self.lengths.sharing(Prefixes.none(len(self.lengths))),
                    PoolSizes.of(
                        policy.model, pool_tokens=policy.lanes.pool_tokens, most_lanes=size
                    ),
                    most_lanes=size,
                    batch_lanes=size,
                    pass_rows=policy.lanes.pass_rows,
                    is_handed_out=True,
                ),
            )
            for place in range(count)
        ]

    def _run_passes(self) -> None:
        ray = load_ray()
        blocks = self._blocks_in_flight()
        in_flight: dict[Any, BlockInFlight] = {}
        while True:
            self._share_out(blocks)
            resting = [block for block in blocks if block not in in_flight.values()]
            for block in resting:
                if (lanes := block.admission.plan()) is not None:
                    in_flight[self._send(block, lanes)] = block
            if not in_flight:
                return
            ready, _ = ray.wait(list(in_flight), num_returns=1)
            for call in ready:
                self._end_pass(in_flight.pop(call), ray.get(call))

    def _share_out(self, blocks: Sequence[BlockInFlight]) -> None:
        """Give each request that was handed out to the block with the fewest."""
        num_waiting = sum(block.admission.num_waiting for block in blocks)
        num_at_work = sum(len(block.admission.lanes) for block in blocks)
        for request in self.take(num_at_work, num_waiting):
            min(blocks, key=lambda block: block.num_held).admission.hand_out([request])

    def _send(self, block: BlockInFlight, lanes: PassLanes) -> Any:
        """Let a block pass through all stages; returns the call of the last one."""
        moved = moved_by(lanes, block.first_lane)
        pairs = zip(moved.newcomers.tolist(), lanes.requests.tolist(), strict=True)
        newcomers = [
            NewLane(
                number=number,
                request=request,
                prompt=np.asarray(self._held[request].prompt_ids, np.int64),
                max_tokens=int(self.lengths.limits[request]),
            )
            for number, request in pairs
        ]
        told = StagePass(
            tokens=block.last.tokens,
            ended=block.last.ended,
            newcomers=tuple(newcomers),
            lanes=moved,
        )
        chosen = [self._held[new.request] for new in newcomers]
        rows = None
        for stage in self._stages[:-1]:
            rows = stage.stage_pass.remote(told, rows)
        return self._stages[-1].stage_pass.remote(told, rows, chosen)

    def _end_pass(self, block: BlockInFlight, result: StageResult) -> None:
        self._beat()
        block.last = result
        block.admission.ended([lane - block.first_lane for lane in result.ended])
        self._take_finished(result.finished)
