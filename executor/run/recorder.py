"""The timeline of a run as a file: the measured one beside the simulated one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from costmodel.plan.cuts import policy_layers
from costmodel.plan.policy import Policy
from costmodel.pricing.memory import phases_of
from costmodel.report.run_record import RunRecord
from costmodel.schedule.chrome_trace import TraceFile, begin_trace
from costmodel.schedule.timeline import simulate
from executor.engine.trace import Span
from executor.run.results import BlockResult
from profiles.errors import InputError, RunError
from profiles.files import to_json
from profiles.hardware import HardwareProfile
from profiles.outputs import spare_folders, write_output
from profiles.spool import Spool

MEASURED, SIMULATED, MEASURED_PASSES, SIMULATED_PASSES = 1, 2, 3, 4
# Layers times batches times tokens in one file. Each is about ten tasks; viewers and the memory of
# the simulation set the limit.
MAX_TRACED_LAYERS = 50_000
# Spans are written in groups. Written one by one between tasks, with cold caches, each takes three
# times as long.
HELD_SPANS = 256

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedBlock:
    """A block of a job, and the number of its first tokens in the file."""

    policy: Policy
    num_tokens: int


def plan_trace(policies: Sequence[Policy], *, has_gpu: bool) -> list[TracedBlock]:
    """Choose the first tokens of a job that fit in a file, block after block. Of lanes, whose
    passes nobody knows before, as many as fit.

    Raises
    ------
    InputError
        Where not even one token fits.
    """
    blocks, room = [], MAX_TRACED_LAYERS
    for policy in policies:
        per_token = len(policy_layers(policy, has_gpu=has_gpu)) * policy.num_gpu_batches
        wanted = room if policy.lanes else policy.workload.gen_len
        num_tokens = min(wanted, room // per_token)
        room = room - num_tokens * per_token if num_tokens == policy.workload.gen_len else 0
        blocks.append(TracedBlock(policy=policy, num_tokens=num_tokens))
    if not blocks[0].num_tokens:
        raise InputError(
            "--trace",
            got=f"{per_token} layers and batches in a token",
            allowed=f"at most {MAX_TRACED_LAYERS}",
            hint="running without it",
        )
    return blocks


class Recorder(Protocol):
    """Takes the tasks of a run when they end, and the run's figures at its end."""

    # Whether ``finish`` was called.
    is_complete: bool

    def start(self) -> None:
        """Set the time zero: the weights are loaded, and the first block begins."""

    def record(self, span: Span) -> None:
        """Take one span; workers call this."""

    def end_block(self) -> None:
        """Go on to the next block, after the last task of this one."""

    def finish(self, results: Sequence[BlockResult], record: RunRecord, start_s: float) -> None:
        """Take the blocks that ran and the record of the run, which has released its memory.

        Lanes leave no blocks. ``start_s`` is when the first block or pass began.
        """


class TraceRecorder:
    """Writes spans when they end and keeps few in memory; ``open_recorder`` makes one."""

    def __init__(
        self, file: TraceFile, blocks: Sequence[TracedBlock], hardware: HardwareProfile
    ) -> None:
        self._file = file
        self._blocks = blocks
        self._hardware = hardware
        self._lock = threading.Lock()
        self._held: list[Span] = []
        self._block = 0
        self._num_tokens = blocks[0].num_tokens
        self._zero_s = time.perf_counter()
        self.is_complete = False
        self._run: RunRecord | None = None
        file.begin_process(MEASURED, "measured")

    def start(self) -> None:
        """Set time zero: the weights are loaded and the first block begins."""
        self._zero_s = time.perf_counter()

    def record(self, span: Span) -> None:
        """Record one span; the workers of all channels call it."""
        if span.task.token >= self._num_tokens:
            return
        with self._lock:
            self._held.append(span)
            if len(self._held) == HELD_SPANS:
                self._write()

    def end_block(self) -> None:
        """Continue with the next block; called when no task of this one is left. Over lanes, some
        sequences have ended, and the same passes go on."""
        if self._blocks[0].policy.lanes:
            return
        self._write()
        self._block += 1
        more = self._block < len(self._blocks)
        self._num_tokens = self._blocks[self._block].num_tokens if more else 0

    def _write(self) -> None:
        for span in self._held:
            figures: dict[str, float] = {"block": self._block, "blocked_s": span.blocked_s}
            if span.num_bytes:
                seconds = max(span.end_s - span.start_s, 1e-9)
                figures |= {"bytes": span.num_bytes, "gb_per_s": span.num_bytes / seconds / 1e9}
            self._file.add(MEASURED, span, zero_s=self._zero_s, **figures)
        self._held.clear()

    def finish(self, results: Sequence[BlockResult], record: RunRecord, start_s: float) -> None:
        """Simulate the same tokens of each block, and write them at the block's measured start.

        Of lanes, the passes are written, measured and simulated.
        """
        self._run = record
        self.is_complete = True
        if record.lanes is not None:
            self._write()
            for pid, series, label in (
                (MEASURED_PASSES, record.lanes.measured, "passes, measured"),
                (SIMULATED_PASSES, record.lanes.simulated, "passes, simulated"),
            ):
                self._file.begin_passes(pid, label)
                series.write_to(self._file, pid, zero_s=start_s - self._zero_s)
            return
        self._file.begin_process(SIMULATED, "simulated")
        for number, (block, result) in enumerate(zip(self._blocks, results, strict=True)):
            if not block.num_tokens:
                break
            # A block ends early where all its sequences have ended.
            num_tokens = min(block.num_tokens, result.num_tokens)
            # One token more: the last one of a schedule does not prepare for another.
            timeline = simulate(block.policy, self._hardware, num_passes=num_tokens + 1)
            for timed in timeline.tasks:
                if timed.task.token < num_tokens:
                    zero_s = self._zero_s - result.start_s
                    self._file.add(SIMULATED, timed, zero_s=zero_s, block=number)

    def end_file(self) -> None:
        """Close the file with the record of the run, which ``executor.report`` reads."""
        self._file.end(run=to_json(self._run))


@contextmanager
def open_recorder(
    path: Path, policies: Sequence[Policy], hardware: HardwareProfile
) -> Iterator[TraceRecorder]:
    """Open the timeline of a job, which appears at ``path`` if the run succeeds.

    Until then it is in an unnamed file, so that a full disk does not end the run.
    """
    blocks = plan_trace(policies, has_gpu=hardware.has_gpu)
    traced = sum(block.num_tokens for block in blocks)
    total = sum(block.policy.workload.gen_len for block in blocks)
    notes, has_lanes = "", policies[0].lanes is not None
    if has_lanes:
        notes = f"holds the tasks of at most the first {traced} passes over the model"
    elif traced < total:
        notes = f"holds the first {traced} of {total} passes over the model"
        _log.warning("%s %s", path, notes)
    with Spool(f"trace {path}", spare_folders(path)) as spool:
        file = begin_trace(spool.write, notes=notes, phases=phases_of(policies[0]))
        recorder = TraceRecorder(file, blocks, hardware)
        with written_at_end(recorder, lambda: _write(path, recorder, spool)):
            yield recorder


@contextmanager
def written_at_end(recorder: Recorder, write: Callable[[], None]) -> Iterator[None]:
    """Call ``write`` at the end of the block, also after an error if the run was complete: then
    only its printed report failed."""
    try:
        yield
    except BaseException:
        if recorder.is_complete:
            try:
                write()
            except RunError as late:
                # What ended the run is told last, and decides the exit status.
                _log.error("%s", late)
        raise
    if recorder.is_complete:
        write()


def _write(path: Path, recorder: TraceRecorder, spool: Spool) -> None:
    recorder.end_file()
    write_output(path, spool.copy_into)
