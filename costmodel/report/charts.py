"""Bars in rows, drawn by Bokeh. The only module here that needs it.

Colours of text, axes and background are CSS variables of the page, so that a picture follows the
reader's light or dark scheme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from bokeh.embed import json_item
from bokeh.models import (
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    InlineStyleSheet,
    NumeralTickFormatter,
    Range1d,
    Span,
)
from bokeh.plotting import figure

ROW_PIXELS = 38
AXIS_PIXELS = 62
TOOLBAR_PIXELS = 34
# Of a row's height.
BAR_SHARE = 0.76
# Of a bar that stands beside a measured one.
PALE = 0.5
# A finger that moves up or down scrolls the page; sideways it moves the picture.
SCROLLS_PAGE = ".bk-events { touch-action: pan-y !important; }"


@dataclass(slots=True, kw_only=True)
class Bars:
    """Bars to draw, in columns.

    Parameters
    ----------
    lanes
        Of each row: 1, or 2 for measured above predicted.
    details
        Further columns, by the names that a tooltip shows.
    """

    lanes: int = 1
    rows: list[float] = field(default_factory=list)
    left: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)
    colors: list[str] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    details: dict[str, list[Any]] = field(default_factory=dict)

    def add(
        self,
        row: int,
        left: float,
        right: float,
        color: str,
        *,
        lane: int = 0,
        **details: object,
    ) -> None:
        """Add one bar; every bar of a picture must have the same ``details``."""
        self.rows.append(row - BAR_SHARE / 2 + BAR_SHARE * (lane + 0.5) / self.lanes)
        self.left.append(left)
        self.right.append(right)
        self.colors.append(color)
        self.alphas.append(PALE if lane else 1.0)
        for name, value in details.items():
            self.details.setdefault(name, []).append(value)

    def add_stack(
        self, row: int, parts: Mapping[str, tuple[float, str, str]], *, lane: int = 0
    ) -> None:
        """Add bars one behind another: ``{name: (length, color, text of the amount)}``."""
        left = 0.0
        for name, (length, color, text) in parts.items():
            if length > 0:
                self.add(row, left, left + length, color, lane=lane, what=name, amount=text)
            left += length


def draw_bars(
    bars: Bars,
    labels: Sequence[str],
    *,
    x_label: str,
    x_format: str = "0,0.[000]",
    x_end: float | None = None,
    line_at: float | None = None,
    zooms: bool = False,
) -> dict[str, Any]:
    """Draw bars in labelled rows, the first on top; returns what BokehJS embeds.

    Parameters
    ----------
    x_format
        A pattern of Numeral.js.
    line_at
        Where a dashed line crosses all rows, such as a budget.
    zooms
        Whether the reader may zoom along the horizontal axis.
    """
    furthest = max([*bars.right, line_at or 0.0, x_end or 0.0], default=0.0) or 1.0
    plot = figure(
        height=ROW_PIXELS * len(labels) + AXIS_PIXELS + TOOLBAR_PIXELS * zooms,
        sizing_mode="stretch_width",
        # Beyond the last bar, a little room for the last label of the axis.
        x_range=Range1d(0, furthest * 1.03, bounds=(0, furthest * 1.03) if zooms else None),
        y_range=Range1d(len(labels) - 0.5, -0.5),
        tools="xpan,xbox_zoom,xzoom_in,xzoom_out,reset" if zooms else "",
        active_drag="xbox_zoom" if zooms else None,
        toolbar_location="above" if zooms else None,
        stylesheets=[InlineStyleSheet(css=SCROLLS_PAGE)],
        min_border_right=12,
    )
    plot.toolbar.logo = None
    plot.outline_line_color = None
    plot.ygrid.visible = False
    plot.yaxis.ticker = FixedTicker(ticks=list(range(len(labels))))
    plot.yaxis.major_label_overrides = dict(enumerate(labels))
    plot.yaxis.major_label_text_font_size = plot.xaxis.major_label_text_font_size = "13px"
    plot.xaxis.axis_label_text_font_size = "13px"
    plot.xaxis.axis_label_text_font_style = "normal"
    plot.xaxis.axis_label = x_label
    plot.xaxis.formatter = NumeralTickFormatter(format=x_format)
    plot.xaxis.ticker.desired_num_ticks = 5
    columns = {
        "row": np.asarray(bars.rows, dtype=np.float32),
        "left": np.asarray(bars.left),
        "right": np.asarray(bars.right),
        "color": bars.colors,
        "alpha": np.asarray(bars.alphas, dtype=np.float32),
    }
    drawn = plot.hbar(
        y="row",
        left="left",
        right="right",
        height=BAR_SHARE / bars.lanes * 0.94,
        fill_color="color",
        fill_alpha="alpha",
        line_color=None,
        source=ColumnDataSource(columns | bars.details),
    )
    tooltips = [(name.replace("_", " "), f"@{{{name}}}") for name in bars.details]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tooltips, point_policy="follow_mouse"))
    if line_at is not None:
        plot.add_layout(Span(location=line_at, dimension="height", line_dash="dashed"))
    return dict(json_item(plot))
