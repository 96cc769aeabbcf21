"""The price of any policy, also one written by hand."""

from __future__ import annotations

from costmodel.latency import phase_terms
from costmodel.memory import capacities, peak_bytes
from costmodel.model_spec import ModelSpec
from costmodel.policy import Policy, Prediction
from costmodel.problem import problem_of, shares_of
from costmodel.rounding import round_policy
from costmodel.workload import Workload
from profiles.errors import InfeasibleError, InputError
from profiles.hardware import HardwareProfile
from profiles.units import format_bytes


def estimate(policy: Policy, hardware: HardwareProfile) -> Prediction:
    """Price one block of a policy, with the fractions that its bytes will really obey.

    Raises
    ------
    InputError
        When the machine cannot run it whatever its memory: bytes on a GPU that is not there, a
        dtype whose rates are unknown, more tokens than the model has positions.
    """
    check_machine(policy, hardware)
    policy = round_policy(policy, has_gpu=hardware.has_gpu)
    problem, shares = problem_of(policy, hardware), shares_of(policy)
    block = policy.block_size
    phases = {
        phase: {channel: float(seconds) * block for channel, seconds in terms.items()}
        for phase, terms in phase_terms(problem, shares).items()
    }
    phase_s = {phase: max(terms.values()) for phase, terms in phases.items()}
    channel_s = {
        channel: sum(terms[channel] for terms in phases.values()) for channel in phases["prefill"]
    }
    latency_s = sum(phase_s.values())
    return Prediction(
        throughput_tok_per_s=block * policy.workload.gen_len / latency_s,
        latency_s=latency_s,
        prefill_s=phase_s["prefill"],
        decode_s=phase_s["decode"],
        lower_bound_s=latency_s,
        bottleneck=max(channel_s, key=lambda channel: channel_s[channel]),
        channel_s=channel_s,
        peak_bytes=peak_bytes(problem, shares),
    )


def check_machine(policy: Policy, hardware: HardwareProfile) -> None:
    """Refuse a policy that no amount of memory would let this machine run."""
    check_work(policy.model, policy.workload, hardware)
    full_bits = 8 * policy.model.dtype_bytes
    for name, allowed in (
        ("weight_bits", full_bits), ("cache_bits", full_bits), ("attention_sparsity", 1),
    ):  # fmt: skip
        if getattr(policy, name) != allowed:
            raise InputError(f"policy.{name}", got=getattr(policy, name), allowed=str(allowed))
    on_gpu = max(policy.weights.gpu, policy.cache.gpu, policy.activations.gpu)
    if on_gpu > 0 and not hardware.has_gpu:
        raise InputError(
            "policy",
            got=f"{on_gpu:g} of something on the GPU",
            allowed=f"CPU and disk, because {hardware.name} has no GPU",
        )


def check_work(model: ModelSpec, workload: Workload, hardware: HardwareProfile) -> None:
    """Refuse a dtype whose rates are unknown, and more tokens than the model has positions."""
    # The CPU attends what is not fetched, so both devices must know the dtype.
    known = [dtype for dtype in hardware.compute.matmul if dtype in hardware.cpu.compute.matmul]
    if model.dtype not in known:
        raise InputError(
            f"dtype on {hardware.name}", got=model.dtype, allowed=", ".join(known), hint="--dtype"
        )
    total = workload.prompt_len + workload.gen_len
    if total > model.max_positions:
        raise InputError(
            "prompt_len + gen_len",
            got=total,
            allowed=f"at most the {model.max_positions} positions of {model.name}",
        )


def check_fits(prediction: Prediction, hardware: HardwareProfile) -> None:
    """Raise ``InfeasibleError`` for the first tier whose predicted peak is over its budget."""
    for tier, capacity in capacities(hardware).items():
        short = prediction.peak_bytes[tier] - capacity
        if short > 0:
            raise InfeasibleError(
                f"the policy does not fit: {tier} is short by {short} bytes"
                f" ({format_bytes(prediction.peak_bytes[tier])} of {format_bytes(capacity)});"
                " search again with that budget"
            )
