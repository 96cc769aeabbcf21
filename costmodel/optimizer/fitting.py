"""From a relaxed optimum to a policy of whole batches and rows that fits the memory."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace

from costmodel.optimizer.program import Limits, Price, Program, Solution, of_blocks
from costmodel.optimizer.solver import Infeasible
from costmodel.optimizer.whole_experts import with_whole_experts
from costmodel.plan.policy import Placement, Policy
from costmodel.plan.rounding import round_rows, round_weights, roundings_of
from costmodel.pricing.memory import capacities, peak_bytes
from costmodel.pricing.problem import Problem, problem_of
from costmodel.pricing.shares import Shares, shares_of, weight_name
from profiles.hardware import HardwareProfile
from profiles.units import MIB

# The solver is exact to about 1e-7; fractions near that are zero.
SOLVER_TOLERANCE = 1e-6
# Rounding to rows may exceed a capacity; the next attempt leaves that many bytes free.
ROUNDING_ATTEMPTS = 8
# Smaller reads of a layer's part on disk are slower than priced, and each delays the thread that
# computes. One sequence of a mixture ran at 0.75 of its rate where a thousandth of the head was on
# disk, 19 reads of 32 KiB in each pass.
LEAST_READ_BYTES = MIB


def fit(
    program: Program,
    num_gpu_batches: int,
    *,
    max_latency_s: float | None,
    fixed: Mapping[str, float] | None = None,
) -> tuple[Policy, Solution] | None:
    """Solve at a fixed block size and round to a policy within all capacities and the time limit.

    ``fixed`` has shares to fix before rounding, by name. Where every rounding exceeds a capacity,
    the program is solved again with that many bytes left free. Returns ``None`` where nothing fits,
    or where the job would leave a batch empty.
    """
    problem = program.problem
    num_prompts = problem.workload.num_prompts
    if num_prompts is not None and problem.gpu_batch_size > -(-num_prompts // num_gpu_batches):
        return None
    reserve: dict[str, int] = {}
    limit_s = max_latency_s
    block_size = problem.gpu_batch_size * num_gpu_batches
    for attempt in range(ROUNDING_ATTEMPTS):
        limits = Limits(
            block_sizes=(block_size, block_size),
            max_latency_s=limit_s,
            reserve=reserve,
            fixed=fixed,
        )
        try:
            solution = program.solve(limits)
        except Infeasible:
            return None
        with contextlib.suppress(Infeasible):
            without = _without_small_reads(problem, limits, solution.shares)
            limits, solution = without, program.solve(without)
        points = [solution, *with_whole_experts(program, limits, solution)]
        wanted = [_policy_of(problem, num_gpu_batches, point.shares) for point in points]
        policy, price = _round(wanted, program, num_gpu_batches)
        latency_s = price.latency_per_sequence_s * block_size
        lateness = latency_s / max_latency_s if max_latency_s else 0.0
        if not price.overshoot_bytes and lateness <= 1:
            return _raise_embedding(policy, problem.hardware), solution
        for tier, num_bytes in price.overshoot_bytes.items():
            # The reserve doubles each time, because a small one may lead to the same rows.
            reserve[tier] = reserve.get(tier, 0) + (num_bytes << attempt)
        if limit_s is not None and lateness > 1:
            limit_s *= (1 - 1e-6) / lateness
    return None


def _without_small_reads(problem: Problem, limits: Limits, shares: Shares[float]) -> Limits:
    """Keep in memory what else would be small reads, where a CPU walks through experts.

    Whole experts then fill what is left of memory. Nothing else may move to disk for that.
    """
    if not problem.walks_experts:
        return limits
    fixed = dict(limits.fixed or {})
    for layer in problem.sizes.staged_layers.values():
        for component in layer.components:
            disk = shares.weights[component.name].disk / shares.per_block
            if not component.is_experts and disk * component.num_bytes < LEAST_READ_BYTES:
                fixed[weight_name(component.name, "disk")] = 0.0
    for name in ("cache_disk", "activations_disk"):
        if getattr(shares, name) < SOLVER_TOLERANCE:
            fixed[name] = 0.0
    return replace(limits, fixed=fixed)


def fits(policy: Policy, program: Program, *, max_latency_s: float | None) -> bool:
    """Whether a policy of the program's machine and model is within all capacities and the time
    limit."""
    own = program.of_problem(problem_of(policy, program.problem.hardware))
    price = own.price(shares_of(policy))
    latency_s = price.latency_per_sequence_s * policy.block_size
    return not price.overshoot_bytes and (max_latency_s is None or latency_s <= max_latency_s)


def _round(
    wanted: Iterable[Policy], program: Program, num_gpu_batches: int
) -> tuple[Policy, Price]:
    """Return the fastest rounding that fits, or the one with the least excess where none fits."""
    hardware = program.problem.hardware
    # Rounding may put all hidden states on the compute device, which is another problem.
    problem = of_blocks(program.problem, (num_gpu_batches, num_gpu_batches))
    programs = {problem.hidden_in_place: program.of_problem(problem)}
    options = []
    # Weights are rounded once, before the choices for all else.
    whole = (round_weights(policy, has_gpu=hardware.has_gpu) for policy in wanted)
    roundings = (roundings_of(policy, has_gpu=hardware.has_gpu) for policy in whole)
    for option in itertools.chain.from_iterable(roundings):
        rounded = round_rows(option, has_gpu=hardware.has_gpu)
        problem = problem_of(rounded, hardware)
        if problem.hidden_in_place not in programs:
            programs[problem.hidden_in_place] = program.of_problem(problem)
        options.append((rounded, programs[problem.hidden_in_place].price(shares_of(rounded))))
    return min(
        options, key=lambda o: (sum(o[1].overshoot_bytes.values()), o[1].latency_per_sequence_s)
    )


def _raise_embedding(policy: Policy, hardware: HardwareProfile) -> Policy:
    """Move the embedding's part on disk to the fastest tier that has room for all of it.

    The cost model counts no time for gathering its rows, so the program may choose any tier.
    """
    placed = policy.weights.get("embedding", Placement(cpu=1.0))
    if not placed.disk:
        return policy
    problem = problem_of(policy, hardware)
    used, num_bytes = peak_bytes(problem, shares_of(policy)), problem.sizes.component_bytes
    for tier, capacity in capacities(hardware).items():
        # The tiers come in the order of their speed.
        if tier != "disk" and used[tier] + placed.disk * num_bytes["embedding"] <= capacity:
            share = min(1.0, getattr(placed, tier) + placed.disk)
            raised = replace(placed, **{tier: share, "disk": 0.0})
            return replace(policy, weights={**policy.weights, "embedding": raised})
    return policy


def _policy_of(problem: Problem, num_gpu_batches: int, shares: Shares[float]) -> Policy:
    off_gpu = shares.cache_cpu + shares.cache_disk
    attended = shares.attended / off_gpu if problem.hardware.has_gpu and off_gpu > 0 else 1.0
    return Policy(
        model=problem.model,
        workload=problem.workload,
        gpu_batch_size=problem.gpu_batch_size,
        num_gpu_batches=num_gpu_batches,
        prefill_batch_size=problem.prefill_batch_size,
        weights={
            name: _placement(share.gpu, share.cpu, share.disk)
            for name, share in shares.weights.items()
        },
        cache=_placement(shares.cache_gpu, shares.cache_cpu, shares.cache_disk),
        activations=_placement(
            shares.activations_gpu, shares.activations_cpu, shares.activations_disk
        ),
        cpu_attention=min(1.0, max(0.0, attended)),
        weight_bits=problem.weight_bits or problem.model.full_bits,
        cache_bits=problem.cache_bits or problem.model.full_bits,
        group_size=problem.group_size,
        attention_sparsity=problem.attention_sparsity,
        loads_on_demand=problem.loads_on_demand,
        cpu_experts=_experts_share(problem, shares),
        lanes=problem.lanes,
        blocks_in_flight=problem.blocks_in_flight,
    )


def _experts_share(problem: Problem, shares: Shares[float]) -> float:
    """Return the fraction of the experts in CPU memory that the CPU multiplies in place."""
    if not problem.cpu_experts:
        return 0.0
    in_memory = shares.weights["experts"].cpu / shares.per_block
    return min(1.0, shares.experts_in_place / in_memory) if in_memory > 0 else 0.0


def _placement(gpu: float, cpu: float, disk: float) -> Placement:
    least = SOLVER_TOLERANCE * (gpu + cpu + disk)
    parts = [part if part > least else 0.0 for part in (gpu, cpu, disk)]
    total = sum(parts)
    return Placement(gpu=parts[0] / total, cpu=parts[1] / total, disk=parts[2] / total)
