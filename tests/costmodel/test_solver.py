"""Every way in which the solver can end, in one clear line."""

from __future__ import annotations

import sys

import highspy
import numpy as np
import pytest

from costmodel.model.loading import load_model_spec
from costmodel.optimizer.optimum import search
from costmodel.optimizer.program import Limits, solve
from costmodel.optimizer.solver import SOLVER_OPTIONS, Infeasible, LinearProgram, minimize
from costmodel.plan.workload import Workload
from costmodel.pricing.problem import Problem
from profiles import InfeasibleError, RunError, recorded_profile
from tests.costmodel.machines import make_machine, make_model

WORK = Workload(prompt_len=16, gen_len=5)
STATUSES = highspy.HighsModelStatus


def _program(*, bounded: bool = True, feasible: bool = True) -> LinearProgram:
    """Minimise x + y where x + 2 y <= 4, x - y >= 1 (or 5), and x <= 3 (or anything)."""
    return LinearProgram(
        cost=np.array([1.0, 1.0]),
        lower=np.array([0.0, 0.0 if bounded else -np.inf]),
        upper=np.array([np.inf if feasible else 3.0, np.inf]),
        matrix=np.array([[1.0, 2.0], [1.0, -1.0]]),
        row_lower=np.array([-np.inf, 1.0 if feasible else 5.0]),
        row_upper=np.array([4.0, np.inf]),
    )


def _problem() -> Problem:
    return Problem(
        hardware=make_machine(),
        model=make_model(),
        workload=WORK,
        gpu_batch_size=4,
        prefill_batch_size=2,
    )


def test_an_optimum_is_found() -> None:
    found = minimize(_program())
    assert found.objective == pytest.approx(1)
    assert found.values == pytest.approx([1, 0])
    # One more on the right of the second row costs one more; the first row does not bind.
    assert found.duals == pytest.approx([0, 1])


def test_no_point_is_infeasible() -> None:
    with pytest.raises(Infeasible):
        minimize(_program(feasible=False))


def test_no_bottom_is_named() -> None:
    with pytest.raises(RunError, match="status 'kUnbounded'") as caught:
        minimize(_program(bounded=False))
    assert "\n" not in str(caught.value)


def test_a_program_leaves_nothing_to_the_next() -> None:
    """One instance of the solver serves all."""
    alone = minimize(_program())
    with pytest.raises(Infeasible):
        minimize(_program(feasible=False))
    again = minimize(_program())
    assert (again.objective, again.values.tolist()) == (alone.objective, alone.values.tolist())


def test_a_missing_solver_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(RunError, match="pip install highspy") as caught:
        solve(_problem(), Limits(block_sizes=(4, 4)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(STATUSES.__members__))
def test_every_status_of_highs_ends_in_one_of_three(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HiGHS is made to report each of its endings."""
    status = STATUSES.__members__[name]
    monkeypatch.setattr(highspy.Highs, "getModelStatus", lambda self: status)
    try:
        minimize(_program())
    except Infeasible:
        # The program's objective is a time, so what may be unbounded is infeasible.
        assert name in ("kInfeasible", "kUnboundedOrInfeasible", "kUnknown")
    except RunError as error:
        assert f"the solver ended with status '{name}'" in str(error)
        assert "\n" not in str(error)
        assert name not in ("kOptimal", "kInfeasible")
    else:
        assert name == "kOptimal"


def test_what_is_not_decided_at_first_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    decided, calls = highspy.Highs.getModelStatus, []

    def at_second(self: highspy.Highs) -> highspy.HighsModelStatus:
        calls.append(self.getOptionValue("simplex_scale_strategy")[1])
        return STATUSES.kUnknown if len(calls) == 1 else decided(self)

    monkeypatch.setattr(highspy.Highs, "getModelStatus", at_second)
    assert minimize(_program()).objective == pytest.approx(1)
    assert calls == [options["simplex_scale_strategy"] for options in SOLVER_OPTIONS]


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
