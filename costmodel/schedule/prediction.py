"""What a policy will take: the limits of its phases, and the waits that its schedule adds.

The limits of the program do not know in which order loads and products wait for each other. For
dense models that is a few percent. A mixture of experts routes before it loads, and the CPU may
multiply experts while the GPU waits: there, the first passes of the schedule are simulated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from costmodel.plan.policy import Policy, Prediction
from costmodel.pricing.memory import PHASES
from costmodel.pricing.price import estimate, phase_seconds, stage_seconds
from costmodel.pricing.problem import problem_of
from costmodel.schedule.timeline import simulated_tasks
from profiles.hardware import HardwareProfile

# Layers and batches that are simulated: they take about a second.
MOST_SIMULATED = 6000
# Passes that are simulated, the first one included: the others are like the last of them.
MOST_PASSES = 6


def predict(
    policy: Policy, hardware: HardwareProfile, slowdowns: Mapping[str, float] | None = None
) -> Prediction:
    """Return the prediction of ``estimate`` with the waits of the schedule; raises the same.

    Parameters
    ----------
    slowdowns
        What ``phase_slowdowns`` returned for an alike policy; ``None`` to simulate this one.
    """
    limits = estimate(policy, hardware)
    factors = phase_slowdowns(policy, hardware) if slowdowns is None else slowdowns
    if max(factors.values()) == 1:
        return limits
    prefill_s = limits.prefill_s * factors["prefill"]
    decode_s = limits.decode_s * factors["decode"]
    latency_s = prefill_s + decode_s
    return replace(
        limits,
        throughput_tok_per_s=limits.throughput_tok_per_s * limits.latency_s / latency_s,
        latency_s=latency_s,
        prefill_s=prefill_s,
        decode_s=decode_s,
    )


def phase_slowdowns(policy: Policy, hardware: HardwareProfile) -> dict[str, float]:
    """Return how many times as long as its largest limit each phase of a block takes, 1 or more.

    That is 1 for dense models and for lanes. It is also 1 where two passes have more layers and
    batches than ``MOST_SIMULATED``: among so many batches, one has work while another waits. The
    share of channels that is not hidden, a result of calibration, is left out of both.
    """
    found = dict.fromkeys(PHASES, 1.0)
    if policy.lanes is not None or "experts" not in policy.model.component_names:
        return found
    calm = replace(hardware, unhidden_share=0.0)
    per_pass = len(problem_of(policy, calm).sizes.layers) * policy.num_gpu_batches
    num_passes = min(policy.workload.gen_len, MOST_PASSES, MOST_SIMULATED // per_pass)
    if num_passes < min(2, policy.workload.gen_len):
        return found
    ends_s = [0.0, 0.0]
    for timed in simulated_tasks(policy, calm, num_passes=num_passes):
        if "compute" in timed.task.channel:
            # All passes, and the first one.
            ends_s[0] = max(ends_s[0], timed.end_s)
            if timed.task.is_prefill:
                ends_s[1] = max(ends_s[1], timed.end_s)
    whole_s, prefill_s = ends_s
    limits_s = [predicted_seconds(policy, calm, count) for count in (num_passes, 1)]
    found["prefill"] = max(1.0, prefill_s / limits_s[1])
    if num_passes > 1:
        found["decode"] = max(1.0, (whole_s - prefill_s) / (limits_s[0] - limits_s[1]))
    return found


def slowdown(policy: Policy, hardware: HardwareProfile) -> float:
    """Return how many times as long as its limits a block takes, see ``phase_slowdowns``."""
    factors = phase_slowdowns(policy, hardware)
    if max(factors.values()) == 1:
        return 1.0
    limits = phase_seconds(policy, hardware)
    return sum(s * factors[phase] for phase, s in limits.items()) / sum(limits.values())


def predicted_seconds(policy: Policy, hardware: HardwareProfile, num_passes: int) -> float:
    """Return what the limits say of the first passes over the model."""
    seconds = 0.0
    for stage, stage_s in stage_seconds(policy, hardware):
        passes = min(max(0, num_passes - stage.first_pass), stage.passes)
        seconds += stage_s * passes / stage.passes
    return seconds
