"""The figures of a run over lanes: measured, predicted, and what a wrong guess of lengths cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from costmodel.calibration.measured_runs import MeasuredRun
from costmodel.calibration.run_lengths import RunLengths
from costmodel.plan.lengths import IntArray, Lengths
from costmodel.plan.policy import Policy
from costmodel.pricing.lane_price import JobPrice, price_timeline
from costmodel.report.lane_record import LaneRecord
from costmodel.report.pass_series import PassSeries
from costmodel.schedule.job_simulation import JobTimeline, simulate_job
from executor.run.pass_log import PassLog
from profiles.emulate import EmulatedGpu
from profiles.hardware import HardwareProfile
from profiles.units import format_count, format_seconds


@dataclass(frozen=True, kw_only=True)
class LaneFigures:
    """A run over lanes, beside simulations of the same requests.

    Parameters
    ----------
    policy, hardware
        What ran.
    log
        Its passes, to the last one.
    """

    policy: Policy
    hardware: HardwareProfile
    log: PassLog

    @property
    def lengths(self) -> Lengths:
        """The requests as they were admitted."""
        assert self.log.lengths is not None
        return self.log.lengths

    @property
    def answers(self) -> IntArray:
        """Generated tokens of each request, with its end token, int64 [requests]."""
        return self.log.answers

    @cached_property
    def predicted(self) -> JobTimeline:
        """The simulation of what happened: admitted as expected, with the true answers."""
        return simulate_job(self.policy, self.hardware, self.lengths, answers=self.answers)

    @cached_property
    def expected(self) -> JobTimeline:
        """The simulation as it was before the run: every answer as long as expected."""
        if self._guessed_right:
            return self.predicted
        return simulate_job(self.policy, self.hardware, self.lengths)

    @cached_property
    def known(self) -> JobTimeline:
        """The simulation of the same answers if their lengths had been known before."""
        if self._guessed_right:
            return self.predicted
        return simulate_job(self.policy, self.hardware, self.lengths.expecting(self.answers))

    @property
    def _guessed_right(self) -> bool:
        return bool((self.lengths.outputs == self.answers).all())

    @property
    def guess_cost_s(self) -> float:
        """Predicted seconds that are lost because lengths of answers were guessed wrong."""
        return self.predicted.total_s - self.known.total_s

    @cached_property
    def price(self) -> JobPrice:
        """Busy seconds, limits and lower bound of what happened, as predicted."""
        return price_timeline(self.policy, self.hardware, self.predicted)

    @property
    def num_passes(self) -> int:
        """Passes over the model."""
        return len(self.log.start_s)

    @property
    def num_tokens(self) -> int:
        """Generated tokens, end tokens included."""
        return int(self.answers.sum())

    @property
    def measured_tok_per_s(self) -> float:
        """Generated tokens over the seconds of the run."""
        return self.num_tokens / self.log.run_s

    @property
    def mean_lanes(self) -> float:
        """Mean lanes that compute in a pass."""
        return (sum(self.log.decoding) + sum(self.log.newcomers)) / self.num_passes

    @property
    def num_waited(self) -> int:
        """Passes of single lanes that waited for a page of the cache."""
        return sum(self.log.waiting)

    @cached_property
    def waited_s(self) -> float:
        """Seconds lost by waiting: of each pass, the share of its lanes that waited."""
        waiting = np.array(self.log.waiting, float)
        at_work = np.array(self.log.decoding, float) + np.array(self.log.newcomers)
        seconds = np.array(self.log.end_s) - np.array(self.log.start_s)
        return float((seconds * waiting / (at_work + waiting)).sum())

    @property
    def pool_share(self) -> tuple[float, float]:
        """Largest and mean share of the pages of the cache in use."""
        shares = np.array(self.log.pool_share)
        return float(shares.max()), float(shares.mean())

    def record(self) -> LaneRecord:
        """Return what a page and a timeline's file keep."""
        log = self.log
        return LaneRecord(
            figures=self.as_json(),
            bottleneck=self.price.bottleneck,
            measured=PassSeries.of(
                start_s=log.start_s,
                seconds=np.array(log.end_s) - np.array(log.start_s),
                lanes=np.array(log.decoding) + np.array(log.newcomers),
                waiting=log.waiting,
                tokens=log.tokens,
            ),
            simulated=PassSeries.simulated(self.predicted, self.lengths),
        )

    def measured_run(self, emulated: EmulatedGpu | None) -> MeasuredRun:
        """Return the run as one to calibrate with."""
        lengths = RunLengths.of(self.lengths, self.answers)
        work = replace(self.policy.workload, num_prompts=len(self.lengths), lengths=None)
        return MeasuredRun(
            policy=replace(self.policy, workload=work),
            throughput_tok_per_s=lengths.num_tokens / self.log.run_s,
            emulated=emulated,
            lengths=lengths,
        )

    def lines(self) -> list[str]:
        """Return what a report says beside the figures of every run."""
        lanes, most = self.policy.lanes, self.policy.block_size
        assert lanes is not None
        largest, mean = self.pool_share
        lines = [
            f"passes: {self.num_passes}, with {self.mean_lanes:.1f} of {most} lanes at work on"
            " average",
            f"tokens: {int(self.lengths.prompts.sum())} in, {self.num_tokens} out;"
            f" {int(self.lengths.outputs.sum())} out were expected",
            f"cache: {largest:.0%} of room for {lanes.pool_tokens} tokens used at most,"
            f" {mean:.0%} on average",
        ]
        if self.num_waited:
            lines.append(
                f"lanes waited for room in the cache {format_count(self.num_waited, 'time')},"
                f" which cost {format_seconds(self.waited_s)}"
            )
        if not self._guessed_right:
            cost = self.guess_cost_s
            word = "lost" if cost >= 0 else "won"
            lines.append(
                f"guessed lengths of answers {word} {format_seconds(abs(cost))}"
                f" ({abs(cost) / self.known.total_s:.1%}) against known ones, by prediction"
            )
        return lines

    def as_json(self) -> dict[str, float]:
        """Return every figure under its name."""
        lanes = self.policy.lanes
        assert lanes is not None
        largest, mean = self.pool_share
        return {
            "pool_tokens": lanes.pool_tokens,
            "pass_rows": lanes.pass_rows,
            "chunk_rows": lanes.chunk_rows,
            "passes": self.num_passes,
            "mean_lanes": self.mean_lanes,
            "waited": self.num_waited,
            "waited_s": self.waited_s,
            "predicted_waited": self.predicted.trace.waited,
            "predicted_waited_s": self.predicted.waiting_s,
            "pool_share": largest,
            "mean_pool_share": mean,
            "prompt_tokens": int(self.lengths.prompts.sum()),
            "output_tokens": self.num_tokens,
            "expected_output_tokens": int(self.lengths.outputs.sum()),
            "run_s": self.log.run_s,
            "predicted_s": self.predicted.total_s,
            "expected_s": self.expected.total_s,
            "known_s": self.known.total_s,
            "guess_cost_s": self.guess_cost_s,
        }
