"""The report of a run as a page: it keeps the first tasks, and is made when the run has ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from costmodel.plan.policy import Policy
from costmodel.pricing.memory import phases_of
from costmodel.report.run_record import RunRecord
from costmodel.report.task_sample import TaskSample
from executor.engine.trace import Span
from executor.run.recorder import Recorder, written_at_end
from executor.run.results import BlockResult


class PageRecorder:
    """Keeps the first tasks of the first block; made by ``open_page``."""

    def __init__(self, policy: Policy) -> None:
        self.sample = TaskSample(phases=phases_of(policy))
        self._has_lanes = policy.lanes is not None
        self.is_complete = False
        self._run: RunRecord | None = None
        self._lock = threading.Lock()
        self._is_first = True

    def start(self) -> None:
        """Do nothing: the first block says when it began."""

    def record(self, span: Span) -> None:
        """Take one span; called by the workers."""
        if self._is_first:
            with self._lock:
                self.sample.add(
                    span.task,
                    span.start_s,
                    span.end_s,
                    num_bytes=span.num_bytes,
                    blocked_s=span.blocked_s,
                )

    def end_block(self) -> None:
        """Take no more tasks; passes over lanes have no blocks."""
        self._is_first = self._has_lanes

    def finish(self, results: Sequence[BlockResult], record: RunRecord, start_s: float) -> None:
        """Count time from the start of the run, and take the figures."""
        self.sample = self.sample.counted_from(start_s)
        self._run = record
        self.is_complete = True

    def write(self, path: Path) -> None:
        """Write the page of a run that is complete."""
        # Only those who ask wait for the import of what draws.
        from costmodel.report.page import write_run_page

        assert self._run is not None
        write_run_page(path, self._run, self.sample)


@contextmanager
def open_page(path: Path, policy: Policy) -> Iterator[PageRecorder]:
    """Keep what a page shows; it is written under ``path`` if the run in the block ends well."""
    recorder = PageRecorder(policy)
    with written_at_end(recorder, lambda: recorder.write(path)):
        yield recorder


class Recorders:
    """Several recorders as one."""

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self._recorders = recorders
        self.is_complete = False

    def start(self) -> None:
        """See ``Recorder``."""
        for recorder in self._recorders:
            recorder.start()

    def record(self, span: Span) -> None:
        """See ``Recorder``."""
        for recorder in self._recorders:
            recorder.record(span)

    def end_block(self) -> None:
        """See ``Recorder``."""
        for recorder in self._recorders:
            recorder.end_block()

    def finish(self, results: Sequence[BlockResult], record: RunRecord, start_s: float) -> None:
        """See ``Recorder``."""
        for recorder in self._recorders:
            recorder.finish(results, record, start_s)
        self.is_complete = True
