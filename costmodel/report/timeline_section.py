"""The section that shows what every channel did, task by task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from costmodel.cli.palette import TASK_COLORS, content_of_task
from costmodel.pricing.memory import LANE_PHASE
from costmodel.report.charts import Bars, draw_bars
from costmodel.report.parts import Picture, Section
from costmodel.report.task_sample import SampledTask, TaskSample
from profiles.hardware import CHANNELS
from profiles.units import format_bytes, format_rate, format_seconds

# Tasks of one channel that can be told apart on a narrow screen.
MOST_SEEN = 60
HOW_TO_ZOOM = (
    "The strip below a picture shows all of it: drag the marked part or its edges to see others."
    " Point at a task, or tap it, for its details."
)


def timeline_section(samples: Mapping[str, TaskSample], phases: Sequence[str]) -> Section:
    """Show the tasks of ``samples``, by label: ``measured`` (if any) above ``simulated``."""
    what = "the first passes" if LANE_PHASE in phases else "the first block"
    text = [f"The tasks of {what} on every channel: h2d copies to the GPU, and d2h from it."]
    if len(samples) > 1:
        text[0] += " Upper bars: measured. Lower, fainter bars: simulated."
    pictures = []
    for phase in phases:
        if not any(sample.phases[phase] for sample in samples.values()):
            text.append(f"{phase.capitalize()} has too many tasks to show, or none.")
            continue
        if any(sample.is_cut[phase] for sample in samples.values()) and len(phases) > 1:
            text.append(f"The picture of {phase} shows its first tasks.")
        pictures.append(_phase_picture(phase, samples))
    if pictures:
        text.append(HOW_TO_ZOOM)
    return Section(
        name="timeline",
        title="Timeline",
        text=text,
        legend=TASK_COLORS,
        pictures=pictures,
    )


def _phase_picture(phase: str, samples: Mapping[str, TaskSample]) -> Picture:
    seen = {task.channel for sample in samples.values() for task in sample.phases[phase]}
    channels = [channel for channel in CHANNELS if channel in seen]
    bars = Bars(lanes=len(samples))
    ends = []
    for lane, (label, sample) in enumerate(samples.items()):
        zero_s = min((task.start_s for task in sample.phases[phase]), default=0.0)
        ends.append(max((task.end_s - zero_s for task in sample.phases[phase]), default=0.0))
        for task in sample.phases[phase]:
            bars.add(
                channels.index(task.channel),
                task.start_s - zero_s,
                task.end_s - zero_s,
                TASK_COLORS[content_of_task(task.kind)],
                _details(task, label),
                lane=lane,
            )
    item = draw_bars(
        bars, channels, x_label=f"seconds since {phase} began", window=_window(bars, min(ends))
    )
    title = f"Tasks of {phase} on every channel"
    return Picture(item=item, title=title, heading=phase.capitalize())


def _window(bars: Bars, end: float) -> tuple[float, float]:
    """Return the part that is seen first: as many tasks as can be told apart, of every timeline.

    ``end`` is that of the timeline which ends first.
    """
    last = max(bars.right)
    busiest = max(Counter(bars.rows).values())
    if busiest <= MOST_SEEN:
        return 0.0, last
    middle, width = end / 2, min(end, last * MOST_SEEN / busiest)
    return middle - width / 2, middle + width / 2


def _details(task: SampledTask, label: str) -> str:
    """Return what is known of a task, in lines."""
    seconds = task.end_s - task.start_s
    lines = [
        f"{task.kind.replace('_', ' ')} ({label})",
        f"pass {task.token}, layer {task.layer}, batch {task.batch}",
        f"took {format_seconds(seconds)}",
    ]
    if task.num_bytes:
        rate = format_rate(task.num_bytes / max(seconds, 1e-9))
        lines.append(f"moved {format_bytes(task.num_bytes)}, {rate}")
    if task.blocked_s:
        lines.append(f"waited {format_seconds(task.blocked_s)} before it")
    return "\n".join(lines)
