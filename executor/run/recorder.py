"""The timeline of a run as a file: the measured one beside the simulated one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from costmodel.model.layout import model_layers
from costmodel.plan.policy import Policy
from costmodel.schedule.chrome_trace import TraceFile, begin_trace
from costmodel.schedule.timeline import simulate
from executor.engine.trace import Span
from executor.run.results import BlockResult
from profiles.errors import InputError, RunError
from profiles.hardware import HardwareProfile
from profiles.outputs import spare_folders, write_output
from profiles.spool import Spool

MEASURED, SIMULATED = 1, 2
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


def plan_trace(policies: Sequence[Policy]) -> list[TracedBlock]:
    """Choose the first tokens of a job that fit in a file, block after block.

    Raises
    ------
    InputError
        Where not even one token fits.
    """
    blocks, room = [], MAX_TRACED_LAYERS
    for policy in policies:
        per_token = len(model_layers(policy.model)) * policy.num_gpu_batches
        num_tokens = min(policy.workload.gen_len, room // per_token)
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


class Recorder:
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
        """Continue with the next block; called when no task of this one is left."""
        self._write()
        self._block += 1
        more = self._block < len(self._blocks)
        self._num_tokens = self._blocks[self._block].num_tokens if more else 0

    def _write(self) -> None:
        for span in self._held:
            figures: dict[str, float] = {"blocked_s": span.blocked_s}
            if span.num_bytes:
                seconds = max(span.end_s - span.start_s, 1e-9)
                figures |= {"bytes": span.num_bytes, "gb_per_s": span.num_bytes / seconds / 1e9}
            self._file.add(MEASURED, span, zero_s=self._zero_s, **figures)
        self._held.clear()

    def add_simulated(self, results: Sequence[BlockResult]) -> None:
        """Simulate the same tokens of each block, and write them at the block's measured start."""
        self._file.begin_process(SIMULATED, "simulated")
        for block, result in zip(self._blocks, results, strict=True):
            if not block.num_tokens:
                break
            # A block ends early where all its sequences have ended.
            num_tokens = min(block.num_tokens, result.num_tokens)
            # One token more: the last one of a schedule does not prepare for another.
            timeline = simulate(block.policy, self._hardware, num_passes=num_tokens + 1)
            for timed in timeline.tasks:
                if timed.task.token < num_tokens:
                    self._file.add(SIMULATED, timed, zero_s=self._zero_s - result.start_s)
        self.is_complete = True


@contextmanager
def open_recorder(
    path: Path, policies: Sequence[Policy], hardware: HardwareProfile
) -> Iterator[Recorder]:
    """Open the timeline of a job, which appears at ``path`` if the run succeeds.

    Until then it is in an unnamed file, so that a full disk does not end the run.
    """
    blocks = plan_trace(policies)
    traced = sum(block.num_tokens for block in blocks)
    total = sum(block.policy.workload.gen_len for block in blocks)
    notes = ""
    if traced < total:
        notes = f"holds the first {traced} of {total} passes over the model"
        _log.warning("%s %s", path, notes)
    with Spool(f"trace {path}", spare_folders(path)) as spool:
        file = begin_trace(spool.write, notes=notes)
        recorder = Recorder(file, blocks, hardware)
        try:
            yield recorder
        except BaseException:
            # The trace is complete where only the report after the run failed.
            if recorder.is_complete:
                try:
                    _write(path, file, spool)
                except RunError as late:
                    # The first error is raised last, and sets the exit status.
                    _log.error("%s", late)
            raise
        if recorder.is_complete:
            _write(path, file, spool)


def _write(path: Path, file: TraceFile, spool: Spool) -> None:
    file.end()
    write_output(path, spool.copy_into)
