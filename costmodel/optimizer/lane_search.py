"""The search over policies with lanes: how many, with how much cache, and the weights beside it.

For each choice of lanes, cache and rows, the program places the weights. The job is then simulated,
because its start and its end may be half of it. The choices are tried coarsely, and then near the
best one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import MAX_BLOCK_SIZE, Permitted
from costmodel.optimizer.fitting import fit
from costmodel.optimizer.lane_bound import least_seconds
from costmodel.optimizer.program import Limits, Program, Solution
from costmodel.optimizer.rows import RowTable
from costmodel.optimizer.solver import Infeasible
from costmodel.plan.lane_cache import pool_tokens
from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import LanePolicy, Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.lane_price import job_seconds
from costmodel.pricing.problem import Problem
from costmodel.schedule.job_trace import JobTrace
from profiles.hardware import HardwareProfile

# Sizes of the cache, see ``pool_tokens``.
DEVIATIONS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0, math.inf)
# Rows of prompts that begin together, where the longest prompt leaves room for them.
PROMPT_ROWS = (0, 512, 2048, 8192, 32768)
CHUNK_ROWS = (64, 128, 256, 512, 2048)
NUM_BATCHES = (1, 2, 4)
FACTORS = (0.75, 0.87, 0.95, 1.0, 1.06, 1.15, 1.33)
# Rounds of steps near the best choice.
MOST_ROUNDS = 3
# A cache on disk is taken where a job is faster by more than this: it moves more, in smaller parts,
# than weights do.
WORTH_OF_STAGING = 0.1
# A smaller share of the cache on disk is none.
LEAST_SHARE = 1e-6
# A smaller gain is none.
LEAST_GAIN = 1e-3


@dataclass(frozen=True, slots=True)
class Choice:
    """What is enumerated: ``lanes`` in ``num_batches``, and an entry of each list above."""

    lanes: int
    deviations: float = 1.0
    prompt_rows: int = 2048
    chunk_rows: int = 512
    num_batches: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundLanes:
    """A policy that fits, and the seconds of its job."""

    seconds: float
    policy: Policy
    problem: Problem
    solution: Solution


class LaneSearch:
    """The search for the fastest policy with lanes on a machine without a GPU.

    Parameters
    ----------
    machine
        Its capacities are filled to the last byte.
    workload
        The job; without lengths, all are as long as the longest.
    """

    def __init__(self, machine: HardwareProfile, model: ModelSpec, workload: Workload) -> None:
        self._machine, self._model, self._workload = machine, model, workload
        self.lengths: Lengths = workload.sketch(MAX_BLOCK_SIZE).lengths()
        self._table = RowTable(machine)
        self._traces: dict[tuple[int, ...], JobTrace] = {}
        self._tried: dict[tuple[Hashable, Choice], FoundLanes | None] = {}
        self._best: FoundLanes | None = None
        self._choice: Choice | None = None
        self._begin: Choice | None = None
        # No policy is faster than this.
        self.bound_s = math.inf

    def begin_like(self, other: LaneSearch) -> None:
        """Look only near the best choice of a search on a similar machine."""
        self._begin, self._traces = other._choice, other._traces

    def run(self, permitted: Permitted) -> FoundLanes | None:
        """Return the fastest policy of all that this and earlier calls permit; ``None`` where
        nothing fits."""
        problems = [
            (least_seconds(problem, self.lengths), i, problem)
            for i, problem in enumerate(self.problems(permitted))
        ]
        self.bound_s = min(self.bound_s, *(bound_s for bound_s, _, _ in problems))
        ranked = [(_ranked(bound_s, problem), i, problem) for bound_s, i, problem in problems]
        for bound_s, _, problem in sorted(ranked, key=lambda entry: entry[:2]):
            if bound_s < self._best_s:
                self._search(problem)
        return self._best

    @property
    def _best_s(self) -> float:
        return _ranked(self._best.seconds, self._best.problem) if self._best else math.inf

    def problems(self, permitted: Permitted) -> Iterator[Problem]:
        """Yield what ``lane_problems`` does."""
        return lane_problems(self._machine, self._model, self._workload, permitted)

    def _search(self, problem: Problem) -> None:
        """Look for a policy of one precision that is faster than the best so far."""
        rounds, begin = MOST_ROUNDS, [Choice(n) for n in _numbers_of_lanes(len(self.lengths))]
        if self._begin is not None:
            rounds, begin = 0, [self._begin, *_other_lanes(self._begin, len(self.lengths))]
        for choice in begin:
            self._try(problem, choice)
        for _ in range(rounds):
            before = self._best_s
            if self._choice is None or not self._is_of(problem):
                return
            for choice in _other_rows(self._choice):
                self._try(problem, choice)
            for choice in _other_lanes(self._choice, len(self.lengths)):
                self._try(problem, choice)
            if self._best_s > before * (1 - LEAST_GAIN):
                return

    def _is_of(self, problem: Problem) -> bool:
        """Whether the best policy has a problem's precision."""
        assert self._best is not None
        return _precision(self._best.problem) == _precision(problem)

    def _try(self, problem: Problem, choice: Choice) -> None:
        key = _precision(problem), choice
        if key in self._tried:
            return
        found = self._tried[key] = self._evaluate(problem, choice)
        if found is not None and _ranked(found.seconds, found.problem) < self._best_s:
            self._best, self._choice = found, choice

    def _evaluate(self, problem: Problem, choice: Choice) -> FoundLanes | None:
        batch = -(-choice.lanes // choice.num_batches)
        lanes = batch * choice.num_batches
        count = choice.num_batches, choice.num_batches
        problem = replace(
            problem,
            gpu_batch_size=batch,
            num_batches=count,
            lanes=self._lane_policy(problem, replace(choice, lanes=lanes)),
        )
        program = Program(problem, self._table)
        try:
            relaxed = program.solve(Limits(block_sizes=(lanes, lanes)))
        except Infeasible:
            return None
        bound_s = relaxed.bound_per_sequence_s * len(self.lengths)
        if _ranked(bound_s, problem) >= self._best_s:
            return None
        if problem.stages_cache and not relaxed.shares.cache_disk > LEAST_SHARE:
            # All of the cache in memory is another problem, without buffers to stage it in.
            return None
        fitted = fit(program, choice.num_batches, max_latency_s=None)
        if fitted is None:
            return None
        policy, solution = fitted
        seconds = job_seconds(policy, self._machine, self._traces)
        return FoundLanes(seconds=seconds, policy=policy, problem=problem, solution=solution)

    def _lane_policy(self, problem: Problem, choice: Choice) -> LanePolicy:
        lengths, shares = self.lengths, problem.shares_prefixes
        tokens = pool_tokens(lengths, choice.lanes, choice.deviations, shares_prefixes=shares)
        total = int(lengths.prompts.sum())
        if shares:
            total = int(lengths.own.prompts.sum()) + int(lengths.prefixes.tokens.sum())
        prompt_rows = max(int(lengths.prompts.max()), min(total, choice.prompt_rows))
        rows = prompt_rows + choice.lanes - 1
        return LanePolicy(
            pool_tokens=max(1, tokens), pass_rows=rows, chunk_rows=min(choice.chunk_rows, rows)
        )


def lane_problems(
    machine: HardwareProfile, model: ModelSpec, workload: Workload, permitted: Permitted
) -> Iterator[Problem]:
    """Yield a problem for each precision and each way to load experts, with all of the cache in
    memory and with a part on disk. Batches and lanes are open."""
    has_experts = "experts" in model.component_names
    for stages_cache, on_demand, weight_bits, cache_bits, sparsity in itertools.product(
        (False, True) if machine.disk.free_bytes else (False,),
        (False, True) if has_experts else (False,),
        permitted.bits(model, "weight"),
        permitted.bits(model, "cache"),
        sorted({1.0, permitted.sparsity}, reverse=True),
    ):
        yield Problem(
            hardware=machine,
            model=model,
            workload=workload,
            gpu_batch_size=1,
            prefill_batch_size=1,
            weight_bits=weight_bits,
            cache_bits=cache_bits,
            group_size=permitted.group_size,
            attention_sparsity=sparsity,
            loads_on_demand=on_demand,
            lanes=LanePolicy(pool_tokens=1, pass_rows=1),
            stages_cache=stages_cache,
        )


def _ranked(seconds: float, problem: Problem) -> float:
    """Return the seconds that the policies of a problem are compared by."""
    return seconds * (1 + WORTH_OF_STAGING * problem.stages_cache)


def _precision(problem: Problem) -> Hashable:
    """Return what ``LaneSearch`` chooses before all else."""
    return (
        problem.weight_bits,
        problem.cache_bits,
        problem.attention_sparsity,
        problem.loads_on_demand,
        problem.stages_cache,
    )


def _numbers_of_lanes(num_prompts: int) -> list[int]:
    """Return powers of two and the numbers half-way between them, and all prompts at once."""
    most = min(num_prompts, MAX_BLOCK_SIZE)
    powers = [2**i for i in range(most.bit_length())]
    numbers = {*powers, *(3 * p // 2 for p in powers if p > 1), most}
    # Many lanes are seldom worse than few, and are tried first.
    return sorted((n for n in numbers if n <= most), reverse=True)


def _other_lanes(choice: Choice, num_prompts: int) -> list[Choice]:
    """Return choices of about as many lanes, each with every size of the cache."""
    most = min(num_prompts, MAX_BLOCK_SIZE)
    counts = {min(most, max(1, round(choice.lanes * factor))) for factor in FACTORS}
    return [
        replace(choice, lanes=count, deviations=deviations)
        for count, deviations in itertools.product(sorted(counts), DEVIATIONS)
    ]


def _other_rows(choice: Choice) -> list[Choice]:
    return [
        *(replace(choice, prompt_rows=rows) for rows in PROMPT_ROWS),
        *(replace(choice, chunk_rows=rows) for rows in CHUNK_ROWS),
        *(replace(choice, num_batches=n) for n in NUM_BATCHES if n <= choice.lanes),
    ]
