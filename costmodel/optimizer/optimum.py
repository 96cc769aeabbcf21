"""Find the policy: enumerate what is not linear, solve what is, branch on the block size.

Every problem is solved with its block size free: the optimum bounds all of its policies. The
problem with the best bound is then taken first, and its range of block sizes split at the one
it wants, until what is left cannot be better than the best policy found.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from costmodel.model.layout import model_layers
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import (
    DEFAULT_PERMITTED,
    MAX_BLOCK_SIZE,
    Permitted,
    check_permitted,
    decide,
    open_problems,
    problems_of,
    smallest_problem,
)
from costmodel.optimizer.fitting import fit
from costmodel.optimizer.job_throughput import job_throughput
from costmodel.optimizer.program import Limits, Program, Solution, solve
from costmodel.optimizer.shortage import shortage_of
from costmodel.optimizer.solver import Infeasible
from costmodel.plan.policy import Policy, Prediction
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import capacities, with_capacities
from costmodel.pricing.price import check_work, estimate
from costmodel.pricing.problem import Problem
from profiles.errors import InfeasibleError
from profiles.hardware import HardwareProfile

# Share of every capacity that is left free, unless the user asks for another.
DEFAULT_MARGIN = 0.01
# Differences in predicted throughput below this are not to be trusted.
NEARLY_AS_FAST = 0.005
# Splits after which policies that are only as good as the best are no longer looked for, and after
# which the best is taken as it is; its gap is reported.
ENOUGH_SPLITS = 32
MAX_SPLITS = 160
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
        No policy of the batch sizes tried exceeds this throughput, whatever its placement.
    margin
        Share of every capacity that was left free.
    problem, solution
        What was enumerated, with the capacities less the margin, and the program's optimum at
        the policy's block size, with its duals.
    """

    policy: Policy
    job_tok_per_s: float
    bound_tok_per_s: float
    margin: float
    problem: Problem
    solution: Solution

    @property
    def predicted(self) -> Prediction:
        """The policy's prediction."""
        assert self.policy.predicted is not None
        return self.policy.predicted

    @property
    def hardware(self) -> HardwareProfile:
        """The machine that the policy uses: without its GPU, where that is better."""
        assert self.policy.hardware is not None
        return self.policy.hardware

    @property
    def gap(self) -> float:
        """How far below the bound the rounded policy is over the job, as a fraction of it."""
        return 1 - self.job_tok_per_s / self.bound_tok_per_s


@dataclass(frozen=True, slots=True, order=True)
class _Node:
    """A range of block sizes of one problem, by its bound: the best is the smallest."""

    seconds: float
    index: int
    program: Program = field(compare=False)
    fewest: int = field(compare=False)
    most: int = field(compare=False)
    solution: Solution = field(compare=False)

    @property
    def problem(self) -> Problem:
        """The problem whose block sizes these are."""
        return self.program.problem

    @property
    def wanted(self) -> float:
        """Batches in the block of the relaxed optimum."""
        inverse = self.solution.shares.per_block * self.problem.gpu_batch_size
        return float(min(max(1 / inverse, self.fewest), self.most))


@dataclass(frozen=True, slots=True)
class _Found:
    tok_per_s: float
    policy: Policy
    problem: Problem
    solution: Solution

    @property
    def seconds(self) -> float:
        """Seconds per sequence of the job."""
        return self.problem.workload.gen_len / self.tok_per_s

    @property
    def busy_s(self) -> float:
        """Busy seconds of all channels together, per sequence of the block."""
        busy = estimate(self.policy, self.problem.hardware).channel_s
        return sum(busy.values()) / self.policy.block_size


def search(
    hardware: HardwareProfile,
    model: ModelSpec,
    workload: Workload,
    *,
    max_latency_s: float | None = None,
    margin: float = DEFAULT_MARGIN,
    permitted: Permitted = DEFAULT_PERMITTED,
) -> SearchResult:
    """Return the policy with the highest predicted throughput over the whole job.

    Parameters
    ----------
    max_latency_s
        Limit on the latency of one block.
    margin
        Share of every capacity that is left free.
    permitted
        What it may choose among that changes a model's outputs.

    Raises
    ------
    InfeasibleError
        When nothing fits: which tier is short, by how many bytes, and what would do.
    """
    check_work(model, workload, hardware)
    check_permitted(permitted, hardware)
    usable = {tier: math.floor(c * (1 - margin)) for tier, c in capacities(hardware).items()}
    machine = with_capacities(hardware, usable)
    tree = _Tree(max_latency_s)
    tree.plant(open_problems(machine, model, workload, permitted))
    if machine.has_gpu and not machine.is_emulated:
        # A GPU with little memory can be worse than none; seldom is it worth asking.
        alone = with_capacities(machine, {"gpu": 0})
        if _least_seconds(alone, model, workload) < tree.best_s:
            tree.plant(open_problems(alone, model, workload, permitted))
    if not tree.found:
        smallest = smallest_problem(hardware, model, workload, permitted)
        raise _reason_of(
            smallest, problems_of(machine, model, workload, permitted), max_latency_s, margin
        )
    best = tree.choose()
    used = hardware if best.problem.hardware.has_gpu else with_capacities(hardware, {"gpu": 0})
    return SearchResult(
        policy=replace(
            best.policy,
            hardware=replace(used, measurements=()),
            predicted=estimate(best.policy, used),
        ),
        job_tok_per_s=best.tok_per_s,
        bound_tok_per_s=workload.gen_len / tree.bound_s,
        margin=margin,
        problem=best.problem,
        solution=best.solution,
    )


def _least_seconds(hardware: HardwareProfile, model: ModelSpec, workload: Workload) -> float:
    """Return what one sequence takes at least on a machine: its products at the best rate."""
    flop = 0
    for number, layout in enumerate(model_layers(model)[1 : model.num_layers + 1]):
        experts = model.layer(number).experts
        for component in layout.components:
            used = experts.experts_per_token if experts and component.num_units > 1 else 1
            flop += 2 * component.unit_elements * used
    tokens = workload.prompt_len + workload.gen_len - 1
    return flop * tokens / hardware.compute.matmul[model.dtype].peak


class _Tree:
    """Best-first branch and bound over problems and block sizes."""

    def __init__(self, max_latency_s: float | None) -> None:
        self.max_latency_s = max_latency_s
        self.found: list[_Found] = []
        # No policy takes fewer seconds per sequence than this.
        self.bound_s = math.inf
        self._open: list[_Node] = []
        self._count = itertools.count()

    @property
    def best_s(self) -> float:
        """Seconds per sequence of the best policy found."""
        return min((found.seconds for found in self.found), default=math.inf)

    def plant(self, problems: Iterable[Problem]) -> None:
        """Take up problems, and search them as far as they can better what was found."""
        for problem in problems:
            self.add(Program(problem), 1, _most_batches(problem))
        self.grow()

    def add(self, program: Program, fewest: int, most: int) -> None:
        """Solve for a range of batches in the block and keep it, unless nothing fits there."""
        if fewest > most:
            return
        # A limit holds for a full block, which loads the weights once; the bound is then that of
        # jobs without a partly filled block.
        loads = program.problem.loads_per_block
        if fewest == most and self.max_latency_s is None:
            loads = _loads_per_block(program.problem, fewest)
        program = program.of_blocks((fewest, most), loads)
        batch = program.problem.gpu_batch_size
        limits = Limits(
            block_sizes=(fewest * batch, most * batch), max_latency_s=self.max_latency_s
        )
        try:
            solution = program.solve(limits)
        except Infeasible:
            return
        node = _Node(
            solution.bound_per_sequence_s, next(self._count), program, fewest, most, solution
        )
        heapq.heappush(self._open, node)

    def grow(self) -> None:
        """Split the best range until all that is left is worse than the best policy found, by so
        much that it is no choice either."""
        count = 0
        while True:
            slack = NEARLY_AS_FAST if count < ENOUGH_SPLITS else -NEARLY_AS_FAST
            if not self._open or self._open[0].seconds >= self.best_s * (1 + slack):
                break
            if self.found and count >= MAX_SPLITS:
                break
            node = heapq.heappop(self._open)
            if node.problem.is_open:
                self._decide(node)
                continue
            count += 1
            if node.fewest == node.most:
                self.bound_s = min(self.bound_s, node.seconds)
                self._round(node)
            else:
                self._split(node)
        open_s = self._open[0].seconds if self._open else math.inf
        self.bound_s = min(self.bound_s, open_s, self.best_s)

    def _decide(self, node: _Node) -> None:
        for problem in decide(node.problem):
            self.add(Program(problem), node.fewest, node.most)

    def _split(self, node: _Node) -> None:
        """Take the block size that the relaxed optimum wants, and what is below and above it."""
        here, above = _useful_counts(node.problem, math.floor(node.wanted * (1 + 1e-9)))
        self.add(node.program, here, here)
        self.add(node.program, node.fewest, here - 1)
        self.add(node.program, max(above, node.fewest), node.most)

    def _round(self, node: _Node) -> None:
        fitted = fit(node.program, node.fewest, max_latency_s=self.max_latency_s)
        if fitted is not None:
            policy, solution = fitted
            rate = job_throughput(policy, node.problem.hardware)
            self.found.append(_Found(rate, policy, node.problem, solution))

    def choose(self) -> _Found:
        """Of the policies predicted nearly as fast as the best, return the one whose channels
        have the least to do: what the model leaves out, it suffers least from."""
        best = max(found.tok_per_s for found in self.found)
        near = [f for f in self.found if f.tok_per_s >= best * (1 - NEARLY_AS_FAST)]
        return min(near, key=lambda found: found.busy_s)


def _most_batches(problem: Problem) -> int:
    """Return the most batches in a block that the job can fill, none of them left empty."""
    num_prompts, batch = problem.workload.num_prompts, problem.gpu_batch_size
    most = -(-(num_prompts or MAX_BLOCK_SIZE) // batch)
    # Sequences are dealt out evenly: the last batch may leave too few for each.
    if num_prompts is not None and batch > -(-num_prompts // most):
        return most - 1
    return most


def _useful_counts(problem: Problem, num_gpu_batches: int) -> tuple[int, int]:
    """Return the least number of batches that does the job in as many blocks as this one, and
    the least that does it in one block less."""
    num_prompts, batch = problem.workload.num_prompts, problem.gpu_batch_size
    if num_prompts is None:
        return num_gpu_batches, num_gpu_batches + 1
    num_blocks = -(-num_prompts // (batch * num_gpu_batches))
    here = -(-num_prompts // (batch * num_blocks))
    if num_blocks == 1:
        return here, num_prompts + 1
    return here, -(-num_prompts // (batch * (num_blocks - 1)))


def _loads_per_block(problem: Problem, num_gpu_batches: int) -> float:
    """Loads of the weights that a full block's share of the job pays for."""
    num_prompts = problem.workload.num_prompts
    if num_prompts is None:
        return 1.0
    block_size = problem.gpu_batch_size * num_gpu_batches
    return max(1.0, -(-num_prompts // block_size) * block_size / num_prompts)


def _reason_of(
    smallest: Problem, problems: Iterable[Problem], max_latency_s: float | None, margin: float
) -> InfeasibleError:
    """Say why not even a block of one sequence can be had."""
    hardware = smallest.hardware
    least_s = min((_latency_alone(p) for p in problems if p.gpu_batch_size == 1), default=math.inf)
    if max_latency_s is not None and math.inf > least_s > max_latency_s * 0.999:
        return InfeasibleError(
            f"nothing keeps --max-latency {max_latency_s:g}s: a block of one sequence takes at"
            f" least {least_s:.4g} s; try a longer one, or more memory"
        )
    for share in ADVICE_MARGINS:
        shortage = shortage_of(smallest, margin=share + margin)
        roomier = with_capacities(hardware, shortage.budget_bytes)
        usable = {t: math.floor(c * (1 - margin)) for t, c in capacities(roomier).items()}
        enough = replace(smallest, hardware=with_capacities(roomier, usable))
        if fit(Program(enough), 1, max_latency_s=max_latency_s) is not None:
            break
    return InfeasibleError(str(shortage))


def _latency_alone(problem: Problem) -> float:
    """Return the least seconds of a block of one sequence; infinity where it does not fit."""
    try:
        return solve(problem, Limits(block_sizes=(1, 1))).latency_per_sequence_s
    except Infeasible:
        return math.inf
