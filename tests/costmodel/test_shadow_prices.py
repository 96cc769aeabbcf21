"""Shadow prices against solving again with a little more, or less, of every capacity and rate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from costmodel.model.loading import load_model_spec
from costmodel.optimizer.choices import DEFAULT_PERMITTED, Permitted
from costmodel.optimizer.optimum import search
from costmodel.optimizer.program import Limits, Solution, solve
from costmodel.optimizer.sensitivity import ShadowPrice, shadow_prices
from costmodel.optimizer.solver import Infeasible
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import capacities, with_capacities
from costmodel.pricing.problem import Problem
from costmodel.pricing.rates import RATES
from profiles import HardwareProfile, recorded_profile
from profiles.hardware import Contention
from profiles.units import GIB

# So small a change that a price is the slope, so large that the solver's tolerances are not.
CHANGE = 1e-3
# Prices that would change throughput by less than this share per whole machine are taken for 0.
NOISE = 2e-4


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is priced."""

    machine: str
    model: str
    workload: Workload
    budget: dict[str, int] = field(default_factory=dict)
    permitted: Permitted = DEFAULT_PERMITTED
    contention: tuple[Contention, ...] = ()


PAPER = Workload(prompt_len=512, gen_len=32)
CASES = {
    "paper": Case(machine="t4-flexgen", model="opt-30b", workload=PAPER),
    "disk": Case(machine="t4-flexgen", model="opt-175b", workload=PAPER),
    "laptop": Case(
        machine="cpu-2core",
        model="llama-3.2-3b",
        workload=Workload(prompt_len=128, gen_len=8, num_prompts=64),
        budget={"cpu": 4 * 10**9},
    ),
    "laptop, two channels share memory": Case(
        machine="cpu-2core",
        model="llama-3.1-8b",
        workload=Workload(prompt_len=64, gen_len=64, num_prompts=64),
        budget={"cpu": 10 * 10**9},
        contention=(
            Contention(first="disk_read", second="cpu_compute", first_keeps=0.8, second_keeps=0.85),
        ),
    ),
    "one prompt": Case(
        machine="rtx3090-pc",
        model="llama-2-13b",
        workload=Workload(prompt_len=100, gen_len=20, num_prompts=1),
    ),
    "full disk": Case(
        machine="t4-flexgen",
        model="opt-175b",
        workload=PAPER,
        budget={"disk": 180 * 10**9},
    ),
    "all fits": Case(
        machine="a100-80gb",
        model="llama-3.1-8b",
        workload=Workload(prompt_len=64, gen_len=32, num_prompts=16),
    ),
    "quantized": Case(
        machine="rtx4090-pc",
        model="llama-3.1-70b",
        workload=Workload(prompt_len=256, gen_len=64, num_prompts=64),
        permitted=Permitted(weight_bits=(16, 4), cache_bits=(16, 8)),
    ),
}


def _knows_unpacking(hardware: HardwareProfile) -> HardwareProfile:
    cpu = replace(hardware.cpu, compute=replace(hardware.cpu.compute, unpack_bytes_per_s=1e10))
    gpu = hardware.gpu
    if gpu is not None:
        gpu = replace(gpu, compute=replace(gpu.compute, unpack_bytes_per_s=1e11))
    return replace(hardware, cpu=cpu, gpu=gpu)


@functools.cache
def _solved(name: str) -> tuple[Problem, Solution]:
    case = CASES[name]
    hardware = replace(recorded_profile(case.machine), contention=case.contention)
    hardware = with_capacities(_knows_unpacking(hardware), case.budget)
    found = search(hardware, load_model_spec(case.model), case.workload, permitted=case.permitted)
    # The solution before a reserve was set aside for rounding.
    problem, policy = found.problem, found.policy
    return problem, solve(problem, Limits(block_sizes=(policy.block_size, policy.block_size)))


def _tok_per_s(problem: Problem, block_size: int) -> float:
    solution = solve(problem, Limits(block_sizes=(block_size, block_size)))
    return problem.workload.gen_len / solution.latency_per_sequence_s


def _scale(price: ShadowPrice) -> Callable[[HardwareProfile, float], HardwareProfile]:
    if price.name in RATES:
        return RATES[price.name].scale
    return lambda hardware, factor: with_capacities(
        hardware, {price.name: round(capacities(hardware)[price.name] * factor)}
    )


def _slopes(problem: Problem, price: ShadowPrice, block_size: int) -> list[float]:
    """Token/s per unit, from a little less and from a little more."""
    here = _tok_per_s(problem, block_size)
    slopes = []
    for factor in (1 - CHANGE, 1 + CHANGE):
        changed = replace(problem, hardware=_scale(price)(problem.hardware, factor))
        try:
            there = _tok_per_s(changed, block_size)
        except Infeasible:
            continue
        slopes.append((there - here) / ((factor - 1) * price.amount))
    return slopes


@pytest.mark.parametrize("name", CASES)
def test_every_price_is_what_solving_again_gains(name: str) -> None:
    problem, solution = _solved(name)
    block_size = round(1 / solution.shares.per_block)
    rate = problem.workload.gen_len / solution.latency_per_sequence_s
    prices = shadow_prices(problem, solution)
    assert {price.name for price in prices} >= {*capacities(problem.hardware), "disk_read"}
    for price in prices:
        if price.amount == 0:
            assert price.tok_per_s == 0
            continue
        slopes = _slopes(problem, price, block_size)
        # At a kink the price is the slope of one side, or any between the two.
        low, high = min(slopes), max(slopes)
        slack = 0.05 * max(abs(low), abs(high)) + NOISE * rate / price.amount
        assert low - slack <= price.tok_per_s <= high + slack, (price, slopes)


@pytest.mark.parametrize("name", CASES)
def test_prices_add_up_to_what_a_faster_machine_gains(name: str) -> None:
    """With all rates scaled alike only fixed costs stay: the prices of the rates say how much."""
    problem, solution = _solved(name)
    hardware = problem.hardware
    rates = [price for price in shadow_prices(problem, solution) if price.name in RATES]
    for price in rates:
        hardware = RATES[price.name].scale(hardware, 1 + CHANGE)
    block_size = round(1 / solution.shares.per_block)
    gained = _tok_per_s(replace(problem, hardware=hardware), block_size)
    gained -= _tok_per_s(problem, block_size)
    expected = sum(price.tok_per_s * price.amount for price in rates) * CHANGE
    assert gained == pytest.approx(expected, rel=0.05)
    # A machine has no more to gain than its speed.
    rate = problem.workload.gen_len / solution.latency_per_sequence_s
    assert 0 < expected <= rate * CHANGE * 1.01


def test_units_are_those_that_are_named() -> None:
    problem, solution = _solved("paper")
    prices = {price.name: price for price in shadow_prices(problem, solution)}
    assert prices["gpu"].unit == "GiB"
    limits = capacities(problem.hardware)
    assert prices["gpu"].amount == pytest.approx(limits["gpu"] / GIB)
    assert (prices["disk_read"].unit, prices["gpu_matmul"].unit) == ("GB/s", "TFLOP/s")
    assert prices["h2d"].amount == pytest.approx(
        problem.hardware.gpu.h2d.pinned_bytes_per_s / 1e9 if problem.hardware.gpu else 0
    )
