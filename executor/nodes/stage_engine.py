"""One stage of a pipeline: some layers, and the passes that another process plans. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from executor.checkpoint.folder import Checkpoint
from executor.checkpoint.opening import open_checkpoint
from executor.engine.trace import Span
from executor.jobs.endings import RowChooser
from executor.jobs.params import RowParams
from executor.nodes.share import Handed, StageJob
from executor.run.results import BlockResult
from executor.run.runner import Runner
from executor.run.stage_run import StagePass, StageResult
from executor.stores.pass_rows import RowBytes
from executor.text.loading import load_tokenizer
from profiles.errors import InputError


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
        source = open_checkpoint(job.model, dtype=job.policy.model.dtype)
        if not isinstance(source, Checkpoint):
            raise InputError(
                f"model {job.model}",
                got="a GGUF file over several stages",
                allowed="a Hugging Face folder",
                hint="copies, one on each node",
            )
        self._params: dict[int, RowParams] = {}
        self._identities: dict[int, int] = {}
        tokenizer = cache(lambda: load_tokenizer(job.model))
        self._chooser = RowChooser(
            self._params, self._identities, lambda ids: tokenizer().decode(ids)
        )
        self._runner = Runner(
            job.policy,
            job.hardware,
            source.of_stage(job.policy.model),
            job.offload_dir,
            sampler=self._chooser,
            on_span=on_span,
        )
        self._runner.__enter__()
        self._run = self._runner.stage_run()
        self._run.finish_with(self._finish)
        self._run.load_ahead()

    def run_pass(
        self, told: StagePass, rows: RowBytes | None, chosen: Sequence[Handed]
    ) -> RowBytes | StageResult:
        """Run a pass (see ``StageRun.run_pass``); ``chosen`` are requests that begin in it."""
        for each in chosen:
            self._params[each.request] = each.params
            self._identities[each.request] = each.identity
        return self._run.run_pass(told, rows)

    def _finish(self, block: BlockResult) -> BlockResult:
        block = self._chooser.finish(block)
        for done in block.finished:
            del self._params[done.request], self._identities[done.request]
        return block
