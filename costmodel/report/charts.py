"""Bars in rows, and curves in steps, drawn by Bokeh. The only module here that needs it.

Colours of text, axes and background are CSS variables of the page, so that a picture follows the
reader's light or dark scheme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from bokeh.embed import json_item
from bokeh.layouts import column
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    InlineStyleSheet,
    NumeralTickFormatter,
    Range1d,
    RangeTool,
)
from bokeh.models.annotations import Span
from bokeh.plotting import figure

ROW_PIXELS = 38
AXIS_PIXELS = 62
TOOLBAR_PIXELS = 34
STRIP_PIXELS = 56
CURVE_PIXELS = 210
# Of a row's height.
BAR_SHARE = 0.76
# The opacity of a bar below a measured one.
FAINT = 0.5
TOOLTIP = '<div style="white-space: pre-line">@text</div>'
# A finger that moves up or down scrolls the page; sideways it moves the picture.
SCROLLS_PAGE = ".bk-events { touch-action: pan-y !important; }"


@dataclass(slots=True, kw_only=True)
class Bars:
    """Bars to draw, in columns.

    Parameters
    ----------
    lanes
        Of each row: 1, or 2 for measured above predicted.
    texts
        What is told of each bar when a reader points at it, in lines.
    """

    lanes: int = 1
    rows: list[float] = field(default_factory=list)
    left: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)
    colors: list[str] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def add(
        self, row: int, left: float, right: float, color: str, text: str, *, lane: int = 0
    ) -> None:
        """Add one bar to a row; bars of the second lane are faint."""
        self.rows.append(row - BAR_SHARE / 2 + BAR_SHARE * (lane + 0.5) / self.lanes)
        self.left.append(left)
        self.right.append(right)
        self.colors.append(color)
        self.alphas.append(FAINT if lane else 1.0)
        self.texts.append(text)

    def add_stack(
        self, row: int, parts: Mapping[str, tuple[float, str, str]], *, lane: int = 0
    ) -> None:
        """Add bars one behind another: ``{name: (length, color, text of the amount)}``."""
        left = 0.0
        for name, (length, color, amount) in parts.items():
            if length > 0:
                self.add(row, left, left + length, color, f"{name}: {amount}", lane=lane)
            left += length


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A curve in steps: from ``edges[i]`` to ``edges[i + 1]`` it has the value ``values[i]``.

    ``texts`` are told of each step. A faint curve is drawn below others.
    """

    edges: Sequence[float]
    values: Sequence[float]
    texts: Sequence[str]
    color: str
    is_faint: bool = False


def draw_curves(
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    line_at: float | None = None,
) -> dict[str, Any]:
    """Draw curves from zero upward, a dashed line at ``line_at``; returns what BokehJS embeds."""
    highest = max([line_at or 0.0, *(max(curve.values) for curve in curves)]) or 1.0
    plot = figure(
        height=CURVE_PIXELS,
        x_range=Range1d(start=0, end=max(curve.edges[-1] for curve in curves)),
        y_range=Range1d(start=0, end=1.06 * highest),
        tools="",
        toolbar_location=None,
        sizing_mode="stretch_width",
        stylesheets=[InlineStyleSheet(css=SCROLLS_PAGE)],
        min_border_right=12,
        outline_line_color=None,
    )
    for axis, label in ((plot.xaxis, x_label), (plot.yaxis, y_label)):
        axis.axis_label = label
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "13px"
        axis.axis_label_text_font_style = "normal"
        axis.formatter = NumeralTickFormatter(format="0,0.[000]")
        axis.ticker = BasicTicker(desired_num_ticks=5)
        axis.minor_tick_line_color = None
    for curve in sorted(curves, key=lambda curve: not curve.is_faint):
        columns: dict[str, Any] = {
            "left": np.asarray(curve.edges[:-1], float),
            "right": np.asarray(curve.edges[1:], float),
            "top": np.asarray(curve.values, float),
            "text": list(curve.texts),
        }
        source = ColumnDataSource(columns)
        line = ColumnDataSource(
            {
                "x": np.repeat(np.asarray(curve.edges, float), 2)[1:-1],
                "y": np.repeat(columns["top"], 2),
            }
        )
        plot.line(
            "x",
            "y",
            source=line,
            line_color=curve.color,
            line_width=4 if curve.is_faint else 1.5,
            line_alpha=FAINT if curve.is_faint else 1.0,
        )
        # A line cannot be pointed at between its ends.
        areas = plot.quad(left="left", right="right", bottom=0, top="top", source=source, alpha=0.0)
        plot.add_tools(HoverTool(renderers=[areas], tooltips=TOOLTIP, mode="vline"))
    if line_at is not None:
        plot.add_layout(Span(location=line_at, dimension="width", line_dash="dashed"))
    return dict(json_item(plot))


def draw_bars(
    bars: Bars,
    labels: Sequence[str],
    *,
    x_label: str,
    x_format: str = "0,0.[000]",
    x_end: float = 0.0,
    line_at: float | None = None,
    window: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Draw bars in labelled rows, the first on top; returns what BokehJS embeds.

    Parameters
    ----------
    x_format
        A pattern of Numeral.js.
    x_end
        The axis reaches at least this far.
    line_at
        Where a dashed line crosses all rows, such as a budget.
    window
        The part that is seen first, in a picture that zooms: a strip below it shows the whole.
    """
    # Beyond the last bar, a little room for the last label of the axis.
    furthest = 1.03 * (max([*bars.right, line_at or 0.0, x_end], default=0.0) or 1.0)
    begin, end = window or (0.0, furthest)
    plot = figure(
        height=ROW_PIXELS * len(labels) + AXIS_PIXELS + TOOLBAR_PIXELS * (window is not None),
        x_range=Range1d(start=begin, end=end, bounds=(0.0, furthest)),
        tools="xpan,xbox_zoom,xzoom_in,xzoom_out,reset" if window else "",
        toolbar_location="above" if window else None,
        **_shared_options(labels),
    )
    plot.toolbar.logo = None
    plot.yaxis.ticker = FixedTicker(ticks=list(range(len(labels))))
    plot.yaxis.major_label_overrides = dict(enumerate(labels))
    plot.xaxis.axis_label_text_font_size = "13px"
    plot.xaxis.axis_label_text_font_style = "normal"
    plot.xaxis.axis_label = x_label
    plot.xaxis.formatter = NumeralTickFormatter(format=x_format)
    plot.yaxis.major_label_text_font_size = plot.xaxis.major_label_text_font_size = "13px"
    plot.xaxis.ticker = BasicTicker(desired_num_ticks=5)
    plot.xaxis.minor_tick_line_color = None
    source = _source_of(bars)
    drawn = _draw(plot, bars, source)
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=TOOLTIP, point_policy="follow_mouse"))
    if line_at is not None:
        plot.add_layout(Span(location=line_at, dimension="height", line_dash="dashed"))
    if window is None:
        return dict(json_item(plot))
    strip = figure(
        height=STRIP_PIXELS,
        x_range=Range1d(start=0.0, end=furthest),
        tools="",
        toolbar_location=None,
        **_shared_options(labels),
    )
    strip.axis.visible = False
    _draw(strip, bars, source)
    strip.add_tools(RangeTool(x_range=plot.x_range))
    return dict(json_item(column(plot, strip, sizing_mode="stretch_width")))


def _shared_options(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "sizing_mode": "stretch_width",
        "y_range": Range1d(start=len(labels) - 0.5, end=-0.5),
        "stylesheets": [InlineStyleSheet(css=SCROLLS_PAGE)],
        "min_border_right": 12,
        "outline_line_color": None,
    }


def _source_of(bars: Bars) -> ColumnDataSource:
    columns: dict[str, Any] = {
        "row": np.asarray(bars.rows, dtype=np.float32),
        "left": np.asarray(bars.left),
        "right": np.asarray(bars.right),
        "color": bars.colors,
        "alpha": np.asarray(bars.alphas, dtype=np.float32),
        "text": bars.texts,
    }
    return ColumnDataSource(columns)


def _draw(plot: Any, bars: Bars, source: ColumnDataSource) -> Any:
    plot.ygrid.visible = False
    return plot.hbar(
        y="row",
        left="left",
        right="right",
        height=BAR_SHARE / bars.lanes * 0.94,
        fill_color="color",
        fill_alpha="alpha",
        line_color=None,
        source=source,
    )
