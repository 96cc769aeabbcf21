"""One stage of a pipeline: some layers, and the passes that another process plans. No Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from executor.checkpoint.folder import Checkpoint
from executor.engine.trace import Span
from executor.nodes.handed_chooser import handed_chooser
from executor.nodes.share import Handed, StageJob
from executor.run.results import BlockResult, Progress
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
    progress
        Told of each piece of weights that is loaded.
    """

    def __init__(
        self,
        job: StageJob,
        on_span: Callable[[Span], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        source = Checkpoint.open(job.model, dtype=job.policy.model.dtype)
        self._held: dict[int, Handed] = {}
        self._chooser = handed_chooser(job.model, self._held)
        runner = Runner(
            job.policy,
            job.hardware,
            source.of_stage(job.policy.model),
            job.offload_dir,
            sampler=self._chooser,
            progress=progress,
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


class StageLoading(Progress):
    """Loads a stage in a thread of its own, so that its process can tell how far that is.

    Takes what ``StageEngine`` takes.
    """

    def __init__(self, job: StageJob, on_span: Callable[[Span], None] | None = None) -> None:
        self._beats = 0
        self._stage: StageEngine | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._load, args=(job, on_span), name="stage", daemon=True
        )
        self._thread.start()

    def beats(self) -> int | None:
        """Return how many pieces of weights are loaded; ``None`` when the stage is ready.

        Raises what has ended the loading.
        """
        if self._thread.is_alive():
            return self._beats
        self.stage()
        return None

    def stage(self) -> StageEngine:
        """Return the stage, when it is loaded; raises what has ended the loading."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._stage is not None
        return self._stage

    def loaded(self, num_bytes: int) -> None:
        """Count a piece of weights."""
        self._beats += 1

    def _load(self, job: StageJob, on_span: Callable[[Span], None] | None) -> None:
        try:
            self._stage = StageEngine(job, on_span, self)
        except BaseException as error:
            self._error = error
