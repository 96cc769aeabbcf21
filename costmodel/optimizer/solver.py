"""Run HiGHS through PuLP, and turn every way in which it can end into one of three."""

from __future__ import annotations

import pulp

from profiles.errors import RunError

# Where a program misses feasibility by about the solver's tolerance, its scaled and its own form
# can disagree, and the status is unknown; unscaled and whole, most of these are decided.
SOLVER_OPTIONS: tuple[dict[str, str | int], ...] = (
    {},
    {"presolve": "off", "simplex_scale_strategy": 0},
)


class Infeasible(Exception):
    """No point satisfies the rows; ``search`` turns this into advice."""


def run_solver(model: pulp.LpProblem) -> None:
    """Solve ``model`` to its optimum.

    Raises
    ------
    Infeasible
        When no point satisfies its rows.
    RunError
        When the solver is missing or ends in any other way.
    """
    if not pulp.HiGHS(msg=False).available():
        raise RunError("the solver HiGHS is missing; try: pip install highspy")
    for options in SOLVER_OPTIONS:
        try:
            status = pulp.LpStatus[model.solve(pulp.HiGHS(msg=False, **options))]
        except KeyError as error:
            # PuLP does not know every status of HiGHS.
            raise RunError(f"the solver ended with status {error} instead of an optimum") from error
        if status != "Not Solved":
            break
    # What no form decides is on the edge of feasibility: no whole rows and pages fit there.
    if status == "Infeasible" or _is_undecided(model):
        raise Infeasible
    if status == "Optimal" and model.sol_status != pulp.LpSolutionOptimal:
        # PuLP calls whatever HiGHS stopped at, such as a time limit, optimal.
        status = "Stopped"
    if status != "Optimal":
        raise RunError(f"the solver ended with status {status!r} instead of an optimum")


def _is_undecided(model: pulp.LpProblem) -> bool:
    highs = getattr(model, "solverModel", None)
    return highs is not None and highs.getModelStatus().name == "kUnknown"
