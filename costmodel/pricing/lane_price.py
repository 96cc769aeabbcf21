"""The price of a whole job over lanes, from the seconds of every pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from costmodel.plan.lengths import Lengths, Sketch
from costmodel.plan.policy import Policy
from costmodel.plan.rounding import round_policy
from costmodel.pricing.passes import PassCounts, PassPrice
from costmodel.schedule.job_simulation import JobTimeline, simulate_job
from costmodel.schedule.job_trace import JobTrace
from profiles.hardware import CHANNELS, HardwareProfile

# A longer job is priced by a smaller one with the same lengths, and by half of that: what the one
# takes longer than the other, all further tokens take. The least prompts, and those of a lane.
LEAST_SIMULATED = 4096
SIMULATED_OF_LANE = 8
MOST_SIMULATED = 32_768
# The same where many policies are compared.
LEAST_COMPARED = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPrice:
    """What a job takes.

    Parameters
    ----------
    generated_tokens
        Tokens of all answers that run, as expected.
    total_s
        Seconds of all passes.
    lower_bound_s
        Seconds of the busiest channel of every pass, without fixed costs, contention or waits.
    limits_s
        The seconds of the passes by what limits each of them.
    channel_s
        Busy seconds of every channel.
    """

    generated_tokens: float
    total_s: float
    lower_bound_s: float
    limits_s: Mapping[str, float]
    channel_s: Mapping[str, float]

    @property
    def bottleneck(self) -> str:
        """The limit of most of the job."""
        return max(self.limits_s, key=lambda name: self.limits_s[name])

    @property
    def throughput_tok_per_s(self) -> float:
        """Generated tokens in a second."""
        return self.generated_tokens / self.total_s


def price_job(policy: Policy, hardware: HardwareProfile) -> JobPrice:
    """Price the job of a policy with lanes.

    Raises
    ------
    InputError
        Where no prompt of the job has room.
    """
    policy = round_policy(policy, has_gpu=hardware.has_gpu)
    sketch = policy.workload.sketch(policy.block_size)
    sizes = _sizes(sketch, policy, LEAST_SIMULATED)

    def price(lengths: Lengths) -> JobPrice:
        return price_timeline(policy, hardware, simulate_job(policy, hardware, lengths))

    if len(sizes) == 1:
        return price(sketch.lengths())
    large, small = (price(sketch.scaled(count).lengths()) for count in sizes)
    tokens = large.generated_tokens, small.generated_tokens
    whole = policy.workload.mean_output * sketch.num_prompts
    further = (whole - tokens[0]) / (tokens[0] - tokens[1])

    def grown(value: Callable[[JobPrice], float]) -> float:
        return value(large) + further * (value(large) - value(small))

    def each(by_name: Callable[[JobPrice], Mapping[str, float]]) -> dict[str, float]:
        names = {**by_name(small), **by_name(large)}
        found = {n: grown(lambda price, n=n: by_name(price).get(n, 0.0)) for n in names}  # type: ignore[misc]
        return {name: max(0.0, seconds) for name, seconds in found.items()}

    return JobPrice(
        generated_tokens=grown(lambda price: price.generated_tokens),
        total_s=grown(lambda price: price.total_s),
        lower_bound_s=grown(lambda price: price.lower_bound_s),
        limits_s=each(lambda price: price.limits_s),
        channel_s=each(lambda price: price.channel_s),
    )


def job_seconds(
    policy: Policy,
    hardware: HardwareProfile,
    traces: dict[tuple[int, ...], JobTrace],
    *,
    least: int = LEAST_COMPARED,
) -> float:
    """Return the seconds of a job, to compare policies by.

    ``traces`` are the passes of jobs that were simulated before, of the same model and lengths: the
    placement of weights does not change them. Longer jobs are priced by jobs of ``least`` prompts.
    """
    sketch = policy.workload.sketch(policy.block_size)
    seconds, counts = [], []
    for count in _sizes(sketch, policy, least):
        lengths = sketch.scaled(count).lengths()
        assert policy.lanes is not None
        lanes, shares = policy.lanes, int(policy.shares_prefixes)
        key = count, policy.block_size, lanes.pool_tokens, lanes.pass_rows, shares
        timeline = simulate_job(policy, hardware, lengths, trace=traces.get(key))
        traces[key] = timeline.trace
        seconds.append(timeline.total_s)
        counts.append(timeline.generated_tokens)
    if len(counts) == 1:
        return seconds[0]
    each = (seconds[0] - seconds[1]) / (counts[0] - counts[1])
    whole = policy.workload.mean_output * sketch.num_prompts
    return seconds[0] + each * (whole - counts[0])


def _sizes(sketch: Sketch, policy: Policy, least: int) -> tuple[int, ...]:
    """Return the numbers of prompts of the jobs that are simulated for a job."""
    most = min(MOST_SIMULATED, max(least, SIMULATED_OF_LANE * policy.block_size))
    return (sketch.num_prompts,) if sketch.num_prompts <= most else (most, most // 2)


def price_timeline(policy: Policy, hardware: HardwareProfile, timeline: JobTimeline) -> JobPrice:
    """Return the price of a job that was simulated with this policy."""
    policy = round_policy(policy, has_gpu=hardware.has_gpu)
    price = PassPrice(policy, hardware)
    return JobPrice(
        generated_tokens=timeline.generated_tokens,
        total_s=timeline.total_s,
        lower_bound_s=_lower_bound_s(policy, hardware, timeline.counts),
        limits_s=_limits_s(price, timeline),
        channel_s={n: float(s.sum()) for n, s in price.channels(timeline.counts).items()},
    )


def _limits_s(price: PassPrice, timeline: JobTimeline) -> dict[str, float]:
    """Add up the seconds of the passes by what limits each of them; a channel is preferred to a
    slightly larger limit."""
    limits = price.limits(timeline.counts, begins=True)
    names = list(limits)
    preferred = np.array([1.01 if name in CHANNELS else 1.0 for name in names])
    largest = (np.stack([limits[name] for name in names]) * preferred[:, None]).argmax(axis=0)
    sums = np.bincount(largest, timeline.seconds, len(names))
    return {name: float(s) for name, s in zip(names, sums, strict=True) if s > 0}


def _lower_bound_s(policy: Policy, hardware: HardwareProfile, counts: PassCounts) -> float:
    cpu = hardware.cpu
    cpu = replace(cpu, compute=replace(cpu.compute, task_overhead_s=0.0))
    ideal = PassPrice(policy, replace(hardware, cpu=cpu)).channels(counts)
    return float(np.maximum.reduce(list(ideal.values())).sum())
