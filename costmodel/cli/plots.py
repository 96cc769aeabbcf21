"""Pictures of policies and of what they could be."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from costmodel.cli.flags import Question, check_picture
from costmodel.cli.palette import (
    BUFFER_COLORS,
    CURVE_COLORS,
    NEUTRAL_COLOR,
    OTHER_BUFFERS,
    PHASE_COLORS,
    TIER_COLORS,
    TIER_NAMES,
)
from costmodel.frontier import FrontierPoint
from costmodel.optimizer.optimum import SearchResult, search
from costmodel.optimizer.sensitivity import ShadowPrice, shadow_prices
from costmodel.plan.policy import Policy
from costmodel.pricing.memory import capacities, memory_rows, with_capacities
from costmodel.pricing.price import phase_channels
from costmodel.pricing.problem import problem_of
from costmodel.pricing.shares import shares_of
from profiles.errors import InfeasibleError
from profiles.hardware import HardwareProfile
from profiles.outputs import write_output
from profiles.units import GIB, format_bytes, format_count, format_figure

# Bars that are shorter than this share of the longest one are left out.
LEAST_SHARE = 1 / 200


def plot_policy(result: SearchResult) -> Figure:
    """Draw one policy: placement, memory of each tier, busy seconds, value of more hardware."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    policy, hardware = result.policy, result.hardware
    draw_placement(axes[0, 0], policy)
    draw_memory(axes[0, 1], policy, hardware)
    draw_channels(axes[1, 0], policy, hardware)
    prices = shadow_prices(result.problem, result.solution, margin=result.margin)
    draw_shadow_prices(axes[1, 1], prices)
    figure.suptitle(
        f"{policy.model.name} on {hardware.name}: {format_figure(result.job_tok_per_s)} token/s,"
        f" blocks of {format_count(policy.num_gpu_batches, 'batch')} of {policy.gpu_batch_size}"
    )
    return figure


def plot_frontier(points: Sequence[FrontierPoint]) -> Figure:
    """Draw throughput over the latency of a block, each point with its block size."""
    figure, axes = _single()
    latency_s = [point.latency_s for point in points]
    axes.plot(latency_s, [point.tok_per_s for point in points], "o-", color=NEUTRAL_COLOR)
    for point in points:
        axes.annotate(
            str(point.result.policy.block_size),
            (point.latency_s, point.tok_per_s),
            textcoords="offset points",
            xytext=(-5, 5),
            ha="right",
            fontsize="small",
        )
    axes.set_xscale("log")
    # The labels stand to the left of the curve and above it: the first and the last need room.
    axes.margins(x=0.08, y=0.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("latency of a block (s)")
    axes.set_ylabel("throughput (token/s)")
    axes.set_title("Latency against throughput; numbers are sequences in the block")
    return figure


def throughput_over_memory(
    question: Question, tier: str, sizes: Sequence[int]
) -> dict[int, SearchResult]:
    """Search at each capacity of a tier, in bytes; what nothing fits into is left out."""
    found = {}
    for size in sizes:
        try:
            found[size] = search(
                with_capacities(question.hardware, {tier: size}),
                question.model,
                question.workload,
                margin=question.margin,
                permitted=question.permitted,
            )
        except InfeasibleError:
            continue
    return found


def plot_throughput_over_memory(curves: Mapping[str, Mapping[int, SearchResult]]) -> Figure:
    """Draw throughput over a tier's capacity, one curve for each label: what to buy."""
    figure, axes = _single()
    for color, (label, found) in zip(CURVE_COLORS, curves.items(), strict=False):
        gib = [size / GIB for size in found]
        rates = [result.job_tok_per_s for result in found.values()]
        axes.plot(gib, rates, "o-", color=color, label=label)
    highest = max((r.job_tok_per_s for found in curves.values() for r in found.values()), default=1)
    # From zero, lest a small gain look large; with room above, lest a flat curve lie on the frame.
    axes.set_ylim(0, 1.08 * highest)
    axes.set_xlabel("capacity (GiB)")
    axes.set_ylabel("throughput (token/s)")
    axes.set_title("Throughput of the best policy over memory")
    axes.legend(loc="lower right")
    return figure


def plot_rates(hardware: HardwareProfile) -> Figure:
    """Draw a machine's rates over the size of the work: matrix products, and disk requests."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    products, disk = figure.subplots(1, 2)
    devices = {"CPU": hardware.cpu.compute}
    if hardware.gpu is not None:
        devices["GPU"] = hardware.gpu.compute
    curves = [
        (f"{device} {dtype}", curve)
        for device, rates in devices.items()
        for dtype, curve in rates.matmul.items()
    ]
    for color, (label, curve) in zip(CURVE_COLORS, curves, strict=False):
        products.loglog(
            curve.sizes, [rate / 1e12 for rate in curve.rates], "o-", color=color, label=label
        )
    products.set_xlabel("rows of a matrix product")
    products.set_ylabel("TFLOP/s")
    products.set_title("Arithmetic")
    for color, (label, curve) in zip(
        CURVE_COLORS, (("read", hardware.disk.read), ("write", hardware.disk.write)), strict=False
    ):
        sizes = [size / 2**20 for size in curve.sizes]
        disk.semilogx(sizes, [r / 1e9 for r in curve.rates], "o-", color=color, label=label)
    disk.set_ylim(bottom=0)
    disk.set_xlabel("MiB of one request")
    disk.set_ylabel("GB/s")
    disk.set_title("Disk, past the page cache")
    for axis in (products.xaxis, products.yaxis, disk.xaxis):
        axis.set_major_formatter("{x:g}")
    for axes in (products, disk):
        axes.legend(loc="lower right")
    return figure


def draw_placement(axes: Axes, policy: Policy) -> None:
    """Draw the shares of weights, cache and hidden states on each tier."""
    kinds = {name.replace("_", " "): placement for name, placement in policy.weights.items()}
    kinds |= {"KV cache": policy.cache, "hidden states": policy.activations}
    left = [0.0] * len(kinds)
    for tier, color in TIER_COLORS.items():
        shares = [100 * getattr(placement, tier) for placement in kinds.values()]
        axes.barh(list(kinds), shares, left=left, color=color, label=TIER_NAMES[tier])
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share (%)")
    axes.set_title("Where everything is stored")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)


def draw_memory(axes: Axes, policy: Policy, hardware: HardwareProfile) -> None:
    """Draw each tier's buffers at its peak, as shares of its capacity."""
    problem, shares = problem_of(policy, hardware), shares_of(policy)
    limits = {tier: size for tier, size in capacities(hardware).items() if size}
    rows = memory_rows(problem, shares)
    peaks = {tier: max(rows[tier].values(), key=lambda r: sum(r.values())) for tier in limits}
    left = dict.fromkeys(limits, 0.0)
    for name, color in BUFFER_COLORS.items():
        parts = []
        for tier, limit in limits.items():
            terms = peaks[tier]
            of_rest = sum(use for other, use in terms.items() if other not in BUFFER_COLORS)
            use = of_rest if name == OTHER_BUFFERS else terms.get(name, 0.0)
            parts.append(100 * float(use) * policy.block_size / limit)
        if not any(parts):
            continue
        labels = [f"{TIER_NAMES[tier]}\n{format_bytes(limit)}" for tier, limit in limits.items()]
        axes.barh(labels, parts, left=list(left.values()), color=color, label=name)
        left = {t: left[t] + part for t, part in zip(limits, parts, strict=True)}
    axes.axvline(100, color="black", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("share of capacity (%)")
    axes.set_title("Memory at its peak")
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, fontsize="small", frameon=False
    )


def draw_channels(axes: Axes, policy: Policy, hardware: HardwareProfile) -> None:
    """Draw the busy seconds of every channel, the phases stacked."""
    phases = phase_channels(policy, hardware)
    channels = list(next(iter(phases.values())))
    left = [0.0] * len(channels)
    for phase, seconds in phases.items():
        values = [seconds[channel] for channel in channels]
        axes.barh(channels, values, left=left, color=PHASE_COLORS[phase], label=phase)
        left = [a + b for a, b in zip(left, values, strict=True)]
    if policy.predicted is not None:
        latency_s = policy.predicted.latency_s
        axes.axvline(latency_s, color="black", linestyle="--", linewidth=1, label="latency")
    axes.invert_yaxis()
    axes.set_xlabel(f"busy seconds in {'one block' if policy.lanes is None else 'the job'}")
    axes.set_title("What limits it")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)


def draw_shadow_prices(axes: Axes, prices: Sequence[ShadowPrice]) -> None:
    """Draw what one per cent more of each capacity and rate adds to throughput."""
    worth = {p.name: p.tok_per_s * p.amount / 100 for p in prices}
    names = sorted(worth, key=lambda name: -worth[name])
    names = [name for name in names if worth[name] > LEAST_SHARE * worth[names[0]]]
    labels = [f"{TIER_NAMES[name]} memory" if name in ("gpu", "cpu") else name for name in names]
    axes.barh(labels, [worth[name] for name in names], color=NEUTRAL_COLOR)
    axes.invert_yaxis()
    axes.set_xlabel("token/s")
    axes.set_title("Value of one per cent more")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all, in the format of its suffix."""
    check_picture("plot", path)
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "zigzag"}):
        figure.savefig(buffer, format=path.suffix[1:], dpi=120)
    write_output(path, lambda file: file.buffer.write(buffer.getvalue()))


def _single() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    return figure, figure.subplots()
