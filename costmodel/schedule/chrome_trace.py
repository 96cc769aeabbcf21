"""A timeline as a file for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from costmodel.schedule.tasks import Task
from profiles.hardware import CHANNELS
from profiles.outputs import write_output

MICROSECOND = 1e-6
TRACKS = {channel: number for number, channel in enumerate(CHANNELS, start=1)}
PASSES_TRACK = 1


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
    duration in microseconds. ``phases`` name the first pass and all others.
    """

    def __init__(
        self, write: Callable[[str], object], *, phases: Sequence[str] = ("prefill", "decode")
    ) -> None:
        self._write_text = write
        self._first, self._others = phases[0], phases[-1]
        self._separator = ""

    def begin_process(self, pid: int, label: str) -> None:
        """Name a timeline and give it one track per channel."""
        self._begin_tracks(pid, label, TRACKS)

    def begin_passes(self, pid: int, label: str) -> None:
        """Name a timeline of passes, which has one track."""
        self._begin_tracks(pid, label, {"passes": PASSES_TRACK})

    def add_passes(
        self, pid: int, first: int, last: int, start_s: float, end_s: float, **figures: float
    ) -> None:
        """Write some passes of timeline ``pid`` as one bar; ``figures`` are curves below it."""
        name = f"pass {first}" if first == last else f"passes {first} to {last}"
        start = start_s / MICROSECOND
        event = {"ph": "X", "pid": pid, "tid": PASSES_TRACK, "name": name, "cat": "passes"}
        self._write(event | {"ts": start, "dur": (end_s - start_s) / MICROSECOND, "args": figures})
        for name, value in figures.items():
            curve = {"ph": "C", "pid": pid, "name": name, "ts": start, "args": {name: value}}
            self._write(curve)

    def _begin_tracks(self, pid: int, label: str, tracks: Mapping[str, int]) -> None:
        self._write({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": label}})
        for channel, track in tracks.items():
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
                "cat": self._first if task.is_prefill else self._others,
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


def begin_trace(
    write: Callable[[str], object],
    *,
    notes: str = "",
    phases: Sequence[str] = ("prefill", "decode"),
) -> TraceFile:
    """Begin a trace; ``notes`` go into its metadata, which Perfetto shows."""
    write(f'{{"displayTimeUnit": "ms", "otherData": {json.dumps({"notes": notes})},\n')
    write('"traceEvents": [\n')
    return TraceFile(write, phases=phases)


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
