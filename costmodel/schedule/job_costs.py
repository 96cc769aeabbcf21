"""What bounds a job over lanes: busy seconds of channels, limits, and the lower bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from costmodel.plan.policy import Policy
from costmodel.plan.rounding import round_policy
from costmodel.pricing.passes import PassCounts, PassPrice
from profiles.hardware import HardwareProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCosts:
    """Seconds of all passes of a job.

    Parameters
    ----------
    busy_s
        Busy seconds of each channel.
    limits_s
        Seconds of the passes that each limit is the largest of.
    lower_bound_s
        Seconds of the busiest channel, without fixed costs and without waits for others.
    """

    busy_s: Mapping[str, float]
    limits_s: Mapping[str, float]
    lower_bound_s: float

    @property
    def bottleneck(self) -> str:
        """The limit that most of the job waits for."""
        return max(self.limits_s, key=lambda name: self.limits_s[name])


def job_costs(policy: Policy, hardware: HardwareProfile, counts: PassCounts) -> JobCosts:
    """Price what the passes of a job compute; see ``simulate_job``."""
    policy = round_policy(policy, has_gpu=hardware.has_gpu)
    price = PassPrice(policy, hardware)
    busy = {name: float(s.sum()) for name, s in price.channel_seconds(counts).items()}
    limits = price.limits(counts, begins=True)
    names, seconds = list(limits), np.stack(list(limits.values()))
    largest, most = seconds.argmax(axis=0), seconds.max(axis=0)
    ideal = PassPrice(policy, _without_fixed_costs(hardware)).channel_seconds(counts)
    return JobCosts(
        busy_s=busy,
        limits_s={names[i]: float(most[largest == i].sum()) for i in np.unique(largest)},
        lower_bound_s=max(float(s.sum()) for s in ideal.values()),
    )


def _without_fixed_costs(hardware: HardwareProfile) -> HardwareProfile:
    cpu, gpu = hardware.cpu, hardware.gpu
    cpu = replace(cpu, compute=replace(cpu.compute, task_overhead_s=0.0))
    if gpu is not None:
        gpu = replace(gpu, compute=replace(gpu.compute, task_overhead_s=0.0))
    return replace(hardware, cpu=cpu, gpu=gpu)
