"""A timeline as a file for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from costmodel.tasks import Task
from profiles.files import atomic_writer
from profiles.hardware import CHANNELS

MICROSECOND = 1e-6
TRACKS = {channel: number for number, channel in enumerate(CHANNELS, start=1)}


class Timed(Protocol):
    """A task with its seconds, as it was simulated or as it ran."""

    @property
    def task(self) -> Task:
        """What was done."""

    @property
    def start_s(self) -> float:
        """When it began."""

    @property
    def end_s(self) -> float:
        """When it ended."""


class TraceFile:
    """A trace that is being written, event by event; made by ``open_trace``.

    The format is Chrome's Trace Event Format: complete events (``"ph": "X"``) with start and
    duration in microseconds.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._separator = ""

    def begin_process(self, pid: int, label: str) -> None:
        """Name a timeline and give it one track per channel."""
        self._write({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": label}})
        for channel, track in TRACKS.items():
            name = {"name": channel}
            self._write({"ph": "M", "pid": pid, "tid": track, "name": "thread_name", "args": name})

    def add(self, pid: int, timed: Timed, *, zero_s: float = 0.0, **figures: float) -> None:
        """Write one task of timeline ``pid``, from ``zero_s`` on; ``figures`` are shown with it."""
        task = timed.task
        self._write(
            {
                "ph": "X",
                "pid": pid,
                "tid": TRACKS[task.channel],
                "name": f"{task.kind} {task.layer}",
                "cat": "prefill" if task.is_prefill else "decode",
                "ts": (timed.start_s - zero_s) / MICROSECOND,
                "dur": (timed.end_s - timed.start_s) / MICROSECOND,
                "args": {"token": task.token, "layer": task.layer, "batch": task.batch} | figures,
            }
        )

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(self._separator + json.dumps(event))
        self._separator = ",\n"


@contextmanager
def open_trace(path: Path, *, notes: str = "") -> Iterator[TraceFile]:
    """Open a trace that appears under ``path`` only when the block ends without an error.

    ``notes`` come to stand in the file beside the events, where Perfetto shows them as metadata.
    """
    with atomic_writer(path) as file:
        file.write(f'{{"displayTimeUnit": "ms", "otherData": {json.dumps({"notes": notes})},\n')
        file.write('"traceEvents": [\n')
        yield TraceFile(file)
        file.write("\n]}\n")


def write_trace(path: Path, tasks: Iterable[Timed], *, label: str) -> None:
    """Write one timeline, whole or not at all.

    Parameters
    ----------
    label
        What the whole timeline is called, such as ``predicted``.
    """
    with open_trace(path) as trace:
        trace.begin_process(1, label)
        for timed in tasks:
            trace.add(1, timed)
