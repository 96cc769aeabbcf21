"""Pictures show the figures of the model, and the frontier is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from costmodel.cli.flags import Question
from costmodel.cli.plots import (
    draw_channels,
    draw_memory,
    plot_frontier,
    plot_policy,
    plot_throughput_over_memory,
    save_figure,
    throughput_over_memory,
)
from costmodel.frontier import FrontierPoint, frontier
from costmodel.model.loading import load_model_spec
from costmodel.optimizer.choices import Permitted
from costmodel.optimizer.optimum import SearchResult, search
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import capacities
from profiles import InfeasibleError, InputError, recorded_profile
from profiles.units import GIB

QUESTION = Question(
    hardware=recorded_profile("rtx3090-pc"),
    model=load_model_spec("llama-3.1-8b"),
    workload=Workload(prompt_len=256, gen_len=32),
    margin=0.01,
    permitted=Permitted(),
)


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return search(QUESTION.hardware, QUESTION.model, QUESTION.workload)


@pytest.fixture(scope="module")
def points() -> list[FrontierPoint]:
    return frontier(QUESTION, num_points=6)


def _ends(figure: Figure) -> dict[float, float]:
    """Return where the stacked bars of the only axes end, by their place."""
    ends: dict[float, float] = {}
    for container in figure.axes[0].containers:
        assert isinstance(container, BarContainer)
        for bar in container:
            place = round(bar.get_y() + bar.get_height() / 2, 6)
            ends[place] = max(ends.get(place, 0.0), bar.get_x() + bar.get_width())
    return ends


def test_memory_bars_end_at_the_peaks(result: SearchResult) -> None:
    figure = Figure()
    draw_memory(figure.subplots(), result.policy, QUESTION.hardware)
    limits = capacities(QUESTION.hardware)
    expected = [100 * result.predicted.peak_bytes[tier] / limits[tier] for tier in limits]
    assert list(_ends(figure).values()) == pytest.approx(expected, rel=1e-6)


def test_channel_bars_are_the_busy_seconds(result: SearchResult) -> None:
    figure = Figure()
    draw_channels(figure.subplots(), result.policy, QUESTION.hardware)
    expected = [result.predicted.channel_s[name] for name in result.predicted.channel_s]
    assert list(_ends(figure).values()) == pytest.approx(expected, rel=1e-6)


def test_the_frontier_rises_and_ends_at_the_optimum(
    points: list[FrontierPoint], result: SearchResult
) -> None:
    assert len(points) >= 3
    latencies = [point.latency_s for point in points]
    rates = [point.tok_per_s for point in points]
    assert np.all(np.diff(latencies) > 0) and np.all(np.diff(rates) > 0)
    assert points[-1].tok_per_s == pytest.approx(result.job_tok_per_s)
    assert all(point.latency_s <= point.max_latency_s * (1 + 1e-9) for point in points)


def test_nothing_is_faster_than_the_frontier_s_first_point(points: list[FrontierPoint]) -> None:
    with pytest.raises(InfeasibleError, match="--max-latency"):
        search(
            QUESTION.hardware,
            QUESTION.model,
            QUESTION.workload,
            max_latency_s=points[0].latency_s * 0.9,
        )


def test_throughput_over_memory_leaves_out_what_does_not_fit() -> None:
    small = replace(QUESTION, hardware=QUESTION.hardware.with_budget(disk=0, gpu_memory=2 * GIB))
    found = throughput_over_memory(small, "cpu", [1 * GIB, 32 * GIB, 64 * GIB])
    assert list(found) == [32 * GIB, 64 * GIB]
    axes = plot_throughput_over_memory({"small": found}).axes[0]
    assert np.asarray(axes.lines[0].get_xdata()).tolist() == [32, 64]
    rates = [result.job_tok_per_s for result in found.values()]
    assert np.asarray(axes.lines[0].get_ydata()).tolist() == rates


def _with_large_block(point: FrontierPoint) -> FrontierPoint:
    """Return the point with a block whose label is among the longest."""
    policy = replace(
        point.result.policy, gpu_batch_size=1, prefill_batch_size=1, num_gpu_batches=4096
    )
    return replace(point, result=replace(point.result, policy=policy))


def test_labels_lie_inside_the_frame(points: list[FrontierPoint]) -> None:
    figure = plot_frontier([_with_large_block(point) for point in points])
    figure.draw_without_rendering()
    frame = figure.axes[0].bbox
    assert len(figure.axes[0].texts) == len(points)
    for label in figure.axes[0].texts:
        box = label.get_window_extent()
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1


def test_a_nearly_flat_curve_lies_below_the_frame(result: SearchResult) -> None:
    less = replace(result, job_tok_per_s=0.95 * result.job_tok_per_s)
    axes = plot_throughput_over_memory({"flat": {GIB: less, 2 * GIB: result}}).axes[0]
    bottom, top = axes.get_ylim()
    assert bottom == 0 and 1.05 * result.job_tok_per_s < top < 1.2 * result.job_tok_per_s


def test_a_curve_without_points_is_drawn_empty() -> None:
    axes = plot_throughput_over_memory({"nothing fits": {}}).axes[0]
    assert np.asarray(axes.lines[0].get_xdata()).size == 0


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pictures_are_written_whole(
    suffix: str, tmp_path: Path, points: list[FrontierPoint], result: SearchResult
) -> None:
    path = tmp_path / f"plot{suffix}"
    save_figure(plot_frontier(points), path)
    heads = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert path.read_bytes().startswith(heads[suffix])
    save_figure(plot_policy(result), path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_other_suffixes_are_refused(tmp_path: Path, points: list[FrontierPoint]) -> None:
    with pytest.raises(InputError, match=r"\.png, \.svg, \.pdf"):
        save_figure(plot_frontier(points), tmp_path / "plot.bmp")
    assert list(tmp_path.iterdir()) == []
