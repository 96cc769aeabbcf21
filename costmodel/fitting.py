"""From a relaxed optimum to policies that can be executed: whole batches, whole rows, and a fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from costmodel.memory import capacities
from costmodel.policy import Placement, Policy, Prediction
from costmodel.price import estimate
from costmodel.problem import Problem, Shares
from costmodel.program import Infeasible, Solution, solve
from costmodel.rounding import round_policy, roundings_of
from profiles.hardware import HardwareProfile

# Without a number of prompts, a block may be this large.
MAX_BLOCK_SIZE = 4096
# Rounding to rows may overshoot a capacity; the next attempt leaves that much free.
ROUNDING_ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class _Rounded:
    policy: Policy
    predicted: Prediction
    overshoot: Mapping[str, int]


def fit_all(
    problem: Problem, relaxed: Solution, *, max_latency_s: float | None
) -> list[tuple[Policy, Solution]]:
    """Round the block size to either side and to what fills the last block; then the rest.

    Returns policies that keep every capacity and the limit, each with the program's optimum at
    its block size.
    """
    batch, num_prompts = problem.gpu_batch_size, problem.workload.num_prompts
    wanted = 1 / (relaxed.shares.per_block * batch)
    counts = {math.floor(wanted), math.ceil(wanted), round(0.9 * wanted)}
    most = max(1, MAX_BLOCK_SIZE // batch)
    if num_prompts is not None:
        most = -(-num_prompts // batch)
        num_blocks = max(1, round(num_prompts / (batch * wanted)))
        counts |= {-(-num_prompts // (batch * n)) for n in (num_blocks, num_blocks + 1)}
    tries = sorted({min(max(1, count), most) for count in counts})
    found = [_fit(problem, count, max_latency_s) for count in tries]
    smaller = tries[0] // 2
    while smaller and not any(found):
        # Where memory is tight, the relaxed block can be far too large.
        found.append(_fit(problem, smaller, max_latency_s))
        smaller //= 2
    return [pair for pair in found if pair is not None]


def fits_alone(problem: Problem, *, max_latency_s: float | None) -> bool:
    """Whether one batch alone keeps every capacity and the limit when it is rounded."""
    return _fit(problem, 1, max_latency_s) is not None


def _fit(
    problem: Problem, num_gpu_batches: int, max_latency_s: float | None
) -> tuple[Policy, Solution] | None:
    """Solve at a fixed block size and round; where every rounding overshoots a capacity, leave
    that much free and solve again.

    ``None`` where nothing fits, or where the job would leave a batch of the block empty.
    """
    num_prompts = problem.workload.num_prompts
    if num_prompts is not None and problem.gpu_batch_size > -(-num_prompts // num_gpu_batches):
        return None
    reserve: dict[str, int] = {}
    limit_s = max_latency_s
    block_size = problem.gpu_batch_size * num_gpu_batches
    for attempt in range(ROUNDING_ATTEMPTS):
        try:
            solution = solve(
                problem,
                max_block_size=block_size,
                block_size=block_size,
                max_latency_s=limit_s,
                reserve=reserve,
            )
        except Infeasible:
            return None
        rounded = _round(_policy_of(problem, num_gpu_batches, solution.shares), problem.hardware)
        lateness = rounded.predicted.latency_s / max_latency_s if max_latency_s else 0.0
        if not rounded.overshoot and lateness <= 1:
            return rounded.policy, solution
        for tier, num_bytes in rounded.overshoot.items():
            # Twice as much each time: a little less may round to the same rows.
            reserve[tier] = reserve.get(tier, 0) + (num_bytes << attempt)
        if limit_s is not None and lateness > 1:
            limit_s *= (1 - 1e-6) / lateness
    return None


def _round(policy: Policy, hardware: HardwareProfile) -> _Rounded:
    """Return the fastest rounding that fits; where none does, the one that overshoots least."""
    options = []
    for option in roundings_of(policy, has_gpu=hardware.has_gpu):
        rounded = round_policy(option, has_gpu=hardware.has_gpu)
        predicted = estimate(rounded, hardware)
        options.append(_Rounded(rounded, predicted, _overshoot(predicted, hardware)))
    return min(options, key=lambda o: (sum(o.overshoot.values()), o.predicted.latency_s))


def _overshoot(predicted: Prediction, hardware: HardwareProfile) -> Mapping[str, int]:
    peaks = predicted.peak_bytes
    over = {tier: peaks[tier] - limit for tier, limit in capacities(hardware).items()}
    return {tier: count for tier, count in over.items() if count > 0}


def _policy_of(problem: Problem, num_gpu_batches: int, shares: Shares) -> Policy:
    off_gpu = shares.cache_cpu + shares.cache_disk
    attended = shares.attended / off_gpu if problem.hardware.has_gpu and off_gpu > 0 else 1.0
    full_bits = 8 * problem.model.dtype_bytes
    return Policy(
        model=problem.model,
        workload=problem.workload,
        gpu_batch_size=problem.gpu_batch_size,
        num_gpu_batches=num_gpu_batches,
        prefill_batch_size=problem.prefill_batch_size,
        weights=_placement(shares.weights_gpu, shares.weights_cpu, shares.weights_disk),
        cache=_placement(shares.cache_gpu, shares.cache_cpu, shares.cache_disk),
        activations=_placement(
            shares.activations_gpu, shares.activations_cpu, shares.activations_disk
        ),
        cpu_attention=min(1.0, max(0.0, attended)),
        weight_bits=full_bits,
        cache_bits=full_bits,
    )


def _placement(gpu: float, cpu: float, disk: float) -> Placement:
    # The solver is exact to about 1e-7; what is not far above that is zero.
    parts = [part if part > 1e-6 * (gpu + cpu + disk) else 0.0 for part in (gpu, cpu, disk)]
    total = sum(parts)
    return Placement(gpu=parts[0] / total, cpu=parts[1] / total, disk=parts[2] / total)
