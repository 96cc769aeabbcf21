"""The price of any policy, also one written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Policy, Prediction
from costmodel.plan.rounding import round_policy
from costmodel.plan.workload import Workload
from costmodel.pricing.channels import channel_seconds
from costmodel.pricing.lane_price import price_job
from costmodel.pricing.latency import stage_work
from costmodel.pricing.limits import stage_limits
from costmodel.pricing.memory import LANE_PHASE, PHASES, capacities, memory_rows, peak_bytes
from costmodel.pricing.problem import Problem, problem_of
from costmodel.pricing.shares import Shares, shares_of
from costmodel.pricing.stages import Stage, stages_of
from profiles.errors import InfeasibleError, InputError
from profiles.hardware import CHANNELS, HardwareProfile
from profiles.start import called
from profiles.units import format_bytes


def estimate(policy: Policy, hardware: HardwareProfile) -> Prediction:
    """Price one block of a policy, with the fractions of its cuts, or the whole job of lanes.

    Raises
    ------
    InputError
        For a policy that no amount of memory would let the machine run: bytes on a missing GPU, a
        dtype without known rates, more tokens than the model has positions.
    """
    check_machine(policy, hardware)
    if policy.lanes is not None:
        return _estimate_lanes(policy, hardware)
    policy = round_policy(policy, has_gpu=hardware.has_gpu)
    problem, shares = problem_of(policy, hardware), shares_of(policy)
    block = policy.block_size
    phase_s = dict.fromkeys(PHASES, 0.0)
    limits_s: dict[str, float] = {}
    for stage in stages_of(problem):
        limits = stage_limits(problem, shares, stage)
        phase_s[stage.phase] += max(limits.values()) * block
        largest = _name_largest(limits)
        limits_s[largest] = limits_s.get(largest, 0.0) + limits[largest] * block
    channels = _phase_channels(problem, shares).values()
    latency_s = sum(phase_s.values())
    return Prediction(
        throughput_tok_per_s=block * policy.workload.gen_len / latency_s,
        latency_s=latency_s,
        prefill_s=phase_s["prefill"],
        decode_s=phase_s["decode"],
        lower_bound_s=_lower_bound_s(problem, shares) * block,
        bottleneck=max(limits_s, key=lambda name: limits_s[name]),
        channel_s={
            name: sum(seconds.get(name, 0.0) for seconds in channels) * block
            for name in _channels_of(hardware)
        },
        peak_bytes=peak_bytes(problem, shares),
    )


def _estimate_lanes(policy: Policy, hardware: HardwareProfile) -> Prediction:
    job = price_job(policy, hardware)
    return Prediction(
        throughput_tok_per_s=job.throughput_tok_per_s,
        latency_s=job.total_s,
        prefill_s=0.0,
        decode_s=job.total_s,
        lower_bound_s=job.lower_bound_s,
        bottleneck=job.bottleneck,
        channel_s=job.channel_s,
        peak_bytes=policy_peaks(policy, hardware),
    )


def policy_peaks(policy: Policy, hardware: HardwareProfile) -> dict[str, int]:
    """Return the peak of each tier in bytes, see ``estimate``."""
    policy = round_policy(policy, has_gpu=hardware.has_gpu)
    return peak_bytes(problem_of(policy, hardware), shares_of(policy))


def stage_seconds(policy: Policy, hardware: HardwareProfile) -> list[tuple[Stage, float]]:
    """Return the stages of one block with their seconds."""
    policy = round_policy(policy, has_gpu=hardware.has_gpu)
    problem, shares = problem_of(policy, hardware), shares_of(policy)
    return [
        (stage, max(stage_limits(problem, shares, stage).values()) * policy.block_size)
        for stage in stages_of(problem)
    ]


def phase_seconds(policy: Policy, hardware: HardwareProfile) -> dict[str, float]:
    """Return ``{phase: seconds}`` of one block, or of the job of lanes, see ``estimate``."""
    if policy.lanes is not None:
        return {LANE_PHASE: price_job(policy, hardware).total_s}
    found = dict.fromkeys(PHASES, 0.0)
    for stage, seconds in stage_seconds(policy, hardware):
        found[stage.phase] += seconds
    return found


def block_seconds(policy: Policy, hardware: HardwareProfile) -> float:
    """Return the latency of one block alone, or of the job of lanes, see ``estimate``."""
    check_machine(policy, hardware)
    if policy.lanes is not None:
        return price_job(policy, hardware).total_s
    return sum(seconds for _, seconds in stage_seconds(policy, hardware))


def phase_channels(policy: Policy, hardware: HardwareProfile) -> dict[str, dict[str, float]]:
    """Return ``{phase: {channel: busy seconds}}`` of one block, or of the job of lanes."""
    if policy.lanes is not None:
        return {LANE_PHASE: dict(price_job(policy, hardware).channel_s)}
    policy = round_policy(policy, has_gpu=hardware.has_gpu)
    per_sequence = _phase_channels(problem_of(policy, hardware), shares_of(policy))
    return {
        phase: {name: s * policy.block_size for name, s in seconds.items()}
        for phase, seconds in per_sequence.items()
    }


def limits_by_phase(policy: Policy, hardware: HardwareProfile) -> dict[str, str]:
    """Return ``{phase: the limit that most of it waits for}``, of each phase that takes time."""
    if policy.lanes is not None:
        return {LANE_PHASE: price_job(policy, hardware).bottleneck}
    policy = round_policy(policy, has_gpu=hardware.has_gpu)
    problem, shares = problem_of(policy, hardware), shares_of(policy)
    seconds: dict[str, dict[str, float]] = {}
    for stage in stages_of(problem):
        limits = stage_limits(problem, shares, stage)
        name = _name_largest(limits)
        of_phase = seconds.setdefault(stage.phase, {})
        of_phase[name] = of_phase.get(name, 0.0) + max(limits.values())
    return {phase: max(found, key=found.__getitem__) for phase, found in seconds.items()}


def peak_buffers(policy: Policy, hardware: HardwareProfile) -> dict[str, dict[str, float]]:
    """Return ``{tier: {buffer: bytes}}`` at the moment of each tier's peak."""
    policy = round_policy(policy, has_gpu=hardware.has_gpu)
    rows = memory_rows(problem_of(policy, hardware), shares_of(policy))
    peaks = {
        tier: max(moments.values(), key=lambda terms: sum(terms.values()))
        for tier, moments in rows.items()
    }
    return {
        tier: {buffer: float(use) * policy.block_size for buffer, use in peaks[tier].items()}
        for tier in capacities(hardware)
    }


def _phase_channels(problem: Problem, shares: Shares[float]) -> dict[str, dict[str, float]]:
    channels = _channels_of(problem.hardware)
    phases = {phase: dict.fromkeys(channels, 0.0) for phase in PHASES}
    for stage in stages_of(problem):
        for name, seconds in channel_seconds(stage_work(problem, shares, stage)).items():
            phases[stage.phase][name] += float(seconds)
    return phases


def _channels_of(hardware: HardwareProfile) -> tuple[str, ...]:
    if hardware.has_gpu:
        return CHANNELS
    return tuple(name for name in CHANNELS if name not in ("h2d", "d2h", "gpu_compute"))


def _name_largest(limits: Mapping[str, float]) -> str:
    """Name the largest limit of a stage; a channel is preferred to a slightly larger limit."""
    return max(limits, key=lambda name: limits[name] * (1.01 if name in CHANNELS else 1.0))


def _lower_bound_s(problem: Problem, shares: Shares[float]) -> float:
    """Return the seconds per sequence without fixed costs and without waits between channels."""
    hardware = problem.hardware
    cpu = replace(hardware.cpu, compute=replace(hardware.cpu.compute, task_overhead_s=0.0))
    gpu = hardware.gpu
    if gpu is not None:
        gpu = replace(gpu, compute=replace(gpu.compute, task_overhead_s=0.0))
    ideal = replace(problem, hardware=replace(hardware, cpu=cpu, gpu=gpu))
    busy = (channel_seconds(stage_work(ideal, shares, stage)) for stage in stages_of(ideal))
    return float(sum(max(seconds.values()) for seconds in busy))


def check_machine(policy: Policy, hardware: HardwareProfile) -> None:
    """Refuse a policy that no amount of memory would let this machine run."""
    check_work(policy.model, policy.workload, hardware)
    packed = policy.model.full_bits > min(policy.weight_bits, policy.cache_bits)
    if packed and not hardware.knows_unpacking:
        raise InputError(
            "policy",
            got=f"weight_bits {policy.weight_bits}, cache_bits {policy.cache_bits}",
            allowed=f"{policy.model.full_bits}, because the rate of unpacking on {hardware.name}"
            " is not known",
            hint=called("profiles.measure"),
        )
    on_gpu = max(p.gpu for p in (*policy.weights.values(), policy.cache, policy.activations))
    if on_gpu > 0 and not hardware.has_gpu:
        raise InputError(
            "policy",
            got=f"{on_gpu:g} of something on the GPU",
            allowed=f"CPU and disk, because {hardware.name} has no GPU",
        )


def check_executable(policy: Policy) -> None:
    """Refuse a policy that can be priced but not run."""
    if policy.unpacks_per_batch:
        raise InputError(
            "policy.unpacks_per_batch",
            got="true",
            allowed="false: true can be priced, but not run",
            hint="false in the policy",
        )


def check_work(model: ModelSpec, workload: Workload, hardware: HardwareProfile) -> None:
    """Refuse a dtype whose rates are unknown, and more tokens than the model has positions."""
    # The CPU attends to rows that are not fetched, so both devices must know the dtype.
    known = [dtype for dtype in hardware.compute.matmul if dtype in hardware.cpu.compute.matmul]
    if model.dtype not in known:
        raise InputError(
            f"dtype on {hardware.name}", got=model.dtype, allowed=", ".join(known), hint="--dtype"
        )
    gpu = hardware.gpu
    if model.is_encoded and gpu and hardware.uses_cuda and not gpu.compute.unpack_bytes_per_s:
        raise InputError(
            f"{model.name}, which is stored in few bits",
            got=f"{hardware.name}, without the rate of unpacking",
            allowed="a machine with that rate",
            hint=called("profiles.measure"),
        )
    total = workload.num_positions
    if total > model.max_positions:
        raise InputError(
            "prompt_len + gen_len - 1",
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
