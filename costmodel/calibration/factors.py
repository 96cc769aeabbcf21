"""Fit a few named efficiencies of a machine to measured runs.

Every factor multiplies one rate of the profile, and the unhidden share says how much of what
should overlap does not. The logarithms of predicted over measured throughput are made small in
the least squares, together with those of the factors themselves, weighed by how far the profile
is trusted: with few runs, rates that no run depends on stay as they are.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from costmodel.calibration.measured_runs import MeasuredRun
from costmodel.plan.rounding import round_policy
from costmodel.pricing.passes import PassPrice
from costmodel.pricing.price import check_machine, phase_seconds
from costmodel.pricing.rates import RATES
from costmodel.schedule.job_simulation import simulate_job
from costmodel.schedule.prediction import phase_slowdowns
from profiles.errors import RunError
from profiles.hardware import Calibration, HardwareProfile

# Each efficiency scales these rates together. What no run can tell apart shares a factor.
EFFICIENCIES: Mapping[str, tuple[str, ...]] = {
    "disk": ("disk_read", "disk_write"),
    "link": ("h2d", "d2h"),
    "gpu_matmul": ("gpu_matmul",),
    "gpu_attention": ("gpu_attention",),
    "gpu_unpack": ("gpu_unpack",),
    "cpu_matmul": ("cpu_matmul",),
    "cpu_attention": ("cpu_attention",),
    "cpu_unpack": ("cpu_unpack",),
    "cpu_memory": ("cpu_memory",),
    "gpu_tasks": ("gpu_tasks",),
    "cpu_tasks": ("cpu_tasks",),
}
UNHIDDEN = "unhidden_share"
# A factor of e away from the profile weighs as much as a prediction that is so far off: a rate
# twice as fast as was measured is as unlikely as a prediction wrong by 15 %.
TRUST = 0.2
# Factors beyond these are no efficiencies, but a wrong profile.
LEAST_LOG, MOST_LOG = float(np.log(1 / 20)), float(np.log(20))

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A calibrated machine.

    Parameters
    ----------
    hardware
        The profile with its rates multiplied by the factors, and a dated record of them.
    factors
        By name of an efficiency, above 0; ``unhidden_share`` is a share, not a factor.
    errors_before, errors_after
        Predicted over measured throughput, less one, of every run.
    """

    hardware: HardwareProfile
    factors: Mapping[str, float]
    errors_before: tuple[float, ...]
    errors_after: tuple[float, ...]


def check_run(hardware: HardwareProfile, run: MeasuredRun) -> None:
    """Refuse a run that this machine cannot have done."""
    check_machine(run.policy, run.machine(hardware))


def calibrate(hardware: HardwareProfile, runs: Sequence[MeasuredRun], *, source: str) -> Fit:
    """Fit the efficiencies to runs.

    Parameters
    ----------
    runs
        Policies that the machine can run, with their measured throughputs.
    source
        Where the runs come from, for the record.
    """
    # Imported late: it takes 35 MiB, which runs that only keep their figures need for themselves.
    from scipy.optimize import least_squares

    priced = _prepare(hardware, runs)
    names = _names(hardware)
    start = np.zeros(len(names) + 1)
    start[-1] = hardware.unhidden_share

    def residuals(x: Vector) -> Vector:
        return _residuals(hardware, names, x, priced)

    found = least_squares(
        residuals,
        # From a corner, the overlap would have no slope on one side.
        np.append(start[:-1], max(0.1, start[-1])),
        bounds=(
            np.append(np.full(len(names), LEAST_LOG), 0.0),
            np.append(np.full(len(names), MOST_LOG), 1.0),
        ),
        diff_step=[1e-4] * len(start),
        # A maximum of limits has kinks, at which finer steps only go to and fro.
        ftol=1e-6,
        xtol=1e-5,
    )
    if not found.success:
        raise RunError(f"the fit did not end: {found.message}")
    fitted = _apply(hardware, names, found.x)
    factors = dict(zip(names, (float(f) for f in np.exp(found.x[:-1])), strict=True))
    factors[UNHIDDEN] = float(found.x[-1])
    record = Calibration(date=datetime.date.today().isoformat(), source=source, factors=factors)
    return Fit(
        hardware=replace(fitted, calibrations=(*hardware.calibrations, record)),
        factors=factors,
        errors_before=_errors_of(hardware, priced),
        errors_after=errors_of(fitted, runs),
    )


def leave_one_out(
    hardware: HardwareProfile,
    runs: Sequence[MeasuredRun],
    *,
    source: str,
    on_fit: Callable[[], object] = lambda: None,
) -> tuple[float, ...]:
    """Return each run's error when the efficiencies are fitted to all the others.

    ``on_fit`` is called after each fit, which takes about a second.
    """
    errors: list[float] = []
    for i, left_out in enumerate(runs):
        others = [run for j, run in enumerate(runs) if j != i]
        fit = calibrate(hardware, others, source=source)
        errors += errors_of(fit.hardware, [left_out])
        on_fit()
    return tuple(errors)


def errors_of(hardware: HardwareProfile, runs: Sequence[MeasuredRun]) -> tuple[float, ...]:
    """Return predicted over measured throughput, less one, of every run."""
    return _errors_of(hardware, _prepare(hardware, runs))


def mean_error(errors: Sequence[float]) -> float:
    """Return the mean of the errors' absolute values."""
    return float(np.mean(np.abs(errors)))


class _PricedRun:
    """A measured run; what the passes over lanes compute does not depend on the rates, and waits
    hardly do."""

    def __init__(self, hardware: HardwareProfile, run: MeasuredRun) -> None:
        self.run = run
        self._counts = None
        machine = run.machine(hardware)
        self._slowdowns = phase_slowdowns(run.policy, machine)
        if run.lengths is not None:
            lengths = run.lengths.lengths()
            answers = run.lengths.all_answers
            self._counts = simulate_job(run.policy, machine, lengths, answers=answers).counts

    def phase_seconds(self, hardware: HardwareProfile) -> dict[str, float]:
        """Return ``{phase: predicted seconds}``."""
        machine = self.run.machine(hardware)
        if self._counts is None:
            found = phase_seconds(self.run.policy, machine)
            return {phase: s * self._slowdowns.get(phase, 1.0) for phase, s in found.items()}
        policy = round_policy(self.run.policy, has_gpu=machine.has_gpu)
        return {"run": float(PassPrice(policy, machine).seconds(self._counts).sum())}


def _prepare(hardware: HardwareProfile, runs: Sequence[MeasuredRun]) -> list[_PricedRun]:
    return [_PricedRun(hardware, run) for run in runs]


def _errors_of(hardware: HardwareProfile, runs: Sequence[_PricedRun]) -> tuple[float, ...]:
    seconds = [sum(priced.phase_seconds(hardware).values()) for priced in runs]
    return tuple(
        priced.run.num_tokens / s / priced.run.throughput_tok_per_s - 1
        for priced, s in zip(runs, seconds, strict=True)
    )


def _names(hardware: HardwareProfile) -> list[str]:
    return [name for name, rates in EFFICIENCIES.items() if RATES[rates[0]].value(hardware) > 0]


def _apply(hardware: HardwareProfile, names: Sequence[str], x: Vector) -> HardwareProfile:
    for name, log_factor in zip(names, x[:-1], strict=True):
        for rate in EFFICIENCIES[name]:
            hardware = RATES[rate].scale(hardware, float(np.exp(log_factor)))
    return replace(hardware, unhidden_share=float(np.clip(x[-1], 0.0, 1.0)))


def _residuals(
    hardware: HardwareProfile, names: Sequence[str], x: Vector, runs: Sequence[_PricedRun]
) -> Vector:
    from_profile = x.copy()
    from_profile[-1] -= hardware.unhidden_share
    return np.concatenate([_phase_errors(_apply(hardware, names, x), runs), TRUST * from_profile])


def _phase_errors(hardware: HardwareProfile, runs: Sequence[_PricedRun]) -> Vector:
    """Return the logarithms by phase, each weighed by the root of its share of the run, or of the
    whole run where the phases were not measured apart: then a run counts the same either way."""
    errors = []
    for priced in runs:
        found, run = priced.phase_seconds(hardware), priced.run
        if not run.prefill_s:
            predicted = run.num_tokens / sum(found.values())
            errors.append(np.log(predicted / run.throughput_tok_per_s))
            continue
        pairs = ((found["prefill"], run.prefill_s), (found["decode"], run.decode_s))
        whole_s = run.prefill_s + run.decode_s
        errors += [
            np.log(measured / predicted) * (measured / whole_s) ** 0.5
            for predicted, measured in pairs
            if measured
        ]
    return np.asarray(errors, dtype=np.float64)
