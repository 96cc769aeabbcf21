"""Why nothing fits: the tiers that are short, the missing bytes, and budgets that are enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from costmodel.optimizer.columns import Columns, coefficients
from costmodel.pricing.linear_form import total
from costmodel.pricing.memory import capacities, memory_rows
from costmodel.pricing.problem import Problem
from costmodel.pricing.shares import unit_shares
from profiles.aligned_io import PAGE_BYTES
from profiles.units import MIB, format_bytes

# Missing bytes cost least on disk and most on the GPU, so that the advice names the tier that is
# easiest to extend.
SHORTAGE_COST = {"disk": 1.0, "cpu": 10.0, "gpu": 100.0}
FLAGS = {"gpu": "--gpu-memory", "cpu": "--cpu-memory", "disk": "--disk"}
# Bytes are counted in these, a size that suits the solver's tolerances.
MEGABYTE = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """The tiers that are short for the smallest block.

    Parameters
    ----------
    missing_bytes
        What the program lacks, without room for rounding.
    capacity_bytes
        What the machine has.
    budget_bytes
        Capacities that are enough, with room for rounding.
    """

    missing_bytes: Mapping[str, int]
    capacity_bytes: Mapping[str, int]
    budget_bytes: Mapping[str, int]

    def __str__(self) -> str:
        # Rounded up, to sizes that people write.
        enough = {tier: -(-size // MIB) * MIB for tier, size in self.budget_bytes.items()}
        found = " and ".join(
            f"{tier} is short by {format_bytes(size - self.capacity_bytes[tier])}"
            for tier, size in enough.items()
        )
        advice = " and ".join(f"{FLAGS[tier]} {size // MIB}MiB" for tier, size in enough.items())
        return f"nothing fits: {found}; try: {advice}"


def shortage_of(problem: Problem, *, margin: float = 0.001) -> Shortage:
    """Find the tiers that are short for the smallest block, the missing bytes, and enough budgets.

    Budgets are larger than the program's optimum by the fraction ``margin``, which leaves room for
    rounding to whole rows and pages.
    """
    limits = capacities(problem.hardware)
    batch = problem.gpu_batch_size
    units = unit_shares(problem.components)
    tiers, forms = list(limits), []
    short_of: list[str] = []
    for tier, rows in memory_rows(problem, units).items():
        for terms in rows.values():
            over = total([*terms.values(), units.per_block * -limits[tier]])
            forms.append(over * (batch / MEGABYTE))
            short_of.append(tier)
    missing = np.array([[-float(tier == other) for other in tiers] for tier in short_of])
    matrix = coefficients(forms, problem.components)
    point = Columns(problem).minimize(
        (batch, batch),
        rows=matrix,
        others=missing,
        cost=np.zeros(matrix.shape[1]),
        cost_of_others=np.array([SHORTAGE_COST[tier] for tier in tiers]),
    )
    short = {tier: int(value * MEGABYTE) for tier, value in zip(tiers, point.others, strict=True)}
    # Where no tier is short, only rounding lacks room.
    short = {tier: count for tier, count in short.items() if count > 0} or {"cpu": 0}
    # A cut may be half a piece off in every component, and each starts at a page of the disk.
    parts = [component for layer in problem.sizes.layers for component in layer.components]
    edges = sum(PAGE_BYTES + component.cut_bytes for component in parts)
    budgets = {
        tier: int((limits[tier] + count) * (1 + margin)) + edges for tier, count in short.items()
    }
    return Shortage(
        missing_bytes={
            tier: count or budgets[tier] - limits[tier] for tier, count in short.items()
        },
        capacity_bytes=limits,
        budget_bytes=budgets,
    )
