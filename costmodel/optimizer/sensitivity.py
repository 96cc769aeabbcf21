"""What one unit more of every capacity and rate is worth: shadow prices of the program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from costmodel.optimizer.program import Solution, rows_of
from costmodel.pricing.memory import capacities, with_capacities
from costmodel.pricing.problem import Problem
from costmodel.pricing.rates import RATES
from profiles.hardware import HardwareProfile
from profiles.units import GIB

# The change of a figure over which a row's coefficients are differentiated; they are smooth.
STEP = 1e-6
# Below this share of throughput for all that the machine has, a price is the objective's weight
# of traffic, not of time.
NOISE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowPrice:
    """What one more unit of a capacity or rate adds to throughput, at the policy's block size.

    Parameters
    ----------
    name
        ``gpu``, ``cpu`` or ``disk`` for a capacity, a name out of ``RATES`` for a rate.
    amount
        What the machine has, in units.
    unit
        GiB, GB/s or TFLOP/s.
    tok_per_s
        Token/s for one unit more: the slope where the machine stands, not a promise for a large
        change.
    """

    name: str
    amount: float
    unit: str
    tok_per_s: float


def shadow_prices(
    problem: Problem, solution: Solution, *, margin: float = 0.0
) -> list[ShadowPrice]:
    """Price every capacity and rate of the machine at a solution with a fixed block size.

    By the envelope theorem the optimum changes as its rows do at the optimal shares, each
    weighed by its dual. Of every capacity that is bought, ``margin`` stays free.
    """
    prices = []
    for tier, capacity in capacities(problem.hardware).items():

        def enlarge(hardware: HardwareProfile, factor: float, tier: str = tier) -> HardwareProfile:
            return with_capacities(hardware, {tier: round(capacities(hardware)[tier] * factor)})

        price = _price(problem, solution, tier, capacity, "GiB", GIB, enlarge)
        usable = 1 - margin
        prices.append(
            replace(price, amount=price.amount / usable, tok_per_s=price.tok_per_s * usable)
        )
    for name, rate in RATES.items():
        if value := rate.value(problem.hardware):
            prices.append(
                _price(problem, solution, name, value, rate.unit, rate.unit_size, rate.scale)
            )
    return prices


def _price(
    problem: Problem,
    solution: Solution,
    name: str,
    amount: float,
    unit: str,
    unit_size: float,
    scale: Callable[[HardwareProfile, float], HardwareProfile],
) -> ShadowPrice:
    slope = 0.0
    if amount > 0:
        better = replace(problem, hardware=scale(problem.hardware, 1 + STEP))
        saved_s = -_change(problem, better, solution) / STEP
        latency_s, gen_len = solution.latency_per_sequence_s, problem.workload.gen_len
        if saved_s > NOISE * latency_s:
            slope = saved_s * gen_len / latency_s**2 * unit_size / amount
    return ShadowPrice(name=name, amount=amount / unit_size, unit=unit, tok_per_s=slope)


def _change(before: Problem, after: Problem, solution: Solution) -> float:
    """Seconds per sequence that the optimum changes by, to first order."""
    old, new = rows_of(before), rows_of(after)
    value_of = solution.shares.value_of
    # More on the left of a row is as much less on its right.
    return sum(-solution.duals[name] * value_of(new[name] - old[name]) for name in old)
