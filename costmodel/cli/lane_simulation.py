"""A job over lanes, simulated pass by pass, for people, for programs and for viewers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import Policy
from costmodel.pricing.lane_price import price_timeline
from costmodel.report.pass_series import PassSeries
from costmodel.schedule.chrome_trace import begin_trace
from costmodel.schedule.job_simulation import JobTimeline, simulate_job
from profiles.hardware import HardwareProfile
from profiles.outputs import write_output
from profiles.units import format_count, format_figure, format_seconds

PID = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedJob:
    """A job with a policy of lanes."""

    policy: Policy
    lengths: Lengths
    timeline: JobTimeline
    busy_s: Mapping[str, float]

    @classmethod
    def run(cls, policy: Policy, hardware: HardwareProfile, lengths: Lengths) -> SimulatedJob:
        """Simulate; raises ``InputError`` where no prompt has room."""
        timeline = simulate_job(policy, hardware, lengths)
        busy_s = price_timeline(policy, hardware, timeline).channel_s
        return cls(policy=policy, lengths=lengths, timeline=timeline, busy_s=busy_s)

    @property
    def mean_lanes(self) -> float:
        """Mean lanes that compute in a pass."""
        counts = self.timeline.counts
        return float((counts.decoding + counts.newcomers).mean())

    def describe(self) -> str:
        """Lay out the job, one fact a line."""
        timeline, trace = self.timeline, self.timeline.trace
        lines = [
            f"simulated  {format_seconds(timeline.total_s)}, pass by pass:"
            f" {format_figure(timeline.throughput_tok_per_s)} token/s",
            f"{format_count(len(trace.requests), 'prompt')}, {timeline.generated_tokens} tokens"
            f" generated in {trace.num_passes} passes,"
            f" {self.mean_lanes:.1f} of {self.policy.block_size} lanes at work on average",
        ]
        if trace.waited:
            lines.append(
                f"lanes wait for room in the cache {format_count(trace.waited, 'time')}, which"
                f" costs {format_seconds(timeline.waiting_s)}"
            )
        if timeline.num_refused:
            refused = format_count(timeline.num_refused, "prompt")
            lines.append(f"left out: {refused} without room in a pass or in the cache")
        busy = sorted(self.busy_s.items(), key=lambda item: -item[1])
        lines += [
            f"  {channel:<15}{format_seconds(seconds):>12}  {seconds / timeline.total_s:4.0%} busy"
            for channel, seconds in busy
            if seconds > 0
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Return every figure under its name."""
        timeline = self.timeline
        return {
            "simulated_s": timeline.total_s,
            "tok_per_s": timeline.throughput_tok_per_s,
            "generated_tokens": timeline.generated_tokens,
            "num_prompts": len(timeline.trace.requests),
            "num_refused": timeline.num_refused,
            "passes": timeline.trace.num_passes,
            "mean_lanes": self.mean_lanes,
            "waited": timeline.trace.waited,
            "waited_s": timeline.waiting_s,
            "busy_s": dict(self.busy_s),
        }

    def write(self, path: Path) -> None:
        """Write the passes as a timeline, whole or not at all."""

        def render(handle: IO[str]) -> None:
            trace = begin_trace(handle.write)
            trace.begin_passes(PID, f"{self.policy.model.name}, passes, predicted")
            PassSeries.simulated(self.timeline, self.lengths).write_to(trace, PID)
            trace.end()

        write_output(path, render)
