"""What a page is made of: what it tells of, and sections of text, pictures and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from costmodel.plan.policy import Policy, Prediction
from costmodel.pricing.memory import LANE_PHASE, phases_of
from costmodel.pricing.price import limits_by_phase, phase_channels
from costmodel.report.planned_lanes import PlannedLanes
from costmodel.report.run_record import Measured
from profiles.hardware import HardwareProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A policy on a machine, its prediction, the figures of its run if there was one, and lanes if
    it has some."""

    policy: Policy
    hardware: HardwareProfile
    prediction: Prediction
    measured: Measured | None = None
    lanes: PlannedLanes | None = None

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of the policy."""
        return phases_of(self.policy)

    @property
    def predicted_phase_s(self) -> Mapping[str, float]:
        """Predicted seconds of each phase: of a run, else of one block or of the job of lanes."""
        if self.measured is not None:
            return self.measured.predicted_phase_s
        if self.lanes is not None:
            return {LANE_PHASE: self.prediction.latency_s}
        return {"prefill": self.prediction.prefill_s, "decode": self.prediction.decode_s}

    @property
    def predicted_busy_s(self) -> Mapping[str, Mapping[str, float]]:
        """Predicted busy seconds of each channel in each phase."""
        if self.measured is not None:
            return self.measured.predicted_busy_s
        return phase_channels(self.policy, self.hardware)

    @property
    def limits(self) -> Mapping[str, str]:
        """The limit that most of each phase waits for."""
        if self.lanes is not None and self.lanes.bottleneck is not None:
            return {LANE_PHASE: self.lanes.bottleneck}
        return limits_by_phase(self.policy, self.hardware)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table whose first column names the rows; cells are text."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture for BokehJS, and the sentence that stands in for it."""

    item: Mapping[str, Any]
    title: str
    heading: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section of the page; ``legend`` maps labels to colours."""

    name: str
    title: str
    text: Sequence[str]
    legend: Mapping[str, str]
    pictures: Sequence[Picture] = ()
    table: Table | None = None
