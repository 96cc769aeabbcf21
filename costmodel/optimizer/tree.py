"""Branch and bound over problems and block sizes.

An open problem is solved with its block size free: the optimum bounds all of its policies. The
problem with the best bound comes first. Its open choices are closed, or its range of block sizes is
split at the optimum's. The search ends when no remaining bound beats the best policy found.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from costmodel.optimizer.choices import MAX_BLOCK_SIZE, decide
from costmodel.optimizer.fitting import fit
from costmodel.optimizer.found import Found
from costmodel.optimizer.job_throughput import job_throughput
from costmodel.optimizer.program import Limits, Program, Solution, of_blocks
from costmodel.optimizer.rows import RowTable
from costmodel.optimizer.solver import Infeasible
from costmodel.optimizer.waits import with_slowdown, with_waits
from costmodel.pricing.experts import experts_of
from costmodel.pricing.problem import Problem

# Predictions are not exact enough for smaller differences in throughput.
NEARLY_AS_FAST = 0.005
# Waits of a mixture's schedule beside a GPU take up to a third of its time.
SLACK_OF_WAITS = 0.25
# After so many splits, the search no longer looks for policies that are nearly as fast as the best;
# after ``MAX_SPLITS`` it ends, and its gap is reported.
ENOUGH_SPLITS = 32
MAX_SPLITS = 160


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """A range of block sizes of one problem. Nodes are ordered by their bound, the least first."""

    seconds: float
    index: int
    program: Program = field(compare=False)
    fewest: int = field(compare=False)
    most: int = field(compare=False)
    solution: Solution = field(compare=False)

    @property
    def problem(self) -> Problem:
        """The problem of these block sizes."""
        return self.program.problem

    @property
    def wanted(self) -> float:
        """Batches in the block of the relaxed optimum, not rounded."""
        inverse = self.solution.shares.per_block * self.problem.gpu_batch_size
        return float(min(max(1 / inverse, self.fewest), self.most))


class Tree:
    """Best-first branch and bound over problems and block sizes.

    With ``is_choosy``, the search also looks for policies that are nearly as fast as the best, and
    chooses among them. With ``counts_waits``, and a mixture of experts beside a GPU, that is by the
    waits of their schedules, which the program does not know.
    """

    def __init__(
        self, max_latency_s: float | None, *, is_choosy: bool = True, counts_waits: bool = True
    ) -> None:
        self.max_latency_s = max_latency_s
        self._is_choosy = is_choosy
        self._counts_waits = counts_waits
        # How much slower than the best by its limits a policy may be, that is looked for.
        self._slack = NEARLY_AS_FAST
        self.found: list[Found] = []
        # No policy takes fewer seconds per sequence than this.
        self.bound_s = math.inf
        self._open: list[Node] = []
        self._count = itertools.count()

    @property
    def best_s(self) -> float:
        """Seconds per sequence of the best policy found."""
        return min((found.seconds for found in self.found), default=math.inf)

    def begin_with(self, problem: Problem, table: RowTable, num_gpu_batches: int) -> None:
        """Begin with the best policy of one block size, which others must beat."""
        problem = of_blocks(problem, (num_gpu_batches, num_gpu_batches))
        self._round(Program(problem, table), num_gpu_batches)

    def plant(
        self, problems: Iterable[Problem], table: RowTable, block_size: int | None = None
    ) -> None:
        """Add problems, and search them until none can beat the best policy.

        With ``block_size``, blocks have that many sequences. Problems whose batches do not divide
        it are left out.
        """
        for problem in problems:
            if self._counts_waits and problem.hardware.has_gpu and "experts" in problem.components:
                self._slack = SLACK_OF_WAITS
            if block_size is None:
                self.add(problem, table, 1, _most_batches(problem))
            elif block_size % problem.gpu_batch_size == 0:
                num_batches = block_size // problem.gpu_batch_size
                self.add(problem, table, num_batches, num_batches)
        self.grow()

    def add(self, problem: Problem, table: RowTable, fewest: int, most: int) -> None:
        """Solve for a range of batches in the block, and keep it where something fits."""
        if fewest > most:
            return
        places, loads = 1.0, 1.0
        if fewest == most:
            places, loads = _of_job(problem, fewest)
        if self.max_latency_s is not None:
            # The limit is for a full block, which loads the weights once. The bound then ignores a
            # partly filled last block.
            loads = 1.0
        program = Program(of_blocks(problem, (fewest, most), loads), table)
        batch = problem.gpu_batch_size
        limits = Limits(
            block_sizes=(fewest * batch, most * batch), max_latency_s=self.max_latency_s
        )
        try:
            solution = program.solve(limits)
        except Infeasible:
            return
        node = Node(
            places * solution.bound_per_sequence_s,
            next(self._count),
            program,
            fewest,
            most,
            solution,
        )
        heapq.heappush(self._open, node)

    def grow(self) -> None:
        """Split the best range until no bound left is as good as the best policy, or nearly so."""
        count = 0
        while True:
            goes_on = self._is_choosy and count < ENOUGH_SPLITS
            slack = self._slack if goes_on else -NEARLY_AS_FAST
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
                self._round(node.program, node.fewest)
            else:
                self._split(node)
        open_s = self._open[0].seconds if self._open else math.inf
        self.bound_s = min(self.bound_s, open_s, self.best_s)

    def _decide(self, node: Node) -> None:
        for problem in decide(node.problem):
            self._add_child(node, node.fewest, node.most, problem)

    def _add_child(
        self, node: Node, fewest: int, most: int, problem: Problem | None = None
    ) -> None:
        self.add(problem or node.problem, node.program.table, fewest, most)

    def _split(self, node: Node) -> None:
        """Split a range at the block size of the relaxed optimum, which is a range of its own.

        With experts, a wide range is halved first: the rows of their products grow with the block,
        and the bound of a range uses the rates of its largest block.
        """
        if "experts" in node.problem.components and node.most >= 2 * node.fewest:
            middle = 1 << round(math.log2(node.fewest * node.most) / 2 + 0.5)
            middle = min(max(middle, node.fewest + 1), node.most)
            self._add_child(node, node.fewest, middle - 1)
            self._add_child(node, middle, node.most)
            return
        here, above = _useful_counts(node.problem, math.floor(node.wanted * (1 + 1e-9)))
        self._add_child(node, here, here)
        self._add_child(node, node.fewest, here - 1)
        self._add_child(node, max(above, node.fewest), node.most)

    def _round(self, program: Program, num_gpu_batches: int) -> None:
        fitted = fit(program, num_gpu_batches, max_latency_s=self.max_latency_s)
        if fitted is not None:
            policy, solution = fitted
            rate = job_throughput(policy, program.problem.hardware)
            self.found.append(Found(rate, policy, program, solution))

    def choose(self) -> Found:
        """Return the policy with the least work, of those that are nearly as fast as the best.

        Effects that the model leaves out slow that policy down least.
        """
        found = self.found
        if self._slack == SLACK_OF_WAITS:
            found = with_waits(found, self.max_latency_s)
        best = max(each.predicted_tok_per_s for each in found)
        least = best * (1 - NEARLY_AS_FAST) if self._is_choosy else best
        near = [each for each in found if each.predicted_tok_per_s >= least]
        chosen = min(near, key=lambda each: each.busy_s)
        if not self._counts_waits or chosen.slowdown > 1:
            return chosen
        return with_slowdown(chosen)

    @property
    def fastest(self) -> Found:
        """The fastest policy by its limits."""
        return max(self.found, key=lambda found: found.tok_per_s)


def _most_batches(problem: Problem) -> int:
    """Return the most batches in a block that the job can fill without an empty batch."""
    num_prompts, batch = problem.workload.num_prompts, problem.gpu_batch_size
    most = -(-(num_prompts or MAX_BLOCK_SIZE) // batch)
    # Batches share the sequences evenly, so that the last batch may leave too few for each.
    if num_prompts is not None and batch > -(-num_prompts // most):
        return most - 1
    return most


def _useful_counts(problem: Problem, num_gpu_batches: int) -> tuple[int, int]:
    """Return the fewest batches that do the job in as many blocks as this number, and the fewest
    that do it in one block less."""
    num_prompts, batch = problem.workload.num_prompts, problem.gpu_batch_size
    if num_prompts is None:
        return num_gpu_batches, num_gpu_batches + 1
    num_blocks = -(-num_prompts // (batch * num_gpu_batches))
    here = -(-num_prompts // (batch * num_blocks))
    if num_blocks == 1:
        return here, num_prompts + 1
    return here, -(-num_prompts // (batch * (num_blocks - 1)))


def _of_job(problem: Problem, num_gpu_batches: int) -> tuple[float, float]:
    """Return a job's places in blocks for each of its prompts, and its loads of the weights for
    each full block's worth of places.

    The last block's batches have equal sizes, so that some of its places may be empty.
    """
    num_prompts, batch = problem.workload.num_prompts, problem.gpu_batch_size
    if num_prompts is None:
        return 1.0, 1.0
    block_size = batch * num_gpu_batches
    num_full, left = divmod(num_prompts, block_size)
    if not left:
        return 1.0, 1.0
    num_batches = -(-left // batch)
    last = num_batches * -(-left // num_batches)
    places = num_full * block_size + last
    # Fewer tokens need fewer experts.
    of_last = 1.0
    if problem.loads_on_demand:
        skew = problem.workload.expert_skew
        of_last = min(
            e.touched(last, skew, rarest) / e.touched(block_size, skew, rarest)
            for e, _, _ in experts_of(problem)
            for rarest in (problem.rarest_on_disk, problem.rarest_off_gpu)
        )
    return places / num_prompts, (num_full + of_last) * block_size / places
