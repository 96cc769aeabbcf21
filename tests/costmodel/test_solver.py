"""Every way in which the solver can end, in one clear line."""

from __future__ import annotations

import types

import pulp
import pytest

from costmodel.families import load_model_spec
from costmodel.optimizer.optimum import search
from costmodel.optimizer.program import Limits, solve
from costmodel.optimizer.solver import Infeasible, run_solver
from costmodel.plan.workload import Workload
from costmodel.pricing.problem import Problem
from profiles import InfeasibleError, RunError, recorded_profile
from tests.costmodel.machines import make_machine, make_model

WORK = Workload(prompt_len=16, gen_len=5)


def _model(*, bounded: bool = True, feasible: bool = True) -> pulp.LpProblem:
    """Two variables with two rows."""
    model = pulp.LpProblem("by_hand", pulp.LpMinimize)
    x, y = pulp.LpVariable("x", 0), pulp.LpVariable("y", None if not bounded else 0)
    model += x + y
    model.addConstraint(x + 2 * y <= 4, "most")
    model.addConstraint(x - y >= (1 if feasible else 5), "least")
    if not feasible:
        model.addConstraint(x <= 3, "more")
    return model


def _problem() -> Problem:
    return Problem(
        hardware=make_machine(),
        model=make_model(),
        workload=WORK,
        gpu_batch_size=4,
        prefill_batch_size=2,
    )


def test_an_optimum_is_found() -> None:
    model = _model()
    run_solver(model)
    assert pulp.value(model.objective) == pytest.approx(1)


def test_no_point_is_infeasible() -> None:
    with pytest.raises(Infeasible):
        run_solver(_model(feasible=False))


def test_no_bottom_is_named() -> None:
    with pytest.raises(RunError, match="status 'Unbounded'") as caught:
        run_solver(_model(bounded=False))
    assert "\n" not in str(caught.value)


def test_a_missing_solver_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    with pytest.raises(RunError, match="pip install highspy") as caught:
        solve(_problem(), Limits(block_sizes=(4, 4)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", sorted(pulp.LpStatus.values()))
def test_every_status_of_pulp_ends_in_one_of_three(
    status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = next(code for code, name in pulp.LpStatus.items() if name == status)

    def ended(self: pulp.LpProblem, solver: object) -> int:
        self.assignStatus(code)
        return int(code)

    monkeypatch.setattr(pulp.LpProblem, "solve", ended)
    if status == "Optimal":
        run_solver(_model())
    elif status == "Infeasible":
        with pytest.raises(Infeasible):
            run_solver(_model())
    else:
        with pytest.raises(RunError, match=f"status '{status}'") as caught:
            run_solver(_model())
        assert "\n" not in str(caught.value)


def _highs_statuses() -> list[str]:
    import highspy

    return sorted(highspy.HighsModelStatus.__members__)


@pytest.mark.parametrize("name", _highs_statuses())
def test_every_status_of_highs_ends_in_one_of_three(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HiGHS itself is made to report each of its endings; PuLP translates, we decide."""
    import highspy

    status = highspy.HighsModelStatus.__members__[name]
    monkeypatch.setattr(highspy.Highs, "getModelStatus", lambda self: status)
    try:
        run_solver(_model())
    except Infeasible:
        # The program's objective is a time, so what may be unbounded is infeasible.
        assert name in ("kInfeasible", "kUnboundedOrInfeasible", "kUnknown")
    except RunError as error:
        assert "the solver ended with status" in str(error) and "\n" not in str(error)
        assert name not in ("kOptimal", "kInfeasible")
    else:
        assert name == "kOptimal"


def test_what_the_solver_cannot_decide_is_taken_as_infeasible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def undecided(self: pulp.LpProblem, solver: object) -> int:
        status = types.SimpleNamespace(name="kUnknown")
        self.solverModel = types.SimpleNamespace(getModelStatus=lambda: status)
        return int(pulp.LpStatusNotSolved)

    monkeypatch.setattr(pulp.LpProblem, "solve", undecided)
    with pytest.raises(Infeasible):
        run_solver(_model())


def test_what_is_not_decided_at_first_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    solve_once, calls = pulp.LpProblem.solve, []

    def at_second(self: pulp.LpProblem, solver: pulp.HiGHS) -> int:
        calls.append(solver)
        return int(pulp.LpStatusNotSolved if len(calls) == 1 else solve_once(self, solver))

    monkeypatch.setattr(pulp.LpProblem, "solve", at_second)
    model = _model()
    run_solver(model)
    assert len(calls) == 2 and pulp.value(model.objective) == pytest.approx(1)


@pytest.mark.parametrize("tier", ["gpu_memory", "cpu_memory", "disk"])
def test_nothing_of_a_tier_is_a_legal_request(tier: str) -> None:
    """It is served from the other tiers, or refused in one line that names what is short."""
    hardware = recorded_profile("t4-flexgen").with_budget(**{tier: 0})
    model = load_model_spec("opt-6.7b")
    if tier != "cpu_memory":
        result = search(hardware, model, WORK)
        assert not result.predicted.peak_bytes.get(tier.removesuffix("_memory"))
        return
    with pytest.raises(InfeasibleError, match="cpu is short by") as caught:
        search(hardware, model, WORK)
    assert "\n" not in str(caught.value)


def test_nothing_at_all_is_short_everywhere() -> None:
    hardware = recorded_profile("t4-flexgen").with_budget(gpu_memory=0, cpu_memory=0, disk=0)
    with pytest.raises(InfeasibleError, match="is short by") as caught:
        search(hardware, load_model_spec("opt-6.7b"), WORK)
    assert "\n" not in str(caught.value)
