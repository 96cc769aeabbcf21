"""Read a run from the file of its timeline, which keeps the run's record beside its tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from costmodel.pricing.memory import phases_of
from costmodel.report.run_record import RunRecord
from costmodel.report.task_sample import SampledTask, TaskSample
from costmodel.schedule.chrome_trace import MICROSECOND
from profiles.errors import InputError
from profiles.files import from_json
from profiles.hardware import CHANNELS

MEASURED, SIMULATED = "measured", "simulated"


def read_run(trace: Mapping[str, Any], what: str) -> tuple[RunRecord, TaskSample]:
    """Return the record of a run and the measured tasks of its first block.

    Parameters
    ----------
    trace
        The parsed file.
    what
        Names the file in messages.

    Raises
    ------
    InputError
        If the file is not one that ``--trace`` has written for a run.
    """
    if trace.get("run") is None:
        raise InputError(
            what,
            got="a timeline without a run",
            allowed="one that --trace has written",
            hint="executor.generate --trace or --report",
        )
    record = from_json(RunRecord, trace["run"], f"{what}.run")
    phases = phases_of(record.policy)
    try:
        measured = list(_tasks(trace["traceEvents"], MEASURED, phases))
        begins = [task.start_s for task in _tasks(trace["traceEvents"], SIMULATED, phases)]
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            what, got=f"an event that is not a task: {error!r}", allowed="events as --trace writes"
        ) from None
    sample = TaskSample(phases=phases)
    # The simulation of a block begins when the block does.
    zero_s = min(begins, default=0.0)
    for task in measured:
        sample.keep(task)
    return record, sample.counted_from(zero_s)


def _tasks(events: Any, label: str, phases: Sequence[str]) -> Iterator[SampledTask]:
    """Yield the tasks of the first block on one of the two timelines."""
    pid, names = None, {}
    for event in events:
        if event["name"] == "process_name" and event["args"]["name"] == label:
            pid = event["pid"]
        elif event["name"] == "thread_name" and event["pid"] == pid:
            names[event["tid"]] = event["args"]["name"]
        elif event["ph"] == "X" and event["pid"] == pid and event["args"]["block"] == 0:
            yield _task(event, names[event["tid"]], phases)


def _task(event: Mapping[str, Any], channel: str, phases: Sequence[str]) -> SampledTask:
    details = event["args"]
    if channel not in CHANNELS or event["cat"] not in phases:
        raise ValueError(f"{event['cat']} on {channel}")
    start_s, took_s = float(event["ts"]) * MICROSECOND, float(event["dur"]) * MICROSECOND
    if not (math.isfinite(start_s) and math.isfinite(took_s) and took_s >= 0):
        raise ValueError(f"{took_s} s from {start_s} s on")
    return SampledTask(
        kind=str(event["name"]).split()[0],
        channel=channel,
        token=int(details["token"]),
        layer=int(details["layer"]),
        batch=int(details["batch"]),
        start_s=start_s,
        end_s=start_s + took_s,
        num_bytes=int(details.get("bytes", 0)),
        blocked_s=float(details.get("blocked_s", 0.0)),
    )
