"""The linear program at one ``gpu_batch_size``: where every byte lives, and the block size.

Minimising latency over block size looks bilinear. Per sequence it is linear (Charnes and Cooper
1962): see ``Shares``. What keeps a product of two variables is exact where the block size is
fixed; where it lies in a range, the product's McCormick envelope over that range makes the
optimum a certified lower bound of every policy's latency.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pulp

from costmodel.optimizer.solver import run_solver
from costmodel.pricing.limits import stage_limits
from costmodel.pricing.memory import capacities, memory_rows
from costmodel.pricing.problem import PRODUCTS, SHARE_NAMES, Problem, Quantity, Shares
from costmodel.pricing.stages import stages_of

# Among policies of one latency, the one whose channels have the least to do is the best: what is
# moved without need disturbs what is not in the model.
TRAFFIC_WEIGHT = 1e-5

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one solution must keep beside the rows of the problem.

    Parameters
    ----------
    block_sizes
        Least and most sequences in a block; equal fixes the size.
    max_latency_s
        Limit on the latency of one block.
    reserve
        Bytes per tier to leave free, beyond what the formulas count.
    """

    block_sizes: tuple[int, int]
    max_latency_s: float | None = None
    reserve: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """An optimum of the program.

    Parameters
    ----------
    shares
        Values of the variables.
    latency_per_sequence_s
        What the shares take.
    bound_per_sequence_s
        No policy in the range of block sizes takes less.
    duals
        By row: seconds per sequence that one unit more of its right-hand side would change.
    """

    shares: Shares
    latency_per_sequence_s: float
    bound_per_sequence_s: float
    duals: Mapping[str, float]


def _row_name(name: str) -> str:
    """Return a name that PuLP takes as it is."""
    return name.replace(", ", ".").replace(" ", "_")


def unit_shares() -> Shares:
    """Return shares whose values are unit vectors: a formula then gives its coefficients."""
    return Shares(**dict(zip(SHARE_NAMES, np.eye(len(SHARE_NAMES)), strict=True)))


def solve(problem: Problem, limits: Limits) -> Solution:
    """Solve for one ``Problem``.

    Raises
    ------
    Infeasible
        When nothing fits.
    RunError
        When the solver is missing or ends in any other way than with an optimum.
    """
    model = pulp.LpProblem("policy", pulp.LpMinimize)
    columns = Columns(model, problem, limits.block_sizes)
    units = unit_shares()
    stages = stages_of(problem)
    lasting = {
        stage.name: pulp.LpVariable(f"{stage.name.replace(' ', '_')}_s", 0) for stage in stages
    }
    rows = rows_of(problem, units, reserve=limits.reserve)
    for name, form in rows.items():
        columns.add_row(name, form, minus=lasting.get(name.split(".")[1]))
    timed = [form for name, form in rows.items() if name.startswith("time.")]
    latency = pulp.lpSum(lasting.values())
    model += latency + TRAFFIC_WEIGHT * columns.expression(sum(timed))
    if limits.max_latency_s is not None:
        limit = columns.expression(units.per_block * limits.max_latency_s)
        model.addConstraint(latency <= limit, "latency")
    run_solver(model)
    values = columns.values()
    latency_s = float(pulp.value(latency))
    # Limits add up to at most their number times the latency: what is left bounds every policy.
    objective = float(pulp.value(model.objective))
    most = 1 + TRAFFIC_WEIGHT * len(timed) / len(stages)
    return Solution(
        shares=values,
        latency_per_sequence_s=latency_s,
        bound_per_sequence_s=objective / most,
        duals={name: float(model.constraints[_row_name(name)].pi or 0.0) for name in rows},
    )


def rows_of(
    problem: Problem, shares: Shares, *, reserve: Mapping[str, int] | None = None
) -> dict[str, Quantity]:
    """Return the left sides of the program's rows: each is at most zero, and those of a stage,
    named ``time.STAGE.LIMIT``, at most the stage's seconds."""
    rows = {
        f"time.{stage.name}.{name}": limit
        for stage in stages_of(problem)
        for name, limit in stage_limits(problem, shares, stage).items()
    }
    for tier, capacity in capacities(problem.hardware).items():
        usable = max(0, capacity - (reserve or {}).get(tier, 0))
        # As fractions of the capacity and of one batch, so that the solver's absolute tolerance
        # means the same everywhere.
        scale = problem.gpu_batch_size / max(capacity, 1)
        for name, terms in memory_rows(problem, shares)[tier].items():
            use = sum(terms.values()) - shares.per_block * usable
            rows[f"capacity.{tier}.{name}"] = use * scale
    return rows


class Columns:
    """The program's variables: a linear form of the shares becomes an expression over them.

    Parameters
    ----------
    model
        The program that the variables and their own rows are added to.
    block_sizes
        Least and most sequences in a block.
    """

    def __init__(
        self, model: pulp.LpProblem, problem: Problem, block_sizes: tuple[int, int]
    ) -> None:
        self.model = model
        batch = problem.gpu_batch_size
        self._low, self._high = batch / block_sizes[1], batch / block_sizes[0]
        # The inverse number of batches: per_block would be too small for the solver's tolerances.
        self._inverse = pulp.LpVariable("inverse_batches", self._low, self._high)
        scaled = {name: pulp.LpVariable(name, 0) for name in SHARE_NAMES if "weights_" in name}
        plain = {
            name: pulp.LpVariable(name, 0, 1)
            for name in SHARE_NAMES
            if name.startswith(("cache_", "activations_", "attended", "multiplied_"))
            and not name.endswith("_per_block")
        }
        # What stands behind each share: an expression and a factor.
        self._behind: dict[str, pulp.LpAffineExpression | pulp.LpVariable | float]
        self._behind = {"whole": 1.0, "per_block": self._inverse * (1 / batch)}
        self._behind |= {name: variable * (1 / batch) for name, variable in scaled.items()}
        self._behind |= plain
        self._close_tiers(problem, scaled, plain)
        products = {name: self._product(name, plain[name]) for name in PRODUCTS}
        self._behind |= {f"{name}_per_block": p * (1 / batch) for name, p in products.items()}
        for phase in ("prefill", "decode"):
            product = products[f"multiplied_{phase}"]
            model.addConstraint(product <= scaled["weights_cpu"], f"multiplied.{phase}")

    def _close_tiers(
        self,
        problem: Problem,
        scaled: Mapping[str, pulp.LpVariable],
        plain: Mapping[str, pulp.LpVariable],
    ) -> None:
        """Let fractions add up to one, and keep to zero what the machine or the problem lacks."""
        has_gpu = problem.hardware.has_gpu
        self.model.addConstraint(pulp.lpSum(scaled.values()) == self._inverse, "whole.weights")
        for kind in ("cache", "activations"):
            parts = [plain[f"{kind}_{tier}"] for tier in ("gpu", "cpu", "disk")]
            self.model.addConstraint(pulp.lpSum(parts) == 1, f"whole.{kind}")
        off_gpu = plain["cache_cpu"] + plain["cache_disk"]
        self.model.addConstraint(plain["attended"] <= off_gpu, "attended")
        if not has_gpu:
            for variable in (
                scaled["weights_gpu"], plain["cache_gpu"], plain["activations_gpu"],
                plain["attended"],
            ):  # fmt: skip
                variable.upBound = 0
        if not (has_gpu and problem.cpu_weights):
            plain["multiplied_prefill"].upBound = plain["multiplied_decode"].upBound = 0
        if problem.in_place:
            plain["activations_gpu" if has_gpu else "activations_cpu"].lowBound = 1

    def _product(self, name: str, fraction: pulp.LpVariable) -> pulp.LpAffineExpression:
        """Return ``fraction * inverse``: exact where ``inverse`` is fixed, else its envelope.

        McCormick 1976, for a fraction in [0, 1]: the convex hull of the product over the
        rectangle.
        """
        low, high, inverse = self._low, self._high, self._inverse
        if low == high or fraction.upBound == 0:
            return fraction * low
        product = pulp.LpVariable(f"{name}_product", 0)
        for row, text in (
            (product >= fraction * low, "low"),
            (product >= fraction * high + inverse - high, "high"),
            # What is attended is subtracted from what is fetched: upper planes matter too.
            (product <= fraction * high, "below_high"),
            (product <= fraction * low + inverse - low, "below_low"),
        ):
            self.model.addConstraint(row, f"envelope.{name}.{text}")
        return product * 1.0

    def expression(self, form: Vector) -> pulp.LpAffineExpression:
        """Return a linear form of the shares as an expression."""
        expression = pulp.LpAffineExpression()
        for name, coefficient in zip(SHARE_NAMES, form, strict=True):
            if coefficient:
                expression += self._behind[name] * float(coefficient)
        return expression

    def add_row(self, name: str, form: Vector, *, minus: pulp.LpVariable | None = None) -> None:
        """Add the row ``form - minus <= 0``."""
        expression = self.expression(form)
        if minus is not None:
            expression -= minus
        self.model.addConstraint(expression <= 0, _row_name(name))

    def values(self) -> Shares:
        """Return the values of a solved program."""
        found = {name: float(pulp.value(self._behind[name]) or 0.0) for name in SHARE_NAMES}
        return Shares(**found)
