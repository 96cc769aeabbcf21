"""A timeline as a file for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from costmodel.timeline import TimedTask
from profiles.files import atomic_writer
from profiles.hardware import CHANNELS

MICROSECOND = 1e-6


def write_trace(path: Path, tasks: Iterable[TimedTask], *, label: str) -> None:
    """Write one track per channel and one slice per task, whole or not at all.

    The format is Chrome's Trace Event Format: complete events (``"ph": "X"``) with start and
    duration in microseconds.

    Parameters
    ----------
    label
        What the whole timeline is called, such as ``predicted``.
    """
    tracks = {channel: number for number, channel in enumerate(CHANNELS, start=1)}
    with atomic_writer(path) as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        file.write(json.dumps(_name("process_name", label)))
        for channel, track in tracks.items():
            file.write(",\n" + json.dumps(_name("thread_name", channel, tid=track)))
        for timed in tasks:
            file.write(",\n" + json.dumps(_slice(timed, tracks[timed.task.channel])))
        file.write("\n]}\n")


def _name(kind: str, name: str, **place: int) -> dict[str, Any]:
    return {"ph": "M", "pid": 1, "name": kind, "args": {"name": name}, **place}


def _slice(timed: TimedTask, track: int) -> dict[str, Any]:
    task = timed.task
    return {
        "ph": "X",
        "pid": 1,
        "tid": track,
        "name": f"{task.kind} {task.layer}",
        "cat": "prefill" if task.is_prefill else "decode",
        "ts": timed.start_s / MICROSECOND,
        "dur": (timed.end_s - timed.start_s) / MICROSECOND,
        "args": {"token": task.token, "layer": task.layer, "batch": task.batch},
    }
