"""The linear program at one ``gpu_batch_size``: the placement of every byte, and the block size.

Minimising latency over block size looks bilinear. Per sequence it is linear (Charnes and Cooper
1962): see ``Shares``. Products of two variables remain. They are exact where the block size is
fixed. Over a range of block sizes, their McCormick envelope makes the optimum a certified lower
bound of every policy's latency.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from costmodel.optimizer.columns import PER_BLOCK, Columns
from costmodel.optimizer.rows import RowTable, memory_forms, memory_scale, time_forms
from costmodel.optimizer.solver import Array
from costmodel.pricing.linear_form import LinearForm
from costmodel.pricing.memory import capacities
from costmodel.pricing.problem import Problem
from costmodel.pricing.shares import Shares, share_names
from costmodel.pricing.steady import stages_to_solve

# Of policies with equal latency, the one with the least work on all channels is the best: needless
# moves disturb a run in ways that the model leaves out.
TRAFFIC_WEIGHT = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one solution in addition to the rows of the problem.

    Parameters
    ----------
    block_sizes
        Least and most sequences in a block; equal fixes the size.
    max_latency_s
        Limit on the latency of one block.
    reserve
        Bytes per tier to leave free, in addition to those of the formulas.
    fixed
        Fixed shares by name.
    """

    block_sizes: tuple[int, int]
    max_latency_s: float | None = None
    reserve: Mapping[str, int] | None = None
    fixed: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """An optimum of the program.

    Parameters
    ----------
    shares
        Values of the variables.
    latency_per_sequence_s
        Latency of these shares.
    bound_per_sequence_s
        No policy in the range of block sizes is faster.
    duals
        By row: the change in seconds per sequence for one unit more of its right-hand side.
    """

    shares: Shares[float]
    latency_per_sequence_s: float
    bound_per_sequence_s: float
    duals: Mapping[str, float]


def rows_of(problem: Problem) -> dict[str, LinearForm]:
    """Return the left sides of the program's rows: each is at most zero, and those of a stage,
    named ``time.STAGE.LIMIT``, at most the stage's seconds."""
    rows: dict[str, LinearForm] = {}
    for stage in stages_to_solve(problem):
        rows |= time_forms(problem, stage)
    return rows | memory_forms(problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """The price of some shares: seconds per sequence, and the bytes in excess of each capacity that
    they exceed."""

    latency_per_sequence_s: float
    overshoot_bytes: Mapping[str, int]


class Program:
    """The rows of one problem, evaluated once, and solved for any range of block sizes.

    Programs that share a ``RowTable`` are of one machine, model and workload.
    """

    def __init__(self, problem: Problem, table: RowTable | None = None) -> None:
        self.problem = problem
        self.table = table or RowTable(problem.hardware)
        self._columns = Columns(problem)
        stages = stages_to_solve(problem)
        parts = [self.table.stage_rows(problem, stage) for stage in stages]
        counts = [len(part.names) for part in parts]
        parts.append(self.table.memory_rows(problem))
        self._names = tuple(name for part in parts for name in part.names)
        # [rows, shares]
        self.rows = np.vstack([part.matrix for part in parts])
        self._num_timed = sum(counts)
        # [rows, stages]: -1 where a row limits the seconds of a stage.
        self._stages = np.zeros((len(self.rows), len(stages)))
        self._stages[np.arange(self._num_timed), np.repeat(np.arange(len(stages)), counts)] = -1.0

    def price(self, shares: Shares[float]) -> Price:
        """Price a point of the problem, whether it fits or not."""
        named = shares.values()
        values = self.rows @ np.array([named[n] for n in share_names(self.problem.components)])
        # Rows that limit no stage count as zero here.
        seconds = np.where(self._stages < 0, values[:, None], 0.0).max(axis=0)
        over = {}
        for tier, capacity in capacities(self.problem.hardware).items():
            most = values[self._of_tier(tier)].max()
            over[tier] = round(most / memory_scale(self.problem, capacity) / shares.per_block)
        return Price(
            latency_per_sequence_s=float(seconds.sum()),
            overshoot_bytes={tier: count for tier, count in over.items() if count > 0},
        )

    def of_problem(self, problem: Problem) -> Program:
        """Return the program of another problem with the same machine, model and workload."""
        return Program(problem, self.table)

    def solve(self, limits: Limits) -> Solution:
        """Solve for the block sizes and limits given.

        Raises
        ------
        Infeasible
            When nothing fits.
        RunError
            When the solver is missing or ends without an optimum.
        """
        rows = self._with_reserve(limits.reserve or {})
        others = self._stages
        num_stages = others.shape[1]
        if limits.max_latency_s is not None:
            latency = np.zeros((1, rows.shape[1]))
            latency[0, PER_BLOCK] = -limits.max_latency_s
            rows, others = np.vstack([rows, latency]), np.vstack([others, np.ones((1, num_stages))])
        point = self._columns.minimize(
            limits.block_sizes,
            rows=rows,
            others=others,
            cost=TRAFFIC_WEIGHT * self.rows[: self._num_timed].sum(axis=0),
            cost_of_others=np.ones(num_stages),
            fixed=limits.fixed or {},
        )
        # The limits of a stage add up to at most their number times its seconds. Without that sum,
        # which breaks ties, the objective bounds every policy.
        most = 1 + TRAFFIC_WEIGHT * self._num_timed / num_stages
        return Solution(
            shares=point.shares,
            latency_per_sequence_s=float(point.others.sum()),
            bound_per_sequence_s=point.objective / most,
            duals=dict(zip(self._names, point.duals[: len(self._names)].tolist(), strict=True)),
        )

    def _with_reserve(self, reserve: Mapping[str, int]) -> Array:
        rows = self.rows
        for tier, capacity in capacities(self.problem.hardware).items():
            if taken := min(reserve.get(tier, 0), capacity):
                rows = rows.copy()
                rows[self._of_tier(tier), PER_BLOCK] += taken * memory_scale(self.problem, capacity)
        return rows

    def _of_tier(self, tier: str) -> list[bool]:
        return [name.startswith(f"capacity.{tier}.") for name in self._names]


def of_blocks(
    problem: Problem, num_batches: tuple[int, int], loads_per_block: float = 1.0
) -> Problem:
    """Return the same problem with another range of batches and other ``loads_per_block``.

    A range is widened to powers of two, so that few rows serve many ranges: the bound of the wider
    range holds. Without experts, no row depends on the number of batches.
    """
    fewest, most = num_batches
    if fewest < most:
        num_batches = 1 << (fewest.bit_length() - 1), 1 << (most - 1).bit_length()
    if "experts" not in problem.components and problem.lanes is None:
        num_batches = problem.num_batches
    if (problem.num_batches, problem.loads_per_block) == (num_batches, loads_per_block):
        return problem
    return replace(problem, num_batches=num_batches, loads_per_block=loads_per_block)


def solve(problem: Problem, limits: Limits) -> Solution:
    """Make a program and solve it (see ``Program.solve``)."""
    return Program(problem).solve(limits)
