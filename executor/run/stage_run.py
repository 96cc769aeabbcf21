"""The passes of one stage of a pipeline, which another process plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from costmodel.schedule.pass_lanes import PassLanes
from executor.run.finished import Finished
from executor.run.lane_run import LOADS, LaneRun
from executor.run.lanes import Integers, Lane
from executor.run.results import BlockResult
from executor.stores.pass_rows import RowBytes
from profiles import kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class NewLane:
    """A sequence that begins in a pass.

    Parameters
    ----------
    number
        Its lane, among those of all blocks in flight.
    request, prompt, max_tokens
        As in ``Lane``.
    """

    number: int
    request: int
    prompt: Integers
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePass:
    """One pass over a block, as all stages of a pipeline run it.

    Parameters
    ----------
    tokens, ended
        What the last pass over the same block has chosen, by lane, and the lanes that it has ended.
        The last stage, which has chosen them, has no use for either.
    newcomers
        The sequences that begin.
    lanes
        All lanes of the pass, by their numbers among those of all blocks in flight.
    """

    tokens: Mapping[int, int]
    ended: tuple[int, ...]
    newcomers: tuple[NewLane, ...]
    lanes: PassLanes


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """What the last stage tells of a pass: see ``StagePass``; and the requests that have ended."""

    tokens: Mapping[int, int] = field(default_factory=dict)
    ended: tuple[int, ...] = ()
    finished: tuple[Finished, ...] = ()


class StageRun(LaneRun):
    """Runs passes over blocks in flight one after another; takes what ``LaneRun`` takes."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._num_passes = 0
        # Cuts outputs where their requests have ended.
        self._finish: Callable[[BlockResult], BlockResult] = lambda block: block

    def finish_with(self, finish: Callable[[BlockResult], BlockResult]) -> None:
        """Set what cuts outputs where their requests have ended, and tells of the requests."""
        self._finish = finish

    def load_ahead(self) -> None:
        """Begin to load the first layers, before there is a pass."""
        # This thread computes nothing; its OpenMP threads would slow the workers down.
        kernels.end_idle_threads()
        while (task := self._next()).kind in LOADS:
            self._engine.submit(task)
        self._ahead.appendleft(task)

    def run_pass(self, told: StagePass, rows: RowBytes | None) -> RowBytes | StageResult:
        """Run a pass.

        Parameters
        ----------
        rows
            Hidden states from the stage before; ``None`` for the first stage.

        Returns
        -------
        The hidden states for the next stage, or of the last stage what it has chosen.
        """
        start_s = time.perf_counter()
        has_head = self._policy.model.has_head
        if not has_head:
            self._follow(told)
        for new in told.newcomers:
            lane = Lane(
                request=new.request,
                prompt=new.prompt,
                max_tokens=new.max_tokens,
                chooser=self._chooser,
                eos_ids=self._eos_ids,
            )
            self._block.table.admit(new.number, lane)
        lanes = replace(told.lanes, batch_lanes=self._policy.gpu_batch_size)
        count = len(lanes.decoding) + len(lanes.newcomers)
        self._progress.begin_pass(count)
        self._run_pass(self._num_passes, lanes.batches, rows)
        self._num_passes += 1
        self._progress.end_pass(count, {})
        if not has_head:
            return self._block.stores.hidden.taken()
        ended = self._take()
        tokens = dict(self._block.head.chosen)
        finished: tuple[Finished, ...] = ()
        if ended:
            finished = self._finish(self._result(ended, 1, start_s)).finished
        self._block.table.release(ended)
        return StageResult(tokens=tokens, ended=tuple(ended), finished=finished)

    def _follow(self, told: StagePass) -> None:
        """Give lanes the tokens that the last stage has chosen."""
        table = self._block.table
        for number, token in told.tokens.items():
            lane = table.lanes[number]
            lane.length = len(lane.prompt) + len(lane.generated)
            lane.generated.append(token)
        table.release(told.ended)


def moved_by(lanes: PassLanes, offset: int) -> PassLanes:
    """Return the lanes of a pass of one block, numbered among those of all blocks."""
    decoding, newcomers, waiting = (
        np.asarray(x, np.int64) + offset for x in (lanes.decoding, lanes.newcomers, lanes.waiting)
    )
    return replace(lanes, decoding=decoding, newcomers=newcomers, waiting=waiting)
