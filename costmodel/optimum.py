"""Find the policy: enumerate what is not linear, solve what is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from costmodel.fitting import MAX_BLOCK_SIZE, fit_all, fits_alone
from costmodel.memory import with_capacities
from costmodel.model_spec import ModelSpec
from costmodel.policy import Policy, Prediction
from costmodel.price import check_work, estimate
from costmodel.problem import Problem
from costmodel.program import Infeasible, Solution, shortage_of, solve
from costmodel.workload import Workload
from profiles.errors import InfeasibleError
from profiles.hardware import HardwareProfile
from profiles.units import GIB

# A matrix product needs no more rows than these to run at its best.
PREFILL_ROWS = (2048, 512)
# Differences in predicted throughput below this are not to be trusted.
NEARLY_AS_FAST = 0.01
# Shares of a tier's capacity to advise beyond what is missing: the first that rounding can use.
ADVICE_MARGINS = (0.001, 0.02, 0.1, 0.5)


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
    best = _best_rounded(candidates, hardware, max_latency_s)
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
    candidates: Iterable[_Candidate], hardware: HardwareProfile, max_latency_s: float | None
) -> tuple[float, Policy, Solution] | None:
    """Round candidates in the order of their bounds until none comes near the best so far.

    Of the policies that are predicted nearly as fast as the best, the one whose channels have
    the least to do is taken: what the model leaves out, it suffers least from.
    """
    found: list[tuple[float, Policy, Solution]] = []
    best = 0.0
    for candidate in candidates:
        # Bounds hold for full blocks; a job whose last block is partly filled is never faster.
        if candidate.bound_tok_per_s <= best * (1 - NEARLY_AS_FAST):
            break
        problem, relaxed = candidate.problem, candidate.relaxed
        for policy, solution in fit_all(problem, relaxed, max_latency_s=max_latency_s):
            found.append((job_throughput(policy, hardware), policy, solution))
        best = max((rate for rate, _, _ in found), default=0.0)
    near = [entry for entry in found if entry[0] >= best * (1 - NEARLY_AS_FAST)]
    return min(near, key=lambda entry: _busy_s(entry[1], hardware), default=None)


def _busy_s(policy: Policy, hardware: HardwareProfile) -> float:
    """Busy seconds of all channels together, per sequence of the block."""
    return sum(estimate(policy, hardware).channel_s.values()) / policy.block_size


def _reason_of(smallest: Problem, max_latency_s: float | None) -> InfeasibleError:
    """Say why not even a block of one sequence can be had."""
    try:
        alone = solve(smallest, max_block_size=1, block_size=1)
    except Infeasible:
        pass
    else:
        if max_latency_s is not None and alone.latency_per_sequence_s > max_latency_s * 0.999:
            return InfeasibleError(
                f"nothing keeps --max-latency {max_latency_s:g}s: a block of one sequence takes at"
                f" least {alone.latency_per_sequence_s:.4g} s; try a longer one, or more memory"
            )
    for margin in ADVICE_MARGINS:
        shortage = shortage_of(smallest, margin=margin)
        hardware = with_capacities(smallest.hardware, shortage.budget_bytes)
        if fits_alone(replace(smallest, hardware=hardware), max_latency_s=max_latency_s):
            break
    return InfeasibleError(str(shortage))


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
        sizes = {_even_part(gpu_batch_size, rows // workload.prompt_len) for rows in PREFILL_ROWS}
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


def _even_part(size: int, most: int) -> int:
    """Return the largest of the equal parts, at most ``most`` each, that ``size`` is dealt into."""
    return -(-size // -(-size // max(1, most)))


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


def _batch_sizes(workload: Workload) -> list[int]:
    """Powers of two and the sizes between them, and those that divide the prompts evenly."""
    most = min(workload.num_prompts or MAX_BLOCK_SIZE, MAX_BLOCK_SIZE)
    powers = [2**i for i in range(most.bit_length())]
    sizes = {*powers, *(3 * p // 2 for p in powers if p > 1)}
    if workload.num_prompts is not None:
        sizes |= {-(-workload.num_prompts // parts) for parts in range(1, 9)}
    return sorted(size for size in sizes if size <= most)
