"""Pictures of clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from costmodel.cli.palette import CURVE_COLORS


def plot_scaling(cases: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw throughput and cost over the number of nodes, one curve for each model and machine.

    Parameters
    ----------
    cases
        Each with ``model``, ``machine``, ``price_per_hour`` and ``points``, which are
        ``costmodel.cluster.scaling.ScaledCluster`` as JSON. Points without throughput are left out.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    rates, costs = figure.subplots(1, 2)
    for color, case in zip(CURVE_COLORS, cases, strict=False):
        points = [point for point in case["points"] if point["throughput_tok_per_s"]]
        counts = [point["num_nodes"] for point in points]
        label = f"{case['model']}, {case['machine']}"
        each = [point["throughput_tok_per_s"] for point in points]
        rates.plot(counts, each, "o-", color=color, label=label)
        each = [point["cost_per_million"] for point in points]
        costs.plot(counts, each, "o-", color=color, label=label)
    _finish(rates, cases, "token/s", "Throughput")
    _finish(costs, cases, "$ per million generated tokens", "Cost")
    handles, labels = rates.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _finish(axes: Axes, cases: Sequence[Mapping[str, Any]], unit: str, title: str) -> None:
    counts = sorted({point["num_nodes"] for case in cases for point in case["points"]})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(visible=True, alpha=0.3)
    axes.set_xlabel("nodes")
    axes.set_ylabel(unit)
    axes.set_title(title)
