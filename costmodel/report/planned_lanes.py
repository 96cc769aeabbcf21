"""What a page tells of lanes: passes, busy channels and limits, of a run or of a simulated job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import Policy
from costmodel.report.pass_series import PassSeries
from costmodel.report.run_record import RunRecord
from costmodel.report.trace_file import MEASURED, SIMULATED
from costmodel.schedule.job_costs import job_costs
from costmodel.schedule.job_simulation import simulate_job
from profiles.hardware import HardwareProfile
from profiles.units import format_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLanes:
    """The lanes of a page.

    Parameters
    ----------
    passes
        By label: ``simulated``, and before it ``measured`` where it is a run.
    predicted_s, tok_per_s
        Predicted seconds of the job, and generated tokens in a second.
    busy_s
        Predicted busy seconds of each channel.
    bottleneck
        The limit that most of the job waits for.
    facts
        Sentences on waiting, on the cache and on lengths that were guessed.
    """

    passes: Mapping[str, PassSeries]
    predicted_s: float
    tok_per_s: float
    busy_s: Mapping[str, float]
    bottleneck: str
    facts: tuple[str, ...] = ()

    @classmethod
    def simulate(cls, policy: Policy, hardware: HardwareProfile) -> PlannedLanes:
        """Simulate the job that a policy was made for."""
        lengths = lengths_of(policy)
        timeline = simulate_job(policy, hardware, lengths)
        costs = job_costs(policy, hardware, timeline.counts)
        return cls(
            passes={SIMULATED: PassSeries.simulated(timeline, lengths)},
            predicted_s=timeline.total_s,
            tok_per_s=timeline.throughput_tok_per_s,
            busy_s=costs.busy_s,
            bottleneck=costs.bottleneck,
        )

    @classmethod
    def of_run(cls, record: RunRecord) -> PlannedLanes:
        """Return the lanes of a run."""
        assert record.lanes is not None
        measured = record.measured
        return cls(
            passes={MEASURED: record.lanes.measured, SIMULATED: record.lanes.simulated},
            predicted_s=measured.predicted_phase_s["run"],
            tok_per_s=measured.predicted_tok_per_s,
            busy_s=measured.predicted_busy_s["run"],
            bottleneck=record.lanes.bottleneck,
            facts=_facts(record.lanes.figures),
        )


def lengths_of(policy: Policy) -> Lengths:
    """Return the lengths that a policy was made for; those of one block where it has none."""
    work = policy.workload
    if work.lengths is not None:
        return work.lengths.lengths()
    count = work.num_prompts or policy.block_size
    return Lengths(np.full(count, work.prompt_len), np.full(count, work.gen_len))


def _facts(figures: Mapping[str, float]) -> tuple[str, ...]:
    facts = [
        f"{figures['prompt_tokens']:,.0f} tokens came in and {figures['output_tokens']:,.0f} out;"
        f" {figures['expected_output_tokens']:,.0f} out were expected.",
        f"At most {figures['pool_share']:.0%} of the cache was in use, and"
        f" {figures['mean_pool_share']:.0%} on average.",
    ]
    if figures["waited"]:
        facts.append(
            f"Lanes waited {figures['waited']:,.0f} times for a page of the cache, which cost"
            f" {format_seconds(figures['waited_s'])}."
        )
    if cost := figures["guess_cost_s"]:
        facts.append(
            f"Answers had other lengths than expected. By prediction, this"
            f" {'cost' if cost > 0 else 'saved'} {format_seconds(abs(cost))}."
        )
    return tuple(facts)
