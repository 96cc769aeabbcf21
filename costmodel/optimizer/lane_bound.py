"""A bound on the throughput of all policies with lanes of one precision.

Lanes that are at work decode a token in each pass. So a job of ``N`` answers with ``g`` tokens in
the mean takes at least ``N g / n`` passes with ``n`` lanes, and as many with a cache for ``n``
mean contexts. It takes at least as many as the longest answer has tokens. For a range of ``n``, a
linear program finds the least seconds of any placement: the passes load their weights, and all
tokens are computed at the best rate. The cache has room for the least ``n`` only.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from costmodel.optimizer.choices import MAX_BLOCK_SIZE
from costmodel.optimizer.columns import Columns, coefficients
from costmodel.optimizer.rows import memory_forms
from costmodel.optimizer.solver import Infeasible
from costmodel.plan.lengths import Lengths
from costmodel.plan.pages import PAGE
from costmodel.plan.policy import LanePolicy
from costmodel.pricing.latency import stage_work
from costmodel.pricing.limits import work_limits
from costmodel.pricing.linear_form import LinearForm
from costmodel.pricing.problem import Problem
from costmodel.pricing.shares import unit_shares
from costmodel.pricing.steady import steady_stage

# More ranges have a better bound and take longer.
RANGE = 1.3
# More rows are no faster.
MOST_ROWS = 8192


def least_seconds(problem: Problem, lengths: Lengths) -> float:
    """Return seconds that no policy of a problem's precision is faster than, for a whole job.

    They are infinite where nothing fits.
    """
    # What prompts share takes no less than nothing.
    lengths = lengths.own if problem.shares_prefixes else lengths
    most = min(len(lengths), MAX_BLOCK_SIZE)
    ends = [1.0]
    while ends[-1] < most:
        ends.append(min(most, max(ends[-1] * RANGE, ends[-1] + 1)))
    ranges = itertools.pairwise(ends) if most > 1 else [(1.0, 1.0)]
    return min(_least_of_range(problem, lengths, low, high) for low, high in ranges)


def _least_of_range(problem: Problem, lengths: Lengths, low: float, high: float) -> float:
    times = list(_limits(problem, lengths, low).values())
    lanes = int(low)
    tokens = max(int(lengths.stored.max()), int(low * lengths.mean_context) // PAGE * PAGE, 1)
    smallest = replace(
        problem,
        gpu_batch_size=1,
        num_batches=(lanes, lanes),
        lanes=LanePolicy(
            pool_tokens=tokens, pass_rows=int(lengths.prompts.max()) + lanes - 1, chunk_rows=1
        ),
    )
    # Coefficients of one lane are too small for the solver.
    bytes_of = {name: form * lanes for name, form in memory_forms(smallest).items()}
    rows = coefficients([*times, *bytes_of.values()], problem.components)
    seconds = np.zeros((len(rows), 1))
    seconds[: len(times)] = -1.0
    columns = Columns(replace(smallest, gpu_batch_size=lanes))
    try:
        point = columns.minimize(
            (low, high),
            rows=rows,
            others=seconds,
            cost=np.zeros(rows.shape[1]),
            cost_of_others=np.ones(1),
        )
    except Infeasible:
        return np.inf
    return point.objective * len(lengths)


def _limits(problem: Problem, lengths: Lengths, lanes: float) -> dict[str, LinearForm]:
    """Return the limits of the whole job, per sequence: loads of the passes of ``lanes`` lanes, and
    the arithmetic of all tokens at the rates of many rows."""
    units = unit_shares(problem.components)
    alone = replace(problem, gpu_batch_size=1, num_batches=(1, 1))
    # Weights that are multiplied at these rates need no unpacking.
    many = replace(problem, gpu_batch_size=MOST_ROWS, num_batches=(1, 1), weight_bits=None)
    loads = stage_work(alone, units, steady_stage(alone, lengths, lanes, 1))
    sums = stage_work(many, units, steady_stage(many, lengths, 0, MOST_ROWS))
    work = [w for w in loads if w.channel.startswith("disk")]
    work += [w for w in sums if not w.channel.startswith("disk")]
    return work_limits(alone, work)
