"""What a page tells of lanes: the passes of a run, or those of a simulated job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from costmodel.plan.policy import Policy
from costmodel.report.pass_series import PassSeries
from costmodel.report.run_record import RunRecord
from costmodel.report.trace_file import MEASURED, SIMULATED
from costmodel.schedule.job_simulation import simulate_job
from profiles.hardware import HardwareProfile
from profiles.units import format_seconds

# A page does not wait for the simulation of a larger job.
MOST_SIMULATED = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLanes:
    """The lanes of a page.

    Parameters
    ----------
    passes
        By label: ``simulated``, and before it ``measured`` where it is a run.
    facts
        Sentences on waiting, on the cache and on lengths that were guessed.
    bottleneck
        The predicted limit of a run; ``None`` for a job that was not run.
    """

    passes: Mapping[str, PassSeries]
    facts: tuple[str, ...] = ()
    bottleneck: str | None = None

    @classmethod
    def simulate(cls, policy: Policy, hardware: HardwareProfile) -> PlannedLanes:
        """Simulate the job that a policy was made for, or a part of a large one."""
        sketch, facts = policy.workload.sketch(policy.block_size), tuple[str, ...]()
        if sketch.num_prompts > MOST_SIMULATED:
            facts = (f"The pictures are of {MOST_SIMULATED:,} of {sketch.num_prompts:,} prompts.",)
            sketch = sketch.scaled(MOST_SIMULATED)
        lengths = sketch.lengths()
        series = PassSeries.simulated(simulate_job(policy, hardware, lengths), lengths)
        return cls(passes={SIMULATED: series}, facts=facts)

    @classmethod
    def of_run(cls, record: RunRecord) -> PlannedLanes:
        """Return the lanes of a run."""
        assert record.lanes is not None
        return cls(
            passes={MEASURED: record.lanes.measured, SIMULATED: record.lanes.simulated},
            facts=_facts(record.lanes.figures),
            bottleneck=record.lanes.bottleneck,
        )


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
