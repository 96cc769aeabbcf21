"""The linear program at one ``gpu_batch_size``: where every byte lives, and the block size.

Minimising latency over block size looks bilinear. Per sequence it is linear (Charnes and Cooper
1962): see ``Shares``. Only the staging of one batch's cache keeps a product of two variables. It
is exact where the block size is fixed; where it is free, its McCormick envelope makes the
optimum a certified lower bound of every policy's latency.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import pulp

from costmodel.latency import phase_terms
from costmodel.memory import PHASES, capacities, memory_rows
from costmodel.problem import Problem, Quantity, Shares
from profiles.aligned_io import PAGE_BYTES
from profiles.errors import RunError
from profiles.units import format_bytes

# Missing bytes are cheapest on disk and dearest on the GPU, so that the advice names the tier
# that a user would extend first.
SHORTAGE_COST = {"disk": 1.0, "cpu": 10.0, "gpu": 100.0}
# Among policies of one latency, the one that keeps all channels least busy is the best: what is
# moved without need disturbs what is not in the model.
TRAFFIC_WEIGHT = 1e-4
FLAGS = {"gpu": "--gpu-memory", "cpu": "--cpu-memory", "disk": "--disk"}
# Where a program misses feasibility by about the solver's tolerance, its scaled and its own form
# can disagree, and the status is unknown; unscaled and whole, most of these are decided.
SOLVER_OPTIONS: tuple[dict[str, str | int], ...] = (
    {},
    {"presolve": "off", "simplex_scale_strategy": 0},
)
SHARE_NAMES = tuple(f.name for f in fields(Shares))
PRODUCTS = ("cache_cpu", "cache_disk", "attended")


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """An optimum of the program.

    Parameters
    ----------
    shares
        Values of the variables.
    latency_per_sequence_s
        What the shares take.
    bound_per_sequence_s
        No policy takes less: exact at a fixed block size but for the weight of traffic.
    duals
        Seconds per sequence that one unit more of each row's right-hand side would change.
    """

    shares: Shares
    latency_per_sequence_s: float
    bound_per_sequence_s: float
    duals: Mapping[str, float]


class Infeasible(Exception):
    """No point satisfies the rows; ``search`` turns this into advice."""


def solve(
    problem: Problem,
    *,
    max_block_size: int,
    block_size: int | None = None,
    max_latency_s: float | None = None,
    reserve: Mapping[str, int] | None = None,
) -> Solution:
    """Solve for one ``Problem``.

    Parameters
    ----------
    max_block_size
        Bounds a free block size.
    block_size
        Fixes it; the optimum is then exact.
    max_latency_s
        Limit on the latency of one block.
    reserve
        Bytes per tier to leave free, beyond what the formulas count.

    Raises
    ------
    Infeasible
        When nothing fits.
    RunError
        When the solver is missing or ends in any other way than with an optimum.
    """
    model = pulp.LpProblem("policy", pulp.LpMinimize)
    shares = _variables(model, problem, block_size, max_block_size)
    phase_s = {phase: pulp.LpVariable(f"{phase}_s", 0) for phase in PHASES}
    terms = phase_terms(problem, shares)
    busy_s = [seconds for channels in terms.values() for seconds in channels.values()]
    model += sum(phase_s.values()) + TRAFFIC_WEIGHT * sum(busy_s)
    for phase, channels in terms.items():
        for channel, seconds in channels.items():
            _add(model, phase_s[phase] >= seconds, f"time.{phase}.{channel}")
    for tier, capacity in capacities(problem.hardware).items():
        usable = max(0, capacity - (reserve or {}).get(tier, 0))
        for row, use in _scaled_rows(problem, shares, tier).items():
            limit = shares.per_block * (problem.gpu_batch_size * usable / max(capacity, 1))
            _add(model, use <= limit, f"capacity.{tier}.{row}")
    if max_latency_s is not None:
        limit = shares.per_block * max_latency_s
        _add(model, sum(phase_s.values()) <= limit, "latency")
    _run_solver(model)
    # A phase lasts at least as long as each of its channels is busy, so busy seconds are at most
    # latency times the number of channels: what is left bounds the latency of every policy.
    most_busy = 1 + TRAFFIC_WEIGHT * max(len(channels) for channels in terms.values())
    values = {name: float(pulp.value(getattr(shares, name)) or 0.0) for name in SHARE_NAMES}
    return Solution(
        shares=Shares(**values),
        latency_per_sequence_s=sum(float(seconds.value()) for seconds in phase_s.values()),
        bound_per_sequence_s=float(pulp.value(model.objective)) / most_busy,
        duals={name: float(row.pi or 0.0) for name, row in model.constraints.items()},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """Why the smallest block does not fit: bytes that tiers lack, and budgets that would do."""

    missing_bytes: Mapping[str, int]
    budget_bytes: Mapping[str, int]

    def __str__(self) -> str:
        found = " and ".join(
            f"{tier} is short by {count} bytes ({format_bytes(count)})"
            for tier, count in self.missing_bytes.items()
        )
        advice = " and ".join(f"{FLAGS[t]} {count}B" for t, count in self.budget_bytes.items())
        return f"nothing fits: {found}; try: {advice}"


def shortage_of(problem: Problem, *, margin: float = 0.001) -> Shortage:
    """Say which tier is short for the smallest block, by how many bytes, and what would do.

    ``margin`` is added to what is missing, as a fraction of what would do: the program's optimum
    leaves no room for rounding to whole rows and pages.
    """
    limits = capacities(problem.hardware)
    model = pulp.LpProblem("shortage", pulp.LpMinimize)
    shares = _variables(model, problem, problem.gpu_batch_size, problem.gpu_batch_size)
    missing = {tier: pulp.LpVariable(f"missing_{tier}", 0) for tier in limits}
    model += sum(SHORTAGE_COST[tier] * variable for tier, variable in missing.items())
    for tier, rows in memory_rows(problem, shares).items():
        for row, terms in rows.items():
            use = sum(terms.values()) * (problem.gpu_batch_size / 1e6)
            _add(model, use <= missing[tier] + limits[tier] / 1e6, f"capacity.{tier}.{row}")
    _run_solver(model)
    short = {tier: int(float(variable.value()) * 1e6) for tier, variable in missing.items()}
    # Where nothing is short, it is the rounding that finds no room.
    short = {tier: count for tier, count in short.items() if count > 0} or {"cpu": 0}
    # A cut may fall half a row off in every layer, and every layer begins on a page of the disk.
    edges = len(problem.layers) * (PAGE_BYTES + problem.longest_row_bytes)
    budgets = {
        tier: int((limits[tier] + count) * (1 + margin)) + edges for tier, count in short.items()
    }
    return Shortage(
        missing_bytes={
            tier: count or budgets[tier] - limits[tier] for tier, count in short.items()
        },
        budget_bytes=budgets,
    )


def _add(model: pulp.LpProblem, row: pulp.LpConstraint, name: str) -> None:
    model.addConstraint(row, name.replace(", ", ".").replace(" ", "_"))


def _scaled_rows(problem: Problem, shares: Shares, tier: str) -> dict[str, Quantity]:
    """Rows of a tier as fractions of its capacity and one batch, so that the solver's absolute
    tolerance means the same everywhere."""
    scale = problem.gpu_batch_size / max(capacities(problem.hardware)[tier], 1)
    rows = memory_rows(problem, shares)[tier]
    return {row: sum(terms.values()) * scale for row, terms in rows.items()}


def _variables(
    model: pulp.LpProblem, problem: Problem, block_size: int | None, max_block_size: int
) -> Shares:
    batch = problem.gpu_batch_size
    low = batch / (block_size or max(max_block_size, batch))
    high = batch / block_size if block_size else 1.0
    # The inverse number of batches: per_block would be too small for the solver's tolerances.
    inverse = pulp.LpVariable("inverse_batches", low, high)
    gpu_top = None if problem.hardware.has_gpu else 0
    weights = {tier: pulp.LpVariable(f"weights_{tier}", 0) for tier in ("gpu", "cpu", "disk")}
    plain = {
        f"{kind}_{tier}": pulp.LpVariable(f"{kind}_{tier}", 0, 1)
        for kind in ("cache", "activations")
        for tier in ("gpu", "cpu", "disk")
    }
    attended = pulp.LpVariable("attended", 0, 1 if problem.hardware.has_gpu else 0)
    for variable in (weights["gpu"], plain["cache_gpu"], plain["activations_gpu"]):
        if gpu_top is not None:
            variable.upBound = gpu_top
    _add(model, sum(weights.values()) == inverse, "whole.weights")
    for kind in ("cache", "activations"):
        parts = [plain[f"{kind}_{tier}"] for tier in ("gpu", "cpu", "disk")]
        _add(model, sum(parts) == 1, f"whole.{kind}")
    _add(model, attended <= plain["cache_cpu"] + plain["cache_disk"], "attended")
    if problem.in_place:
        here = "activations_gpu" if problem.hardware.has_gpu else "activations_cpu"
        _add(model, plain[here] == 1, "in_place")
    factors = {"cache_cpu": plain["cache_cpu"], "cache_disk": plain["cache_disk"]}
    factors["attended"] = attended
    products = {
        f"{name}_per_block": _product(model, name, factors[name], inverse, low, high) * (1 / batch)
        for name in PRODUCTS
    }
    return Shares(
        per_block=inverse * (1 / batch),
        attended=attended,
        **{f"weights_{tier}": weights[tier] * (1 / batch) for tier in weights},
        **plain,
        **products,
    )


def _product(
    model: pulp.LpProblem,
    name: str,
    fraction: pulp.LpVariable,
    inverse: pulp.LpVariable,
    low: float,
    high: float,
) -> Quantity:
    """Return ``fraction * inverse``: exact where ``inverse`` is fixed, else its envelope.

    McCormick 1976, for a fraction in [0, 1]: the convex hull of the product over the rectangle.
    """
    if low == high:
        return fraction * low
    product = pulp.LpVariable(f"{name}_product", 0)
    _add(model, product >= fraction * low, f"envelope.{name}.low")
    _add(model, product >= fraction * high + inverse - high, f"envelope.{name}.high")
    # What is attended is subtracted from what is fetched, so it needs its upper planes too.
    _add(model, product <= fraction * high, f"envelope.{name}.below_high")
    _add(model, product <= fraction * low + inverse - low, f"envelope.{name}.below_low")
    return product


def _run_solver(model: pulp.LpProblem) -> None:
    if not pulp.HiGHS(msg=False).available():
        raise RunError("the solver HiGHS is missing; try: pip install highspy")
    for options in SOLVER_OPTIONS:
        status = pulp.LpStatus[model.solve(pulp.HiGHS(msg=False, **options))]
        if status != "Not Solved":
            break
    # What no form decides is on the edge of feasibility: no whole rows and pages fit there.
    if status == "Infeasible" or _is_undecided(model):
        raise Infeasible
    if status != "Optimal":
        raise RunError(f"the solver ended with status {status!r} instead of an optimum")


def _is_undecided(model: pulp.LpProblem) -> bool:
    highs = getattr(model, "solverModel", None)
    return highs is not None and highs.getModelStatus().name == "kUnknown"
