"""A timeline as a file for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any, Protocol

from costmodel.schedule.tasks import Task
from profiles.hardware import CHANNELS
from profiles.outputs import write_output

MICROSECOND = 1e-6
TRACKS = {channel: number for number, channel in enumerate(CHANNELS, start=1)}


class Timed(Protocol):
    """A simulated or measured task with its start and end."""

    @property
    def task(self) -> Task:
        """The task."""

    @property
    def start_s(self) -> float:
        """Its start in seconds."""

    @property
    def end_s(self) -> float:
        """Its end in seconds."""


class TraceFile:
    """Writes a trace event by event; ``begin_trace`` makes one.

    The format is Chrome's Trace Event Format: complete events (``"ph": "X"``) with start and
    duration in microseconds.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write_text = write
        self._separator = ""

    def begin_process(self, pid: int, label: str) -> None:
        """Name a timeline and give it one track per channel."""
        self._write({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": label}})
        for channel, track in TRACKS.items():
            name = {"name": channel}
            self._write({"ph": "M", "pid": pid, "tid": track, "name": "thread_name", "args": name})

    def add(self, pid: int, timed: Timed, *, zero_s: float = 0.0, **figures: float) -> None:
        """Write one task of timeline ``pid``, with ``figures``. Time 0 is ``zero_s``."""
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

    def end(self, **more: object) -> None:
        """Close the JSON after the last event, with further keys that viewers ignore."""
        self._write_text("\n]")
        for name, value in more.items():
            self._write_text(f",\n{json.dumps(name)}: {json.dumps(value)}")
        self._write_text("}\n")

    def _write(self, event: dict[str, Any]) -> None:
        self._write_text(self._separator + json.dumps(event))
        self._separator = ",\n"


def begin_trace(write: Callable[[str], object], *, notes: str = "") -> TraceFile:
    """Begin a trace; ``notes`` go into its metadata, which Perfetto shows."""
    write(f'{{"displayTimeUnit": "ms", "otherData": {json.dumps({"notes": notes})},\n')
    write('"traceEvents": [\n')
    return TraceFile(write)


def write_trace(path: Path, tasks: Collection[Timed], *, label: str) -> None:
    """Write one timeline, whole or not at all.

    Parameters
    ----------
    label
        The name of the timeline, such as ``predicted``.
    """

    def render(handle: IO[str]) -> None:
        trace = begin_trace(handle.write)
        trace.begin_process(1, label)
        for timed in tasks:
            trace.add(1, timed)
        trace.end()

    write_output(path, render)
