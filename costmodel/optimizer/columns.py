"""The shares as columns of a linear program, with the constraints among them."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from costmodel.optimizer.solver import Array, LinearProgram, minimize
from costmodel.pricing.linear_form import LinearForm, total
from costmodel.pricing.problem import Problem
from costmodel.pricing.shares import (
    PLAIN_NAMES,
    PRODUCTS,
    Shares,
    product_name,
    share_names,
    unit_shares,
    variables_of,
)

# These columns have the same index for every model, because those of the weights come last.
PER_BLOCK, WHOLE = PLAIN_NAMES.index("per_block"), PLAIN_NAMES.index("whole")
FRACTIONS = np.array([PLAIN_NAMES.index(name) for name in PRODUCTS])
MULTIPLIED = np.array([PLAIN_NAMES.index(product_name(name)) for name in PRODUCTS])


@functools.cache
def _places(components: tuple[str, ...]) -> dict[str, int]:
    return {name: place for place, name in enumerate(share_names(components))}


def coefficients(forms: Collection[LinearForm], components: tuple[str, ...]) -> Array:
    """Return the coefficients of linear forms of the shares: [forms, shares]."""
    places = _places(components)
    matrix = np.zeros((len(forms), len(places)))
    for index, form in enumerate(forms):
        for name, value in form.terms.items():
            matrix[index, places[name]] = value
    return matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """An optimum: the shares, the values of the other columns, and the duals of the given rows."""

    objective: float
    shares: Shares[float]
    others: Array
    duals: Array


class Columns:
    """The columns of one problem's shares, over any range of block sizes.

    The columns of ``per_block`` and of its products are multiplied by the batch size: without it,
    they are too small for the solver's tolerances.
    """

    def __init__(self, problem: Problem) -> None:
        self._batch, self._components = problem.gpu_batch_size, problem.components
        places = _places(problem.components)
        self._count = len(places)
        self._scale = np.ones(self._count)
        self._lower, self._upper = np.zeros(self._count), np.ones(self._count)
        self._lower[WHOLE] = 1.0
        for name, variable in variables_of(problem.components).items():
            if variable.is_scaled:
                self._scale[places[name]] = 1 / self._batch
                self._upper[places[name]] = np.inf
            if variable.needs_gpu and not problem.hardware.has_gpu:
                self._upper[places[name]] = 0.0
        if not problem.cpu_experts:
            self._upper[places["experts_in_place"]] = 0.0
        self._scale[[PER_BLOCK, *MULTIPLIED]] = 1 / self._batch
        self._upper[MULTIPLIED] = self._upper[FRACTIONS]
        if problem.lanes is not None and not problem.stages_cache:
            # They attend to their pages where these are stored.
            self._lower[places["cache_cpu"]] = 1.0
        if problem.hidden_in_place:
            here = "activations_gpu" if problem.hardware.has_gpu else "activations_cpu"
            self._lower[places[here]] = 1.0

    def minimize(
        self,
        block_sizes: tuple[float, float],
        *,
        rows: Array,
        others: Array,
        cost: Array,
        cost_of_others: Array,
        fixed: Mapping[str, float] | None = None,
    ) -> Point:
        """Minimise over the shares and over other columns, all of them at least zero.

        Parameters
        ----------
        block_sizes
            Least and most sequences in a block; equal fixes the size.
        rows, others
            [rows, shares] and [rows, others]: the sum of both products is at most zero.
        cost, cost_of_others
            [shares] and [others]
        fixed
            Fixed shares by name.
        """
        lower, upper = self._lower.copy(), self._upper.copy()
        lower[PER_BLOCK], upper[PER_BLOCK] = (self._batch / size for size in block_sizes[::-1])
        places = _places(self._components)
        for name, share in (fixed or {}).items():
            lower[places[name]] = upper[places[name]] = share / self._scale[places[name]]
        substitution = np.diag(self._scale)
        kept, num_equal = _ties(self._components)
        if lower[PER_BLOCK] == upper[PER_BLOCK]:
            # The product with a constant is not a variable.
            substitution[MULTIPLIED, MULTIPLIED] = 0.0
            substitution[MULTIPLIED, FRACTIONS] = 1 / block_sizes[0]
        else:
            kept = np.vstack([kept, self._envelope(1 / block_sizes[1], 1 / block_sizes[0])])
        num_others = others.shape[1]
        of_shares = np.vstack([rows, kept * self._batch]) @ substitution
        row_lower = np.full(len(of_shares), -np.inf)
        row_lower[len(rows) : len(rows) + num_equal] = 0.0
        optimum = minimize(
            LinearProgram(
                cost=np.concatenate([cost @ substitution, cost_of_others]),
                lower=np.concatenate([lower, np.zeros(num_others)]),
                upper=np.concatenate([upper, np.full(num_others, np.inf)]),
                matrix=np.hstack([of_shares, np.pad(others, ((0, len(kept)), (0, 0)))]),
                row_lower=row_lower,
                row_upper=np.zeros(len(of_shares)),
            )
        )
        values = substitution @ optimum.values[: self._count]
        return Point(
            objective=optimum.objective,
            shares=Shares.of(
                dict(zip(share_names(self._components), values.tolist(), strict=True)),
                self._components,
            ),
            others=optimum.values[self._count :],
            duals=optimum.duals[: len(rows)],
        )

    def _envelope(self, low: float, high: float) -> Array:
        """Return the rows that bound the products of fractions and ``per_block`` in [low, high].

        They are McCormick's envelope (1976) for a fraction in [0, 1]: the convex hull of the
        product over the rectangle. Fractions that are always zero need no rows.
        """
        free = self._upper[FRACTIONS] > 0
        fractions, products = FRACTIONS[free], MULTIPLIED[free]
        each = np.arange(len(products))
        rows = np.zeros((4, len(products), self._count))
        # Some formulas subtract a product, so the upper planes are needed as well.
        for plane, (bound, is_shifted, sign) in enumerate(
            ((low, False, -1.0), (high, True, -1.0), (high, False, 1.0), (low, True, 1.0))
        ):
            rows[plane, each, products] = sign
            rows[plane, each, fractions] = -sign * bound
            if is_shifted:
                rows[plane, :, PER_BLOCK] = -sign
                rows[plane, :, WHOLE] = sign * bound
        return rows.reshape(-1, self._count)


@functools.cache
def _ties(components: tuple[str, ...]) -> tuple[Array, int]:
    """Return the constraints among the shares: forms that are at most zero, and how many of the
    first are equal to zero."""
    units, variables = unit_shares(components), variables_of(components)
    forms = units.values()
    equal = []
    for group in dict.fromkeys(variable.group for variable in variables.values()):
        if not group:
            continue
        parts = [name for name, variable in variables.items() if variable.group == group]
        whole = units.per_block if variables[parts[0]].is_scaled else units.whole
        equal.append(total([*(forms[name] for name in parts), whole * -1.0]))
    most = [units.attended - units.cache_cpu - units.cache_disk]
    if "experts" in components:
        most.append(units.experts_in_place_per_block - units.weights["experts"].cpu)
    return coefficients([*equal, *most], components), len(equal)
