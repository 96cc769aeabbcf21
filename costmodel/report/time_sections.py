"""The sections of seconds: predicted beside measured by phase, and what limits each phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from costmodel.cli.palette import PHASE_COLORS
from costmodel.report.charts import Bars, draw_bars
from costmodel.report.parts import Picture, Plan, Section, Table
from profiles.hardware import CHANNELS
from profiles.units import format_figure, format_seconds

MEASURED_BESIDE = "Upper bars: measured. Lower, fainter bars: predicted."
THROUGHPUT = "token/s"
# What may limit a phase; other names are two of these.
LIMITS = {
    "h2d": "copies to the GPU",
    "d2h": "copies from the GPU",
    "disk_read": "reads from disk",
    "disk_write": "writes to disk",
    "gpu_compute": "computation on the GPU",
    "cpu_compute": "computation on the CPU",
    "cpu_memory": "the rate of CPU memory",
}


def phases_section(plan: Plan) -> Section:
    """Show the seconds of each phase, predicted and measured."""
    measured, predicted = plan.measured, plan.predicted_phase_s
    bars = Bars(lanes=2 if measured else 1)
    if measured is None:
        what = "one block" if plan.lanes is None else "the job"
        text = [f"The seconds of each phase of {what}, as the cost model predicts them."]
        headers = ["", "predicted"]
        rows = [[phase, format_seconds(seconds)] for phase, seconds in predicted.items()]
        rows.append([THROUGHPUT, format_figure(plan.prediction.throughput_tok_per_s)])
    else:
        text = [f"The seconds of each phase of the whole run. {MEASURED_BESIDE}"]
        headers = ["", "predicted", "measured", "difference"]
        rows = [
            _compared(phase, seconds, measured.phase_s[phase], format_seconds)
            for phase, seconds in predicted.items()
        ]
        rates = (measured.predicted_tok_per_s, measured.tok_per_s)
        rows.append(_compared(THROUGHPUT, *rates, format_figure))
    for row, (phase, seconds) in enumerate(predicted.items()):
        color = PHASE_COLORS[phase]
        if measured is not None:
            bars.add_stack(row, {"measured": _seconds(measured.phase_s[phase], color)}, lane=0)
        lane = 1 if measured else 0
        bars.add_stack(row, {"predicted": _seconds(seconds, color)}, lane=lane)
    item = draw_bars(bars, list(predicted), x_label="seconds")
    return Section(
        name="phases",
        title="Predicted beside measured" if measured else "Predicted by phase",
        text=text,
        legend={phase: PHASE_COLORS[phase] for phase in plan.phases},
        pictures=[Picture(item=item, title="Seconds of each phase")],
        table=Table(headers=headers, rows=rows),
    )


def limits_section(plan: Plan) -> Section:
    """Show what limits each phase, and the busy seconds of every channel."""
    measured, predicted = plan.measured, plan.predicted_busy_s
    sources = {"predicted": predicted} | ({"measured": measured.busy_s} if measured else {})
    channels = [
        channel
        for channel in CHANNELS
        if any(busy[phase].get(channel) for busy in sources.values() for phase in plan.phases)
    ]
    bars = Bars(lanes=2 if measured else 1)
    for row, channel in enumerate(channels):
        if measured is not None:
            bars.add_stack(row, _busy(measured.busy_s, channel), lane=0)
        bars.add_stack(row, _busy(predicted, channel), lane=1 if measured else 0)
    total_s = sum((measured.phase_s if measured else plan.predicted_phase_s).values())
    what = "the whole run" if measured else "one block" if plan.lanes is None else "the job"
    text = [
        *_limit_lines(plan),
        f"The busy seconds of every channel. The dashed line is the duration of {what}."
        f"{f' {MEASURED_BESIDE}' if measured else ''}",
    ]
    item = draw_bars(bars, channels, x_label="busy seconds", line_at=total_s)
    return Section(
        name="limits",
        title="What limits it",
        text=text,
        legend={phase: PHASE_COLORS[phase] for phase in plan.phases},
        pictures=[Picture(item=item, title="Busy seconds of every channel in each phase")],
        table=_busy_table(channels, sources),
    )


def _limit_lines(plan: Plan) -> list[str]:
    lines = []
    for phase, name in plan.limits.items():
        words = f" ({LIMITS[name]})" if name in LIMITS else ""
        lines.append(
            f"By prediction, {name}{words} limits {phase if plan.lanes is None else 'it'}."
        )
    return lines


def _busy_table(
    channels: Sequence[str], sources: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> Table:
    rows = []
    for channel in channels:
        for phase in next(iter(sources.values())):
            seconds = [busy[phase].get(channel, 0.0) for busy in sources.values()]
            if any(seconds):
                rows.append([f"{channel}, {phase}", *map(format_seconds, seconds)])
    return Table(headers=["", *sources], rows=rows)


def _busy(
    seconds: Mapping[str, Mapping[str, float]], channel: str
) -> dict[str, tuple[float, str, str]]:
    return {
        phase: _seconds(of_phase.get(channel, 0.0), PHASE_COLORS[phase])
        for phase, of_phase in seconds.items()
    }


def _seconds(seconds: float, color: str) -> tuple[float, str, str]:
    return seconds, color, format_seconds(seconds)


def _compared(
    name: str, predicted: float, measured: float, show: Callable[[float], str]
) -> list[str]:
    difference = f"{measured / predicted - 1:+.1%}" if predicted else ""
    return [name, show(predicted), show(measured), difference]
