"""Shadow prices: the value of one more unit of each capacity and rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from costmodel.optimizer.program import Solution, rows_of
from costmodel.pricing.memory import capacities, with_capacities
from costmodel.pricing.problem import Problem
from costmodel.pricing.rates import RATES, with_one_dtype
from profiles.hardware import HardwareProfile
from profiles.units import GIB

# Relative step of the numerical derivative of a row's coefficients, which are smooth.
STEP = 1e-6
# Smaller relative savings have no price: they come from the objective's weight of traffic.
NOISE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowPrice:
    """The gain in throughput for one more unit of a capacity or rate, at a fixed block size.

    Parameters
    ----------
    name
        ``gpu``, ``cpu`` or ``disk`` for a capacity, a name out of ``RATES`` for a rate.
    amount
        The machine's own capacity or rate, in units.
    unit
        GiB, GB/s or TFLOP/s.
    tok_per_s
        Token/s for one more unit: a slope, which holds for small changes.
    """

    name: str
    amount: float
    unit: str
    tok_per_s: float


def shadow_prices(
    problem: Problem, solution: Solution, *, margin: float = 0.0
) -> list[ShadowPrice]:
    """Price every capacity and rate of the machine at a solution with a fixed block size.

    By the envelope theorem, the change of the optimum is the change of its rows at the optimal
    shares, weighted by their duals. ``margin`` of each added capacity stays free.
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
    machine = with_one_dtype(problem.hardware, problem.model.dtype)
    for name, rate in RATES.items():
        if value := rate.value(machine):
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
        latency_s, gen_len = solution.latency_per_sequence_s, problem.workload.mean_output
        if saved_s > NOISE * latency_s:
            slope = saved_s * gen_len / latency_s**2 * unit_size / amount
    return ShadowPrice(name=name, amount=amount / unit_size, unit=unit, tok_per_s=slope)


def _change(before: Problem, after: Problem, solution: Solution) -> float:
    """Return the change of the optimum in seconds per sequence, to first order."""
    old, new = rows_of(before), rows_of(after)
    value_of = solution.shares.value_of
    # An increase of a row's left side is an equal decrease of its right side.
    return sum(-solution.duals[name] * value_of(new[name] - old[name]) for name in old)
