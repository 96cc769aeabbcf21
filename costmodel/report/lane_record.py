"""What a run over lanes leaves for its page: figures and passes, measured beside simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from costmodel.report.pass_series import PassSeries


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneRecord:
    """A run over lanes.

    Parameters
    ----------
    figures
        By name, as in the JSON line of a run.
    bottleneck
        The predicted limit.
    measured, simulated
        Its passes, and those of its simulation with the true lengths of the answers.
    """

    figures: Mapping[str, float]
    bottleneck: str
    measured: PassSeries
    simulated: PassSeries
