"""Placements of whole experts near a relaxed optimum.

Experts are few and large: one more or one less on a GPU changes the room for all else. So the
numbers of experts are fixed one after another, at the better of the integers below and above the
optimum's, and the program is solved again for the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

from costmodel.optimizer.program import Limits, Program, Solution
from costmodel.optimizer.solver import Infeasible
from costmodel.plan.rounding import integers_near
from costmodel.pricing.experts import experts_of
from costmodel.pricing.shares import weight_name

# Numbers of experts in a solution this near to an integer count as that integer.
TOLERANCE = 1e-4


def with_whole_experts(program: Program, limits: Limits, relaxed: Solution) -> list[Solution]:
    """Return the best solution found with whole experts on each tier and in place.

    The list is empty where nothing fits, or without experts. ``limits`` fix the block size.
    """
    problem = program.problem
    if "experts" not in problem.components:
        return []
    num_experts = sum(layout.num_units * count for _, layout, count in experts_of(problem))
    placements = _placements(relaxed, num_experts, limits.block_sizes[0])
    found = _best(program, limits, placements)
    if found is None:
        return []
    placed, solution = found
    if problem.cpu_experts:
        counts = integers_near(solution.shares.experts_in_place * num_experts, TOLERANCE)
        options = ({**placed, "experts_in_place": count / num_experts} for count in counts)
        placed, solution = _best(program, limits, options) or found
    return [solution]


def _placements(
    relaxed: Solution, num_experts: int, block_size: int
) -> Iterator[Mapping[str, float]]:
    shares = relaxed.shares.weights["experts"]
    of_all = num_experts * block_size
    on_gpu, on_disk = (
        integers_near(share * of_all, TOLERANCE) for share in (shares.gpu, shares.disk)
    )
    for gpu, disk in itertools.product(on_gpu, on_disk):
        if gpu + disk <= num_experts:
            counts = {"gpu": gpu, "disk": disk}
            yield {weight_name("experts", t): count / of_all for t, count in counts.items()}


def _best(
    program: Program, limits: Limits, options: Iterator[Mapping[str, float]]
) -> tuple[Mapping[str, float], Solution] | None:
    """Solve with each of several sets of fixed shares; return the best solution."""
    solved = []
    for fixed in options:
        try:
            all_fixed = {**(limits.fixed or {}), **fixed}
            solved.append((fixed, program.solve(replace(limits, fixed=all_fixed))))
        except Infeasible:
            continue
    return min(solved, key=lambda s: s[1].bound_per_sequence_s, default=None)
