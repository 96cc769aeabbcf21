"""The section that shows what every channel did, task by task."""

from __future__ import annotations

from collections.abc import Mapping

from costmodel.cli.palette import TASK_COLORS, content_of_task
from costmodel.pricing.memory import PHASES
from costmodel.report.charts import Bars, draw_bars
from costmodel.report.sections import Picture, Section
from costmodel.report.task_sample import SampledTask, TaskSample
from profiles.hardware import CHANNELS
from profiles.units import format_bytes, format_rate, format_seconds

MEASURED, SIMULATED = "measured", "simulated"
HOW_TO_ZOOM = (
    "Drag sideways to enlarge a part. The buttons enlarge, shrink, move and reset."
    " Point at a task, or tap it, for its details."
)


def timeline_section(samples: Mapping[str, TaskSample]) -> Section:
    """Show the tasks of ``samples``, by label: ``measured`` (if any) above ``simulated``."""
    text = ["The tasks of the first block on every channel."]
    if MEASURED in samples:
        text[0] += " Above: measured. Below, in pale: simulated."
    pictures = []
    for phase in PHASES:
        if not any(sample.phases[phase] for sample in samples.values()):
            text.append(f"{phase.capitalize()} has too many tasks to show, or none.")
            continue
        if any(sample.is_cut[phase] for sample in samples.values()):
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
    zero_s = min(task.start_s for sample in samples.values() for task in sample.phases[phase])
    for lane, (label, sample) in enumerate(samples.items()):
        for task in sample.phases[phase]:
            bars.add(
                channels.index(task.channel),
                task.start_s - zero_s,
                task.end_s - zero_s,
                TASK_COLORS[content_of_task(task.kind)],
                lane=lane,
                task=f"{task.kind.replace('_', ' ')} ({label})",
                place=f"pass {task.token}, layer {task.layer}, batch {task.batch}",
                **_figures(task, has_measured=MEASURED in samples),
            )
    labels = [channel.replace("_", " ") for channel in channels]
    item = draw_bars(bars, labels, x_label=f"seconds since {phase} began", zooms=True)
    title = f"Tasks of {phase} on every channel"
    return Picture(item=item, title=title, heading=phase.capitalize())


def _figures(task: SampledTask, *, has_measured: bool) -> dict[str, str]:
    seconds = task.end_s - task.start_s
    figures = {"took": format_seconds(seconds)}
    if not has_measured:
        return figures
    rate = f"{format_bytes(task.num_bytes)}, {format_rate(task.num_bytes / max(seconds, 1e-9))}"
    return figures | {
        "moved": rate if task.num_bytes else "",
        "waited": format_seconds(task.blocked_s) if task.blocked_s else "",
    }
