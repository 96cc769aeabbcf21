"""The sections of a page as data: text, pictures, tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from costmodel.cli.palette import BUFFER_COLORS, OTHER_BUFFERS, PHASE_COLORS, TIER_COLORS
from costmodel.cli.policy_report import placed_bytes, tiers_of
from costmodel.plan.policy import Policy, Prediction
from costmodel.pricing.memory import PHASES, capacities
from costmodel.pricing.price import peak_buffers, phase_channels, phase_limits
from costmodel.report.charts import Bars, draw_bars
from costmodel.report.run_record import Measured
from profiles.hardware import HardwareProfile
from profiles.units import format_bytes, format_figure, format_seconds

MEASURED_BESIDE = "Upper bars: measured. Lower, fainter bars: predicted."
NAMES = {"gpu": "GPU", "cpu": "CPU", "disk": "disk"}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A policy on a machine, its prediction, and the figures of its run if there was one."""

    policy: Policy
    hardware: HardwareProfile
    prediction: Prediction
    measured: Measured | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table whose first column names the rows; cells are text."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture for BokehJS, and the sentence that stands in for it."""

    item: Mapping[str, Any]
    title: str
    heading: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section of the page; ``legend`` maps labels to colours."""

    name: str
    title: str
    text: Sequence[str]
    legend: Mapping[str, str]
    pictures: Sequence[Picture] = ()
    table: Table | None = None


def placement_section(plan: Plan) -> Section:
    """Show where weights, cache and hidden states live."""
    placed = placed_bytes(plan.policy, plan.hardware)
    tiers = tiers_of(plan.hardware)
    bars, rows = Bars(), []
    for row, (name, (placement, total)) in enumerate(placed.items()):
        shares = {tier: getattr(placement, tier) for tier in tiers}
        parts = {
            NAMES[tier]: (share, TIER_COLORS[tier], f"{share:.1%}, {format_bytes(share * total)}")
            for tier, share in shares.items()
        }
        bars.add_stack(row, parts)
        rows.append([name, *(_bytes(share * total) for share in shares.values())])
    return Section(
        name="placement",
        title="Where everything lives",
        text=_placement_text(plan),
        legend={NAMES[tier]: TIER_COLORS[tier] for tier in tiers},
        pictures=[
            Picture(
                item=draw_bars(bars, list(placed), x_label="share", x_format="0%", x_end=1.0),
                title="Share of each component on each tier",
            )
        ],
        table=Table(headers=["", *(NAMES[tier] for tier in tiers)], rows=rows),
    )


def _placement_text(plan: Plan) -> list[str]:
    policy = plan.policy
    text = ["Weights by component, then the KV cache and the hidden states of one block."]
    if plan.hardware.has_gpu and policy.cache.gpu < 1:
        share = policy.cpu_attention
        text.append(
            f"The CPU attends to {share:.0%} of the cache outside the GPU."
            if share
            else "The GPU attends to all of the cache."
        )
    if policy.cpu_experts and policy.weights.get("experts") is not None:
        text.append(f"The CPU multiplies {policy.cpu_experts:.0%} of the experts in its memory.")
    if policy.is_compressed:
        text.append(
            f"Weights have {policy.weight_bits} bits and the cache {policy.cache_bits} bits."
            f" A query attends to {policy.attention_sparsity:.0%} of the keys."
        )
    return text


def memory_section(plan: Plan) -> Section:
    """Show each tier's buffers at its peak, against the budget."""
    limits = capacities(plan.hardware)
    peaks = peak_buffers(plan.policy, plan.hardware)
    bars, used = Bars(), dict[str, str]()
    for row, tier in enumerate(limits):
        # A tier without capacity has nothing to draw.
        share_of = 1 / limits[tier] if limits[tier] else 0.0
        amounts = dict.fromkeys(BUFFER_COLORS, 0.0)
        for buffer, size in peaks[tier].items():
            amounts[buffer if buffer in BUFFER_COLORS else OTHER_BUFFERS] += size
        parts = {
            buffer: (size * share_of, BUFFER_COLORS[buffer], format_bytes(size))
            for buffer, size in amounts.items()
        }
        bars.add_stack(row, parts)
        used |= {name: BUFFER_COLORS[name] for name, size in amounts.items() if size >= 1}
    text = ["The buffers of each tier when it holds most, as a share of its budget."]
    if plan.hardware.is_emulated:
        text.append("The GPU is emulated in CPU memory.")
    if plan.measured is not None:
        text += _together_lines(plan.measured)
    return Section(
        name="memory",
        title="Memory at its peak",
        text=text,
        legend={name: color for name, color in BUFFER_COLORS.items() if name in used},
        pictures=[
            Picture(
                item=draw_bars(
                    bars,
                    [NAMES[tier] for tier in limits],
                    x_label="share of the budget",
                    x_format="0%",
                    line_at=1.0,
                ),
                title="Buffers of each tier at its peak, as a share of its budget",
            )
        ],
        table=_memory_table(plan, peaks, limits),
    )


def _together_lines(measured: Measured) -> list[str]:
    """Tell of tiers that can only be measured together."""
    return [
        f"Together, {name} peaked at {format_bytes(size)};"
        f" {format_bytes(measured.predicted_peak_bytes[name])} were predicted."
        for name, size in measured.peak_bytes.items()
        if name not in NAMES
    ]


def _memory_table(
    plan: Plan, peaks: Mapping[str, Mapping[str, float]], limits: Mapping[str, int]
) -> Table:
    names = dict.fromkeys(name for terms in peaks.values() for name in terms)
    rows = []
    for name in names:
        sizes = [terms.get(name, 0.0) for terms in peaks.values()]
        if max(sizes) >= 1:
            rows.append([name, *map(_bytes, sizes)])
    rows.append(["predicted peak", *(format_bytes(sum(t.values())) for t in peaks.values())])
    if plan.measured is not None:
        found = plan.measured.peak_bytes
        cells = [format_bytes(found[tier]) if tier in found else "" for tier in peaks]
        rows.append(["measured peak", *cells])
    rows.append(["budget", *(format_bytes(limits[tier]) for tier in peaks)])
    return Table(headers=["", *(NAMES[tier] for tier in peaks)], rows=rows)


def phases_section(plan: Plan) -> Section:
    """Show the seconds of each phase, predicted and measured."""
    measured, prediction = plan.measured, plan.prediction
    predicted = {"prefill": prediction.prefill_s, "decode": prediction.decode_s}
    bars = Bars(lanes=2 if measured else 1)
    if measured is None:
        text = ["The seconds of each phase of one block, as the cost model predicts them."]
        headers = ["", "predicted"]
        rows = [[phase, format_seconds(seconds)] for phase, seconds in predicted.items()]
        rows.append([THROUGHPUT, format_figure(prediction.throughput_tok_per_s)])
    else:
        predicted = dict(measured.predicted_phase_s)
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
        legend={phase: PHASE_COLORS[phase] for phase in PHASES},
        pictures=[Picture(item=item, title="Seconds of each phase")],
        table=Table(headers=headers, rows=rows),
    )


def limits_section(plan: Plan) -> Section:
    """Show what limits each phase, and the busy seconds of every channel."""
    measured = plan.measured
    predicted = (
        phase_channels(plan.policy, plan.hardware)
        if measured is None
        else measured.predicted_busy_s
    )
    channels = [name for name in predicted["prefill"] if any(predicted[p][name] for p in PHASES)]
    bars = Bars(lanes=2 if measured else 1)
    for row, channel in enumerate(channels):
        if measured is not None:
            bars.add_stack(row, _busy(measured.busy_s, channel), lane=0)
        bars.add_stack(row, _busy(predicted, channel), lane=1 if measured else 0)
    total_s = sum(measured.phase_s.values()) if measured else plan.prediction.latency_s
    what = "the whole run" if measured else "one block"
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
        legend={phase: PHASE_COLORS[phase] for phase in PHASES},
        pictures=[Picture(item=item, title="Busy seconds of every channel in each phase")],
        table=_busy_table(channels, predicted, measured),
    )


def limit_of(phase: str, plan: Plan) -> str:
    """Return the name of what limits most of a phase, by prediction."""
    limits = phase_limits(plan.policy, plan.hardware)[phase]
    return max(limits, key=lambda name: limits[name], default="nothing")


def _limit_lines(plan: Plan) -> list[str]:
    lines = []
    for phase in PHASES:
        name = limit_of(phase, plan)
        words = f" ({LIMITS[name]})" if name in LIMITS else ""
        lines.append(f"By prediction, {name}{words} limits {phase}.")
    return lines


def _busy_table(
    channels: Sequence[str],
    predicted: Mapping[str, Mapping[str, float]],
    measured: Measured | None,
) -> Table:
    sources = [("predicted", predicted)]
    if measured is not None:
        sources.append(("measured", measured.busy_s))
    rows = []
    for channel in channels:
        for phase in PHASES:
            seconds = [busy[phase].get(channel, 0.0) for _, busy in sources]
            if any(seconds):
                rows.append([f"{channel}, {phase}", *map(format_seconds, seconds)])
    return Table(headers=["", *(label for label, _ in sources)], rows=rows)


def _busy(
    seconds: Mapping[str, Mapping[str, float]], channel: str
) -> dict[str, tuple[float, str, str]]:
    return {
        phase: _seconds(seconds[phase].get(channel, 0.0), PHASE_COLORS[phase]) for phase in PHASES
    }


def _bytes(size: float) -> str:
    return format_bytes(size) if size >= 1 else ""


def _seconds(seconds: float, color: str) -> tuple[float, str, str]:
    return seconds, color, format_seconds(seconds)


def _compared(
    name: str, predicted: float, measured: float, show: Callable[[float], str]
) -> list[str]:
    difference = f"{measured / predicted - 1:+.1%}" if predicted else ""
    return [name, show(predicted), show(measured), difference]
