"""The drawings of the explanation, as SVG: some by hand, some of a policy that was searched."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from costmodel.cli.cluster_plots import plot_scaling
from costmodel.cli.palette import BUFFER_COLORS, TASK_COLORS, TIER_COLORS, content_of_task
from costmodel.cli.palette import CURVE_COLORS as COLORS
from costmodel.cli.plots import draw_channels, draw_memory
from costmodel.model.loading import load_model_spec
from costmodel.optimizer.optimum import SearchResult, search
from costmodel.plan.policy import TIERS
from costmodel.plan.workload import Workload
from costmodel.schedule.timeline import TimedTask, simulate
from profiles.hardware import CHANNELS
from profiles.recorded import find_profile
from profiles.units import GIB

FOLDER = "img"
PALE = "#eeeeee"
RESULTS = Path(__file__).parents[2] / "tests/bench/results"
CLUSTERS = RESULTS / "cluster-scaling.json"
MIXTURES = RESULTS / "mixtures-paper.json"
# The timeline shows these layers of the second pass.
SHOWN_LAYERS = range(10, 13)
# Small enough that all channels work, in batches that a reader can count.
SEARCHED = (
    "96 prompts for Llama 3.1 8B on `rtx4090-pc`, with 6 GiB of GPU memory and 16 GiB of CPU memory"
)


def pictures() -> Iterator[tuple[str, bytes]]:
    """Draw every picture; yields them by path."""
    for name, draw in DRAWN.items():
        buffer = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": "zigzag"}):
            draw().savefig(buffer, format="svg", metadata={"Date": None})
        yield f"{FOLDER}/{name}.svg", buffer.getvalue()


@cache
def searched() -> SearchResult:
    """Search the policy that the pictures show."""
    machine = find_profile("rtx4090-pc").with_budget(gpu_memory=6 * GIB, cpu_memory=16 * GIB)
    workload = Workload(prompt_len=512, gen_len=64, num_prompts=96)
    return search(machine, load_model_spec("llama-3.1-8b"), workload)


def draw_flow() -> Figure:
    """Draw what becomes of a machine, a model and a workload."""
    figure, axes = _blank(9, 2.6, width=90, height=26)
    _box(axes, 0, 17, 18, 7, "machine\nzigzag measure", COLORS[4])
    _box(axes, 0, 1, 18, 7, "model and workload", COLORS[4])
    _box(axes, 26, 17, 16, 7, "profile", PALE)
    _box(axes, 50, 9, 16, 7, "policy\nzigzag search", COLORS[1])
    _box(axes, 74, 17, 16, 7, "run\nzigzag generate", COLORS[2])
    _box(axes, 74, 1, 16, 7, "prediction", PALE)
    for start, end in (
        ((18, 20.5), (26, 20.5)),
        ((42, 20.5), (50, 14)),
        ((18, 4.5), (50, 11)),
        ((66, 14), (74, 20.5)),
        ((66, 11), (74, 4.5)),
    ):
        _arrow(axes, start, end)
    axes.annotate("", (82, 8), (82, 17), arrowprops={"arrowstyle": "<->", "linestyle": "--"})
    axes.text(83, 12.5, "compared", va="center", fontsize="small")
    return figure


def draw_tiers() -> Figure:
    """Draw the tiers with the channels between and beside them."""
    figure, axes = _blank(9, 2.6, width=80, height=26)
    for tier, left, text in zip(
        TIERS, (62, 31, 0), ("GPU memory", "CPU memory", "disk"), strict=True
    ):
        _box(axes, left, 6, 18, 12, text, TIER_COLORS[tier], light=tier == "gpu")
    for left, there, back in ((18, "disk_read", "disk_write"), (49, "h2d", "d2h")):
        _arrow(axes, (left, 14.5), (left + 13, 14.5))
        _arrow(axes, (left + 13, 9.5), (left, 9.5))
        axes.text(left + 6.5, 15.3, there, ha="center", fontsize="small")
        axes.text(left + 6.5, 7.3, back, ha="center", fontsize="small")
    for left, text in ((40, "cpu_compute"), (71, "gpu_compute")):
        axes.text(left, 22, text, ha="center", fontsize="small")
        axes.annotate(
            "",
            (left + 3, 18),
            (left - 3, 18),
            arrowprops={"arrowstyle": "->", "connectionstyle": "arc3,rad=-0.9"},
        )
    return figure


def draw_zigzag() -> Figure:
    """Draw the order in which layers and batches of a block are computed."""
    num_layers, num_batches = 4, 4
    figure, axes = _blank(9, 3.2, width=54, height=19)
    for token in range(3):
        left = 18 * token
        axes.text(left + 8, 18, ["prefill", "token 1", "token 2"][token], ha="center")
        for layer in range(num_layers):
            for batch in range(num_batches):
                x, y = left + 4 * layer, 13 - 4 * batch
                color = COLORS[layer]
                axes.add_patch(FancyBboxPatch((x + 0.4, y), 2.6, 2.6, fc=color, ec="none"))
            top, end = (left + 4 * layer + 1.7, 15.2), (left + 4 * layer + 1.7, 1.4)
            _arrow(axes, top, end, color="white")
            if layer + 1 < num_layers:
                there = (top[0] + 4, 15.2)
                axes.plot([end[0], there[0]], [end[1], there[1]], color="0.4", lw=1.2, ls=":")
    axes.text(-1, 9, "batches", rotation=90, va="center", ha="right")
    axes.text(8, -0.7, "layers", ha="center", va="top")
    axes.set_xlim(-3, 54)
    axes.set_ylim(-3, 20)
    return figure


def draw_cut() -> Figure:
    """Draw how one component's run of bytes is cut over the tiers, and what is staged."""
    figure, axes = _blank(9, 2.8, width=90, height=28)
    axes.text(0, 25, "one component of one layer: vectors first, then stacked matrices")
    edges = {"gpu": (0, 28), "cpu": (28, 62), "disk": (62, 90)}
    names = {"gpu": "on the GPU", "cpu": "in CPU memory", "disk": "on disk"}
    for tier, (left, right) in edges.items():
        _box(axes, left, 16, right - left, 7, names[tier], TIER_COLORS[tier], light=tier == "gpu")
    for cut in (28, 62):
        axes.plot([cut, cut], [13.5, 24.5], color="black", lw=1.5)
        axes.text(cut, 12.2, "cut", ha="center", va="top", fontsize="small")
    _box(axes, 0, 1, 28, 7, "resident run", TIER_COLORS["gpu"], light=True)
    _box(
        axes,
        30,
        1,
        60,
        7,
        "staged run: copied to the GPU for each pass",
        BUFFER_COLORS["weight staging"],
    )
    _arrow(axes, (48, 15.5), (55, 8.5))
    _arrow(axes, (76, 15.5), (69, 8.5))
    return figure


def draw_timeline() -> Figure:
    """Draw some layers of decode, every task on its channel."""
    found = searched()
    tasks = simulate(found.policy, found.hardware, num_passes=3).tasks
    shown = [
        timed
        for timed in tasks
        if timed.task.token == 2
        and timed.task.layer in SHOWN_LAYERS
        and "compute" in timed.task.channel
    ]
    begin, end = min(t.start_s for t in shown), max(t.end_s for t in shown)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, channel in enumerate(CHANNELS):
        _draw_track(axes, number, channel, tasks, begin, end)
    axes.set_yticks(range(len(CHANNELS)), CHANNELS)
    axes.set_ylim(len(CHANNELS) - 0.5, -0.5)
    axes.set_xlim(0, 1e3 * (end - begin))
    axes.set_xlabel("ms")
    axes.set_title(f"Layers {SHOWN_LAYERS.start} to {SHOWN_LAYERS.stop - 1} of one decode pass")
    handles = [
        mpl.patches.Patch(color=color, label=content) for content, color in TASK_COLORS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _draw_track(
    axes: Axes, number: int, channel: str, tasks: Sequence[TimedTask], begin: float, end: float
) -> None:
    for timed in tasks:
        if timed.task.channel != channel or timed.end_s < begin or timed.start_s > end:
            continue
        span = (1e3 * (timed.start_s - begin), 1e3 * (timed.end_s - timed.start_s))
        color = TASK_COLORS[content_of_task(timed.task.kind)]
        axes.broken_barh([span], (number - 0.4, 0.8), facecolor=color, edgecolor="white", lw=0.4)


def draw_stages() -> Figure:
    """Draw the busy seconds of the channels, by phase."""
    found = searched()
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    draw_channels(figure.subplots(), found.policy, found.hardware)
    return figure


def draw_tier_memory() -> Figure:
    """Draw the buffers of each tier at its peak."""
    found = searched()
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    draw_memory(figure.subplots(), found.policy, found.hardware)
    return figure


def draw_clusters() -> Figure:
    """Draw what clusters of many machines are predicted to reach."""
    found = json.loads(CLUSTERS.read_text(encoding="utf-8"))
    return plot_scaling(found["cases"])


def draw_mixtures() -> Figure:
    """Draw predicted over published throughput of mixtures of experts."""
    found = json.loads(MIXTURES.read_text(encoding="utf-8"))["published"]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    systems = dict.fromkeys(run["system"] for run in found)
    for color, system in zip(COLORS, systems, strict=False):
        runs = [run for run in found if run["system"] == system]
        rates = ([run[f"{name}_tok_per_s"] for run in runs] for name in ("published", "predicted"))
        axes.loglog(*rates, "o", color=color, label=system)
    ends = (1, 10_000)
    axes.loglog(ends, ends, color="0.4", lw=1)
    axes.fill_between(ends, [0.8 * x for x in ends], [1.2 * x for x in ends], color=PALE, zorder=0)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_xlabel("published, token/s")
    axes.set_ylabel("predicted, token/s")
    axes.legend(frameon=False)
    return figure


def _blank(inches: float, high: float, *, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(inches, high), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(-1, width + 1)
    axes.set_ylim(-1, height)
    axes.axis("off")
    return figure, axes


def _box(
    axes: Axes,
    left: float,
    bottom: float,
    width: float,
    height: float,
    text: str,
    color: str,
    *,
    light: bool = False,
) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.6", fc=color
        )
    )
    middle = (left + width / 2, bottom + height / 2)
    axes.text(*middle, text, ha="center", va="center", color="white" if light else "black")


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "black"
) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color})


DRAWN: dict[str, Callable[[], Figure]] = {
    "flow": draw_flow,
    "tiers": draw_tiers,
    "zigzag": draw_zigzag,
    "cut": draw_cut,
    "timeline": draw_timeline,
    "stages": draw_stages,
    "memory": draw_tier_memory,
    "clusters": draw_clusters,
    "mixtures": draw_mixtures,
}
