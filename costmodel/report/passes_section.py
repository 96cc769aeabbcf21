"""The section that shows the passes over lanes: who is at work, and how long it takes."""

from __future__ import annotations

from collections.abc import Callable

from costmodel.cli.palette import BUFFER_COLORS, CURVE_COLORS, NEUTRAL_COLOR, PHASE_COLORS
from costmodel.plan.policy import Policy
from costmodel.report.charts import Curve, draw_curves
from costmodel.report.parts import Picture, Section
from costmodel.report.pass_series import PassSeries
from costmodel.report.planned_lanes import PlannedLanes
from costmodel.report.trace_file import MEASURED
from profiles.units import format_seconds

WAITING_COLOR = CURVE_COLORS[5]
Show = Callable[[float], str]


def passes_section(policy: Policy, lanes: PlannedLanes) -> Section:
    """Show lanes at work, tokens of the cache and seconds over the passes of a job."""
    assert policy.lanes is not None
    text = [
        "A pass decodes a token of every lane at work, and takes the prompts of lanes that begin.",
        f"The dashed lines are the most lanes, {policy.block_size}, and the room of the cache,"
        f" {policy.lanes.pool_tokens:,} tokens.",
        *lanes.facts,
    ]
    if MEASURED in lanes.passes:
        text.insert(1, "Thin lines: measured. Thick, fainter lines: simulated.")
    legend = {
        "lanes at work": NEUTRAL_COLOR,
        "tokens in the cache": BUFFER_COLORS["cache"],
        "seconds of a pass": PHASE_COLORS["run"],
    }
    at_work = _curves(lanes, "lanes", NEUTRAL_COLOR, lambda n: f"{n:.1f} lanes at work")
    if any(any(series.waiting) for series in lanes.passes.values()):
        at_work += _curves(lanes, "waiting", WAITING_COLOR, lambda n: f"{n:.1f} lanes wait")
        legend["lanes that wait"] = WAITING_COLOR
    tokens = _curves(
        lanes, "tokens", BUFFER_COLORS["cache"], lambda n: f"{n:,.0f} tokens in the cache"
    )
    seconds = _curves(lanes, "seconds", PHASE_COLORS["run"], format_seconds)
    return Section(
        name="passes",
        title="Passes",
        text=text,
        legend=legend,
        pictures=[
            _picture("Lanes", "lanes", at_work, policy.block_size),
            _picture("Tokens in the cache", "tokens", tokens, policy.lanes.pool_tokens),
            _picture("Seconds of a pass", "seconds", seconds, None),
        ],
    )


def _picture(heading: str, unit: str, curves: list[Curve], line_at: float | None) -> Picture:
    item = draw_curves(curves, x_label="pass", y_label=unit, line_at=line_at)
    return Picture(item=item, title=f"{heading} over the passes of the job", heading=heading)


def _curves(lanes: PlannedLanes, name: str, color: str, show: Show) -> list[Curve]:
    """Return one curve for each label."""
    is_run = MEASURED in lanes.passes
    return [
        Curve(
            edges=series.passes,
            values=getattr(series, name),
            texts=_texts(series, getattr(series, name), label, show),
            color=color,
            is_faint=is_run and label != MEASURED,
        )
        for label, series in lanes.passes.items()
    ]


def _texts(series: PassSeries, values: tuple[float, ...], label: str, show: Show) -> list[str]:
    ends = [end - 1 for end in series.passes[1:]]
    return [
        f"pass {first}{f' to {last}' if last > first else ''}\n{show(value)} ({label})"
        for first, last, value in zip(series.passes, ends, values, strict=False)
    ]
