"""Errors of predictions over many cases: throughput, phases, memory, the busiest channel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from validation_cases import TIERS, Case, machine_of

from costmodel.calibration.factors import Fit, calibrate
from costmodel.calibration.measured_runs import MeasuredRun, row_of
from costmodel.plan.policy import Prediction
from costmodel.schedule.prediction import predict
from profiles.hardware import HardwareProfile

PHASES = ("prefill", "decode")
# The channels of a case are told apart where the second busiest is so much less busy.
CLEAR_LEAD = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A case and what came of it: the report of its run, or why there is none."""

    case: Case
    figures: Mapping[str, Any]

    @property
    def has_ended(self) -> bool:
        """Whether there is a report."""
        return "report" in self.figures

    @property
    def is_calm(self) -> bool:
        """Whether it ended, and the machine was as fast as its profile before and after it."""
        return self.has_ended and not self.figures["disturbed"]

    @property
    def report(self) -> Mapping[str, Any]:
        """The figures of the run."""
        report: Mapping[str, Any] = self.figures["report"]
        return report

    def as_run(self) -> MeasuredRun:
        """Return what calibration takes."""
        return MeasuredRun(
            policy=self.case.policy,
            throughput_tok_per_s=self.report["measured_tok_per_s"],
            prefill_s=self.report["prefill_s"],
            decode_s=self.report["decode_s"],
            emulated=self.case.emulated,
        )

    def predict(self, hardware: HardwareProfile) -> Prediction:
        """Predict it with a profile."""
        return predict(self.case.policy, machine_of(self.case, hardware))

    def errors(self, hardware: HardwareProfile) -> dict[str, float]:
        """Return predicted over measured, less one: of throughput, and of each phase's speed."""
        found, report = self.predict(hardware), self.report
        latency_s = report["prefill_s"] + report["decode_s"]
        return {
            "throughput": latency_s / found.latency_s - 1,
            "prefill": report["prefill_s"] / found.prefill_s - 1,
            "decode": report["decode_s"] / found.decode_s - 1,
        }

    def memory_error(self, hardware: HardwareProfile) -> float:
        """Return the predicted over the measured resident peak, less one."""
        peaks = self.predict(hardware).peak_bytes
        resident = self.report["peak_bytes"]
        measured = resident["cpu + gpu" if "cpu + gpu" in resident else "cpu"]
        return float((peaks["cpu"] + peaks.get("gpu", 0)) / measured - 1)

    def busiest(self, hardware: HardwareProfile) -> tuple[str, str, bool]:
        """Return the busiest channel, predicted and measured, and whether its lead is clear and
        there were others at all."""
        predicted, measured = self.predict(hardware).channel_s, self.report["busy_s"]
        first, *others = sorted((s for s in measured.values() if s > 0), reverse=True)
        is_clear = bool(others) and others[0] < first * (1 - CLEAR_LEAD)
        return _largest(predicted), _largest(measured), is_clear

    def describe(self, hardware: HardwareProfile) -> str:
        """Return one line for people."""
        case = self.case
        words = f"{case.tier}, {case.kind}, {case.policy.model.name}"
        if not self.has_ended:
            return f"{words}: {self.figures['error']}"
        errors = ", ".join(f"{name} {e:+.1%}" for name, e in self.errors(hardware).items())
        predicted, measured, _ = self.busiest(hardware)
        channel = measured if predicted == measured else f"{measured}, not {predicted}"
        mark = ", disturbed" if self.figures["disturbed"] else ""
        memory = self.memory_error(hardware)
        return f"{words}: {errors}, memory {memory:+.1%}, bound by {channel}{mark}"


def fit_to(outcomes: Iterable[Outcome], hardware: HardwareProfile) -> Fit:
    """Calibrate a profile by the calm cases that are not held out."""
    known = (o for o in outcomes if o.is_calm and not o.case.is_held_out)
    return calibrate(hardware, [outcome.as_run() for outcome in known], source="validation")


def summarize(outcomes: Sequence[Outcome], hardware: HardwareProfile, fit: Fit) -> dict[str, Any]:
    """Judge the held-out cases: with the profile as measured, and as calibrated by the others."""
    held_out = [o for o in outcomes if o.has_ended and o.case.is_held_out]
    calm = [outcome for outcome in held_out if outcome.is_calm]
    return {
        "profile_date": hardware.date,
        "factors": dict(fit.factors),
        "measured": judge(held_out, hardware),
        "calibrated": judge(held_out, fit.hardware),
        "calibrated_and_calm": judge(calm, fit.hardware) if calm else None,
    }


def judge(outcomes: Sequence[Outcome], hardware: HardwareProfile) -> dict[str, Any]:
    """Return the errors of a profile's predictions."""
    errors = [outcome.errors(hardware) for outcome in outcomes]
    memory = [outcome.memory_error(hardware) for outcome in outcomes]
    channels = [outcome.busiest(hardware) for outcome in outcomes]
    clear = [predicted == measured for predicted, measured, is_clear in channels if is_clear]
    tiers = {tier: [o for o in outcomes if o.case.tier == tier] for tier in TIERS}
    signed = {
        f"{tier} {phase}": _mean(o.errors(hardware)[phase] for o in cases)
        for tier, cases in tiers.items()
        for phase in ("throughput", *PHASES)
        if cases
    }
    throughput = np.abs([e["throughput"] for e in errors])
    return {
        "cases": len(outcomes),
        "throughput_mean_absolute_error": float(throughput.mean()),
        "throughput_p90_absolute_error": float(np.quantile(throughput, 0.9)),
        **{f"{p}_mean_absolute_error": _mean(abs(e[p]) for e in errors) for p in PHASES},
        "mean_signed_errors": signed,
        "memory_mean_absolute_error": _mean(map(abs, memory)),
        "memory_most_under": min(memory),
        "busiest_channel_found": sum(clear) / len(clear) if clear else None,
        "cases_with_a_clear_channel": len(clear),
    }


def table_of(
    outcomes: Iterable[Outcome], hardware: HardwareProfile, fit: Fit
) -> list[dict[str, object]]:
    """Return the cases that ended as rows, with what the profile said, as measured and fitted."""
    rows: list[dict[str, object]] = []
    for outcome in filter(lambda o: o.has_ended, outcomes):
        found, report = outcome.predict(hardware), outcome.report
        calibrated = outcome.predict(fit.hardware)
        predicted, measured, is_clear = outcome.busiest(hardware)
        rows.append(
            {
                "case": outcome.case.number,
                "tier": outcome.case.tier,
                "kind": outcome.case.kind,
                "held_out": outcome.case.is_held_out,
                "disturbed": outcome.figures["disturbed"],
                **row_of(outcome.as_run()),
                "predicted_tok_per_s": found.throughput_tok_per_s,
                "predicted_prefill_s": found.prefill_s,
                "predicted_decode_s": found.decode_s,
                "calibrated_tok_per_s": calibrated.throughput_tok_per_s,
                "calibrated_prefill_s": calibrated.prefill_s,
                "calibrated_decode_s": calibrated.decode_s,
                "lower_bound_s": found.lower_bound_s,
                "memory_error": outcome.memory_error(hardware),
                "busiest_predicted": predicted,
                "busiest_measured": measured,
                "is_clear": is_clear,
                **{f"busy_{name}_s": s for name, s in report["busy_s"].items()},
                **{f"predicted_busy_{name}_s": s for name, s in found.channel_s.items()},
            }
        )
    return rows


def _largest(seconds: Mapping[str, float]) -> str:
    return max(seconds, key=lambda name: seconds[name])


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
