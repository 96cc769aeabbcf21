"""The section that shows which hardware would help."""

from __future__ import annotations

import re

from costmodel.cli.palette import NEUTRAL_COLOR
from costmodel.report.buying import Purchases
from costmodel.report.charts import Bars, draw_bars
from costmodel.report.parts import Picture, Section, Table
from profiles.units import format_figure


def buying_section(purchases: Purchases) -> Section:
    """Show the throughput of the best policy on machines that differ in one thing."""
    base = purchases.job_tok_per_s
    if not purchases.changes:
        text = f"The search found no policy: {purchases.problem}"
        return Section(name="buying", title="What to buy", text=[text], legend={})
    found = {"this machine": base}
    found |= {
        change.what: change.job_tok_per_s
        for change in sorted(purchases.changes, key=lambda change: -change.job_tok_per_s)
    }
    bars, rows = Bars(), []
    for row, (what, rate) in enumerate(found.items()):
        figure = f"{format_figure(rate, 4)} token/s"
        bars.add_stack(row, {what: (rate, NEUTRAL_COLOR, figure)})
        rows.append([what, figure, f"{rate / base - 1:+.1%}" if row else ""])
    item = draw_bars(bars, [_short(what) for what in found], x_label="token/s", line_at=base)
    return Section(
        name="buying",
        title="What to buy",
        text=[
            "Machines that differ from this one in one thing, each with its own best policy.",
            "These are predictions for the whole job: its last block may be smaller.",
        ],
        legend={},
        pictures=[Picture(item=item, title="Throughput of machines that differ in one thing")],
        table=Table(headers=["", "throughput", "gain"], rows=rows),
    )


def _short(what: str) -> str:
    """Shorten a label for narrow screens; the table has it in full."""
    what = re.sub(r"a (.PU) that computes twice as fast", r"\1 2x as fast", what)
    what = re.sub(r"twice the (\w+)'s rates", r"\1 2x as fast", what)
    return re.sub(r"(.*) more (.*)", r"+\1 \2", what)
