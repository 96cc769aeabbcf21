"""Find the policy: enumerate what is not linear, solve what is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from costmodel.memory import capacities
from costmodel.model_spec import ModelSpec
from costmodel.policy import Placement, Policy, Prediction
from costmodel.price import check_work, estimate
from costmodel.problem import Problem, Shares
from costmodel.program import Infeasible, Solution, shortage_of, solve
from costmodel.rounding import round_policy
from costmodel.workload import Workload
from profiles.errors import InfeasibleError
from profiles.hardware import HardwareProfile
from profiles.units import GIB

# Without a number of prompts, a block may be this large.
MAX_BLOCK_SIZE = 4096
# A matrix product needs no more rows than these to run at its best.
PREFILL_ROWS = (2048, 512)
# A candidate that cannot gain this share over the best so far is not worth rounding.
LEAST_GAIN = 1e-3
# Rounding to rows may overshoot a capacity; the next attempt leaves that much free.
ROUNDING_ATTEMPTS = 8
# Where only whole rows do not fit, this share of a tier's capacity more will do.
ROUNDING_MARGIN = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The best policy found, and how good any policy could be.

    Parameters
    ----------
    policy
        Rounded to what can be executed, with its prediction.
    job_tok_per_s
        Throughput over all prompts, a partly filled last block included.
    bound_tok_per_s
        No policy of the batch sizes tried exceeds this throughput on full blocks.
    solution
        The linear program's optimum at the policy's block size, with its duals.
    """

    policy: Policy
    job_tok_per_s: float
    bound_tok_per_s: float
    solution: Solution

    @property
    def predicted(self) -> Prediction:
        """The policy's prediction."""
        assert self.policy.predicted is not None
        return self.policy.predicted

    @property
    def gap(self) -> float:
        """How far below the bound the rounded policy is over the job, as a fraction of it."""
        return 1 - self.job_tok_per_s / self.bound_tok_per_s


@dataclass(frozen=True, slots=True)
class _Candidate:
    problem: Problem
    relaxed: Solution

    @property
    def bound_tok_per_s(self) -> float:
        return self.problem.workload.gen_len / self.relaxed.bound_per_sequence_s


def search(
    hardware: HardwareProfile,
    model: ModelSpec,
    workload: Workload,
    *,
    max_latency_s: float | None = None,
) -> SearchResult:
    """Return the policy with the highest predicted throughput over the whole job.

    Raises
    ------
    InfeasibleError
        When nothing fits: which tier is short, by how many bytes, and what would do.
    """
    check_work(model, workload, hardware)
    candidates = list(_relax_all(hardware, model, workload, max_latency_s))
    candidates.sort(key=lambda candidate: -candidate.bound_tok_per_s)
    best = _best_rounded(candidates, max_latency_s)
    if best is None:
        raise _reason_of(_problem(hardware, model, workload, 1, 1, in_place=True), max_latency_s)
    rate, policy, solution = best
    return SearchResult(
        policy=replace(
            policy,
            hardware=replace(hardware, measurements=()),
            predicted=estimate(policy, hardware),
        ),
        job_tok_per_s=rate,
        bound_tok_per_s=candidates[0].bound_tok_per_s,
        solution=solution,
    )


def _best_rounded(
    candidates: Iterable[_Candidate], max_latency_s: float | None
) -> tuple[float, Policy, Solution] | None:
    """Round candidates in the order of their bounds until none can beat the best so far."""
    best: tuple[float, Policy, Solution] | None = None
    for candidate in candidates:
        # Bounds hold for full blocks; a job whose last block is partly filled is never faster.
        if best is not None and candidate.bound_tok_per_s <= best[0] * (1 + LEAST_GAIN):
            break
        for policy, solution in _round_all(candidate, max_latency_s):
            rate = job_throughput(policy, candidate.problem.hardware)
            if best is None or rate > best[0]:
                best = (rate, policy, solution)
    return best


def _reason_of(smallest: Problem, max_latency_s: float | None) -> InfeasibleError:
    """Say why not even a block of one sequence can be had."""
    try:
        alone = solve(smallest, max_block_size=1, block_size=1)
    except Infeasible:
        return shortage_of(smallest)
    if max_latency_s is not None and alone.latency_per_sequence_s > max_latency_s * 0.999:
        return InfeasibleError(
            f"nothing keeps --max-latency {max_latency_s:g}s: a block of one sequence takes at"
            f" least {alone.latency_per_sequence_s:.4g} s; try a longer one, or more memory"
        )
    return shortage_of(smallest, margin=ROUNDING_MARGIN)


def job_throughput(policy: Policy, hardware: HardwareProfile) -> float:
    """Return token/s over all prompts, the last and partly filled block included."""
    num_prompts = policy.workload.num_prompts or policy.block_size
    latency_s = 0.0
    if num_full := num_prompts // policy.block_size:
        latency_s += num_full * estimate(policy, hardware).latency_s
    if last := _last_block(policy, num_prompts % policy.block_size):
        latency_s += estimate(last, hardware).latency_s
    return num_prompts * policy.workload.gen_len / latency_s


def blocks_of(policy: Policy) -> Iterator[Policy]:
    """Yield the policy of every block of a job: the last one has only the batches it needs."""
    num_prompts = policy.workload.num_prompts or policy.block_size
    for _ in range(num_prompts // policy.block_size):
        yield policy
    if last := _last_block(policy, num_prompts % policy.block_size):
        yield last


def _last_block(policy: Policy, num_sequences: int) -> Policy | None:
    """Return the policy of a partly filled block, which deals its sequences out evenly."""
    if not num_sequences:
        return None
    num_gpu_batches = -(-num_sequences // policy.gpu_batch_size)
    size = -(-num_sequences // num_gpu_batches)
    return replace(
        policy,
        gpu_batch_size=size,
        prefill_batch_size=min(policy.prefill_batch_size, size),
        num_gpu_batches=num_gpu_batches,
    )


def shadow_price(solution: Solution, problem: Problem, tier: str, capacity: int) -> float:
    """Return token/s that one GiB more of a tier is worth, at the solution's block size.

    A capacity row reads ``use * batch / capacity <= per_block * batch``, so its dual is seconds
    per sequence for one unit of that; d(throughput) = -throughput^2 / gen_len * d(latency).
    """
    prefix = f"capacity.{tier}."
    dual = sum(value for name, value in solution.duals.items() if name.startswith(prefix))
    unit = solution.shares.per_block * problem.gpu_batch_size * GIB / max(capacity, 1)
    gen_len = problem.workload.gen_len
    return float(max(0.0, -dual) * unit * gen_len / solution.latency_per_sequence_s**2)


def _relax_all(
    hardware: HardwareProfile, model: ModelSpec, workload: Workload, max_latency_s: float | None
) -> Iterable[_Candidate]:
    for gpu_batch_size in _batch_sizes(workload):
        sizes = {min(gpu_batch_size, max(1, rows // workload.prompt_len)) for rows in PREFILL_ROWS}
        for prefill_batch_size in sorted(sizes):
            for in_place in (True, False):
                problem = _problem(
                    hardware, model, workload, gpu_batch_size, prefill_batch_size,
                    in_place=in_place,
                )  # fmt: skip
                try:
                    relaxed = solve(
                        problem,
                        # A last batch that is partly empty only costs: the bound needs no more.
                        max_block_size=workload.num_prompts or MAX_BLOCK_SIZE,
                        max_latency_s=max_latency_s,
                    )
                except Infeasible:
                    continue
                yield _Candidate(problem, relaxed)


def _problem(
    hardware: HardwareProfile,
    model: ModelSpec,
    workload: Workload,
    gpu_batch_size: int,
    prefill_batch_size: int,
    *,
    in_place: bool,
) -> Problem:
    return Problem(
        hardware=hardware,
        model=model,
        workload=workload,
        gpu_batch_size=gpu_batch_size,
        prefill_batch_size=prefill_batch_size,
        in_place=in_place,
    )


def _max_batches(problem: Problem) -> int:
    num_prompts = problem.workload.num_prompts
    if num_prompts is None:
        return max(1, MAX_BLOCK_SIZE // problem.gpu_batch_size)
    return -(-num_prompts // problem.gpu_batch_size)


def _batch_sizes(workload: Workload) -> list[int]:
    """Powers of two and the sizes between them, and those that divide the prompts evenly."""
    most = min(workload.num_prompts or MAX_BLOCK_SIZE, MAX_BLOCK_SIZE)
    powers = [2**i for i in range(most.bit_length())]
    sizes = {*powers, *(3 * p // 2 for p in powers if p > 1)}
    if workload.num_prompts is not None:
        sizes |= {-(-workload.num_prompts // parts) for parts in range(1, 9)}
    return sorted(size for size in sizes if size <= most)


def _round_all(
    candidate: _Candidate, max_latency_s: float | None
) -> Iterable[tuple[Policy, Solution]]:
    """Round the block size to either side, and to what fills the last block; then the rest."""
    batch = candidate.problem.gpu_batch_size
    num_prompts = candidate.problem.workload.num_prompts
    most = _max_batches(candidate.problem)
    wanted = 1 / (candidate.relaxed.shares.per_block * batch)
    counts = {math.floor(wanted), math.ceil(wanted), round(0.9 * wanted)}
    if num_prompts is not None:
        num_blocks = max(1, round(num_prompts / (batch * wanted)))
        counts |= {-(-num_prompts // (batch * n)) for n in (num_blocks, num_blocks + 1)}
    tries = sorted({min(max(1, count), most) for count in counts})
    found = [_fit(candidate.problem, count, max_latency_s) for count in tries]
    smaller = tries[0] // 2
    while smaller and not any(found):
        # Where memory is tight, the relaxed block can be far too large.
        found.append(_fit(candidate.problem, smaller, max_latency_s))
        smaller //= 2
    return [pair for pair in found if pair is not None]


def _fit(
    problem: Problem, num_gpu_batches: int, max_latency_s: float | None
) -> tuple[Policy, Solution] | None:
    """Solve at a fixed block size and round; where the rounded policy overshoots a capacity,
    leave that much free and solve again.

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
        policy = _policy_of(problem, num_gpu_batches, solution.shares)
        policy = round_policy(policy, has_gpu=problem.hardware.has_gpu)
        predicted = estimate(policy, problem.hardware)
        overshoot = _overshoot(predicted, problem.hardware)
        lateness = predicted.latency_s / max_latency_s if max_latency_s else 0.0
        if not overshoot and lateness <= 1:
            return policy, solution
        for tier, num_bytes in overshoot.items():
            # Twice as much each time: a little less may round to the same rows.
            reserve[tier] = reserve.get(tier, 0) + (num_bytes << attempt)
        if limit_s is not None and lateness > 1:
            limit_s *= (1 - 1e-6) / lateness
    return None


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
