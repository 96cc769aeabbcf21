"""What a page is made of: what it tells of, and sections of text, pictures and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from costmodel.plan.policy import Policy, Prediction
from costmodel.report.run_record import Measured
from profiles.hardware import HardwareProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A policy on a machine, its prediction, and the figures of its run if there was one."""

    policy: Policy
    hardware: HardwareProfile
    prediction: Prediction
    measured: Measured | None = None


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
