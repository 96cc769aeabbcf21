"""Run HiGHS on arrays: it returns an optimum, or raises ``Infeasible`` or ``RunError``."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from profiles.errors import RunError

# Programs are small: presolving takes longer than solving. Where a program misses feasibility by
# about the solver's tolerance, its scaled and its unscaled form can disagree, and the status is
# unknown. Without scaling, most of these are decided.
SOLVER_OPTIONS: tuple[dict[str, str | int], ...] = (
    {"presolve": "off", "simplex_scale_strategy": 2},
    {"presolve": "off", "simplex_scale_strategy": 0},
)

Array = npt.NDArray[np.float64]


class Infeasible(Exception):
    """No point satisfies the rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProgram:
    """Minimise ``cost @ x`` where ``lower <= x <= upper`` and
    ``row_lower <= matrix @ x <= row_upper``.

    Parameters
    ----------
    cost, lower, upper
        [columns]
    matrix
        [rows, columns]
    row_lower, row_upper
        [rows]
    """

    cost: Array
    lower: Array
    upper: Array
    matrix: Array
    row_lower: Array
    row_upper: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """The optimum of a ``LinearProgram``.

    Parameters
    ----------
    objective
        The least cost.
    values
        [columns]
    duals
        [rows]: the change of the cost for one more unit of a row's right-hand side.
    """

    objective: float
    values: Array
    duals: Array


# Making an instance of the solver takes longer than solving a program. Each thread has its own.
_local = threading.local()


def minimize(program: LinearProgram) -> Optimum:
    """Solve a program to its optimum.

    Raises
    ------
    Infeasible
        When no point satisfies its rows.
    RunError
        When the solver is missing or ends with another status.
    """
    try:
        import highspy
    except ImportError as error:
        raise RunError("the solver HiGHS is missing; try: pip install highspy") from error
    statuses = highspy.HighsModelStatus
    if not hasattr(_local, "highs"):
        _local.highs = highspy.Highs()  # type: ignore[no-untyped-call]
        _local.highs.setOptionValue("output_flag", False)
        _local.options = None
    highs = _local.highs
    rows, columns = np.nonzero(program.matrix)
    num_rows, num_columns = program.matrix.shape
    starts = np.searchsorted(rows, np.arange(num_rows + 1)).astype(np.int32)
    status = statuses.kNotset
    for options in SOLVER_OPTIONS:
        if _local.options is not options:
            for name, value in options.items():
                highs.setOptionValue(name, value)
            _local.options = options
        highs.passModel(
            num_columns,
            num_rows,
            len(rows),
            int(highspy.MatrixFormat.kRowwise),
            int(highspy.ObjSense.kMinimize),
            0.0,
            program.cost,
            program.lower,
            program.upper,
            program.row_lower,
            program.row_upper,
            starts,
            columns.astype(np.int32),
            program.matrix[rows, columns],
            np.zeros(num_columns, dtype=np.int32),
        )
        highs.run()
        status = highs.getModelStatus()
        if status in (statuses.kOptimal, statuses.kInfeasible, statuses.kUnbounded):
            break
    # The cost is a time or a number of bytes, so no program is unbounded. A program that neither
    # form decides is at the edge of feasibility: whole rows and pages do not fit.
    if status in (statuses.kInfeasible, statuses.kUnboundedOrInfeasible, statuses.kUnknown):
        raise Infeasible
    if status != statuses.kOptimal:
        raise RunError(f"the solver ended with status {status.name!r} instead of an optimum")
    solution = highs.getSolution()
    return Optimum(
        objective=highs.getInfo().objective_function_value,
        values=np.array(solution.col_value),
        duals=np.array(solution.row_dual),
    )
