"""One stage of a pipeline: some layers, and the passes that another process plans. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from executor.checkpoint.folder import Checkpoint
from executor.engine.trace import Span
from executor.nodes.handed_chooser import handed_chooser
from executor.nodes.share import Handed, StageJob
from executor.run.results import BlockResult
from executor.run.runner import Runner
from executor.run.stage_run import StagePass, StageResult
from executor.stores.pass_rows import RowBytes


class StageEngine:
    """Loads the weights of a stage, and runs its passes.

    Parameters
    ----------
    job
        What it runs.
    on_span
        Called with each ended task.
    """

    def __init__(self, job: StageJob, on_span: Callable[[Span], None] | None = None) -> None:
        source = Checkpoint.open(job.model, dtype=job.policy.model.dtype)
        self._held: dict[int, Handed] = {}
        self._chooser = handed_chooser(job.model, self._held)
        runner = Runner(
            job.policy,
            job.hardware,
            source.of_stage(job.policy.model),
            job.offload_dir,
            sampler=self._chooser,
            on_span=on_span,
        )
        self._resources = ExitStack()
        self._run = self._resources.enter_context(runner).stage_run()
        self._run.finish_with(self._finish)
        self._run.load_ahead()

    def run_pass(
        self, told: StagePass, rows: RowBytes | None, chosen: Sequence[Handed]
    ) -> RowBytes | StageResult:
        """Run a pass (see ``StageRun.run_pass``); ``chosen`` are requests that begin in it."""
        self._held.update((each.request, each) for each in chosen)
        return self._run.run_pass(told, rows)

    def close(self) -> None:
        """Give back the memory and the threads of the stage."""
        self._resources.close()

    def _finish(self, block: BlockResult) -> BlockResult:
        block = self._chooser.finish(block)
        for done in block.finished:
            del self._held[done.request]
        return block
