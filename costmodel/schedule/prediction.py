"""What a policy will take: the limits of its phases, and the waits that its schedule adds.

The limits of the program do not know in which order loads and products wait for each other. For
dense models that is a few percent. A mixture of experts routes before it loads, and the CPU may
multiply experts while the GPU waits: there, the first passes of the schedule are simulated.
"""

from __future__ import annotations

from dataclasses import replace

from costmodel.plan.policy import Policy, Prediction
from costmodel.pricing.memory import PHASES
from costmodel.pricing.price import estimate, stage_seconds
from costmodel.pricing.problem import problem_of
from costmodel.schedule.timeline import simulate
from profiles.hardware import HardwareProfile

# Layers and batches that are simulated: they take about a second. With more of them in a pass, one
# batch's waits are another's work, and the limits count.
MOST_SIMULATED = 6000
# Passes that are simulated, the first one included: the others are like the last of them.
MOST_PASSES = 6


def predict(policy: Policy, hardware: HardwareProfile) -> Prediction:
    """Return the prediction of ``estimate``, with the waits of the schedule; raises the same."""
    limits = estimate(policy, hardware)
    factors = waits(policy, hardware)
    prefill_s = limits.prefill_s * factors["prefill"]
    decode_s = limits.decode_s * factors["decode"]
    if policy.lanes is not None or prefill_s + decode_s == limits.latency_s:
        return limits
    latency_s = prefill_s + decode_s
    return replace(
        limits,
        throughput_tok_per_s=limits.throughput_tok_per_s * limits.latency_s / latency_s,
        latency_s=latency_s,
        prefill_s=prefill_s,
        decode_s=decode_s,
    )


def waits(policy: Policy, hardware: HardwareProfile) -> dict[str, float]:
    """Return how many times as long as its largest limit each phase of a block takes, 1 or more.

    That is 1 for dense models, for lanes, and where a pass has more tasks than are simulated. The
    share of channels that is not hidden, a result of calibration, is left out of both.
    """
    found = dict.fromkeys(PHASES, 1.0)
    if policy.lanes is not None or "experts" not in policy.model.component_names:
        return found
    calm = replace(hardware, unhidden_share=0.0)
    per_pass = len(problem_of(policy, calm).sizes.layers) * policy.num_gpu_batches
    num_passes = min(policy.workload.gen_len, MOST_PASSES, MOST_SIMULATED // per_pass)
    if num_passes == 0:
        return found
    timeline = simulate(policy, calm, num_passes=num_passes)
    limits_s = [predicted_seconds(policy, calm, count) for count in (1, num_passes)]
    found["prefill"] = max(1.0, timeline.prefill_s / limits_s[0])
    if num_passes > 1:
        decode_s = timeline.latency_s - timeline.prefill_s
        found["decode"] = max(1.0, decode_s / (limits_s[1] - limits_s[0]))
    return found


def predicted_seconds(policy: Policy, hardware: HardwareProfile, num_passes: int) -> float:
    """Return what the program predicts for the first passes over the model."""
    seconds = 0.0
    for stage, stage_s in stage_seconds(policy, hardware):
        passes = min(max(0, num_passes - stage.first_pass), stage.passes)
        seconds += stage_s * passes / stage.passes
    return seconds
