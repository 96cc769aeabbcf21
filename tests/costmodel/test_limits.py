"""What bounds a stage: linear in the shares, right where channels share, whole over the phases."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from costmodel.optimizer.columns import coefficients
from costmodel.optimizer.program import Program, rows_of
from costmodel.optimizer.rows import RowTable
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.latency import stage_work
from costmodel.pricing.limits import IN_SERIES, ONE_BATCH, stage_limits
from costmodel.pricing.linear_form import LinearForm, Quantity
from costmodel.pricing.memory import capacities, memory_rows, with_capacities
from costmodel.pricing.price import estimate, phase_channels
from costmodel.pricing.problem import Problem
from costmodel.pricing.rates import RATES
from costmodel.pricing.shares import Shares, share_names, unit_shares
from costmodel.pricing.stages import MAX_SEGMENTS, SEGMENT_GROWTH, stages_of
from profiles import HardwareProfile, Link, recorded_profile
from profiles.hardware import Contention
from tests.costmodel.machines import (
    ON_CPU,
    ON_DISK,
    ON_GPU,
    make_compute,
    make_machine,
    make_mixture,
    make_model,
    make_policy,
    make_shares,
)
from tests.costmodel.strategies import policies

# Channels that slow each other down on the machines below.
CPU_PAIRS = (
    Contention(first="disk_read", second="cpu_compute", first_keeps=0.7, second_keeps=0.6),
    Contention(first="disk_write", second="cpu_compute", first_keeps=0.2, second_keeps=0.3),
)
GPU_PAIRS = (
    *CPU_PAIRS,
    Contention(first="h2d", second="gpu_compute", first_keeps=0.9, second_keeps=0.8),
    Contention(first="h2d", second="cpu_compute", first_keeps=0.5, second_keeps=0.8),
)


def _knows_unpacking(hardware: HardwareProfile) -> HardwareProfile:
    cpu = replace(hardware.cpu, compute=replace(hardware.cpu.compute, unpack_bytes_per_s=1e10))
    gpu = hardware.gpu
    if gpu is not None:
        gpu = replace(gpu, compute=replace(gpu.compute, unpack_bytes_per_s=1e11))
    return replace(hardware, cpu=cpu, gpu=gpu)


def _problem(hardware: HardwareProfile, **changes: object) -> Problem:
    fields: dict[str, object] = {
        "hardware": hardware,
        "model": make_model(),
        "workload": Workload(prompt_len=16, gen_len=40),
        "gpu_batch_size": 4,
        "prefill_batch_size": 2,
    }
    return Problem(**(fields | changes))  # type: ignore[arg-type]  # plain keyword table


def _every_kind(name: str) -> list[Problem]:
    """All combinations of what can be switched, and of mixtures of experts what concerns them."""
    machine = _knows_unpacking(recorded_profile(name))
    pairs = GPU_PAIRS if machine.has_gpu else CPU_PAIRS
    machines = [
        replace(machine, contention=contention, unhidden_share=unhidden)
        for contention, unhidden in (((), 0.0), (pairs, 0.0), (pairs, 0.1))
    ]
    mixture = make_mixture(mlp_only_layers=[0])
    mixtures = [
        _problem(
            hardware,
            model=mixture,
            hidden_in_place=in_place,
            weight_bits=weight_bits,
            loads_on_demand=on_demand,
            cpu_experts=cpu_experts,
            num_batches=num_batches,
        )
        for hardware in machines[::2]
        for in_place, weight_bits, on_demand, cpu_experts, num_batches in itertools.product(
            (True, False), (None, 4), (False, True), (False, True), ((1, 1), (3, 3), (1, 6))
        )
        if (in_place or not (on_demand or cpu_experts)) and (machine.has_gpu or not cpu_experts)
    ]
    return mixtures + [
        _problem(
            hardware,
            hidden_in_place=in_place,
            weight_bits=weight_bits,
            cache_bits=cache_bits,
            attention_sparsity=sparsity,
            loads_per_block=loads,
        )
        for hardware in machines
        for in_place, weight_bits, cache_bits, sparsity, loads in itertools.product(
            (True, False), (None, 4), (None, 8), (1.0, 0.1), (1.0, 1.3)
        )
    ]


def _random_values(problem: Problem, rng: random.Random) -> dict[str, float]:
    return {name: rng.random() for name in share_names(problem.components)}


def _formulas(problem: Problem, shares: Shares[Quantity]) -> dict[str, Quantity]:
    """All that the program and the estimator read, by name."""
    found: dict[str, Quantity] = {}
    one_batch = shares.of_one_batch(problem.gpu_batch_size)
    for stage in stages_of(problem):
        for what, point in (("block", shares), ("batch", one_batch)):
            for work in stage_work(problem, point, stage):
                name = f"{stage.name} {what} {work.channel} {work.kind}"
                found[name] = work.seconds
                if work.memory_bytes is not None:
                    found[f"{name} bytes"] = work.memory_bytes
    for tier, rows in memory_rows(problem, shares).items():
        for row, terms in rows.items():
            found |= {f"{tier} {row} {name}": term for name, term in terms.items()}
    return found


def _at(form: LinearForm, values: Mapping[str, float]) -> tuple[float, float]:
    """Return a form at a point, and the size of what cancels there."""
    parts = [factor * values[name] for name, factor in form.terms.items()]
    return math.fsum(parts), math.fsum(map(abs, parts))


@pytest.mark.parametrize("name", ["t4-flexgen", "cpu-2core"])
def test_every_formula_is_linear_in_the_shares(name: str) -> None:
    """The coefficients that the program reads give what the estimator computes."""
    rng = random.Random(1)
    for problem in _every_kind(name):
        values = _random_values(problem, rng)
        units = unit_shares(problem.components)
        forms = _formulas(problem, units)
        found = _formulas(problem, Shares.of(values, problem.components))
        assert forms.keys() == found.keys()
        for key, form in forms.items():
            expected, size = _at(form, values)
            assert abs(found[key] - expected) <= 1e-9 * size, (key, problem)


def test_a_limit_of_one_batch_is_what_the_batch_takes_in_series() -> None:
    """The form of the limit equals the formulas at the batch's own shares."""
    rng = random.Random(2)
    for problem in _every_kind("t4-flexgen"):
        point = Shares.of(_random_values(problem, rng), problem.components)
        for stage in stages_of(problem):
            alone = stage_work(problem, point.of_one_batch(problem.gpu_batch_size), stage)
            expected = sum(work.seconds for work in alone if work.kind in IN_SERIES)
            assert stage_limits(problem, point, stage)[ONE_BATCH] == pytest.approx(expected)


def test_rows_are_the_limits_and_what_memory_lacks() -> None:
    """Every row of the program at a point, from the estimator's own figures."""
    rng = random.Random(3)
    for problem in _every_kind("t4-flexgen"):
        point = Shares.of(_random_values(problem, rng), problem.components)
        limits = capacities(problem.hardware)
        expected = {
            f"time.{stage.name}.{name}": seconds
            for stage in stages_of(problem)
            for name, seconds in stage_limits(problem, point, stage).items()
        } | {
            f"capacity.{tier}.{name}": (sum(terms.values()) / limits[tier] - point.per_block)
            * problem.gpu_batch_size
            for tier, rows in memory_rows(problem, point).items()
            for name, terms in rows.items()
        }
        found = {name: point.value_of(form) for name, form in rows_of(problem).items()}
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", ["t4-flexgen", "cpu-2core"])
def test_what_programs_share_is_what_their_formulas_give(name: str) -> None:
    """Problems of machines that differ in capacities or in rates: each has a table, which shares
    with the first machine's what they have in common."""
    problems = _every_kind(name)
    for model in {problem.model.name: problem.model for problem in problems}.values():
        first: RowTable | None = None
        for machine in _unlike(problems[0].hardware):
            table = RowTable(machine, first)
            first = first or table
            for problem in [p for p in problems if p.model == model][::5]:
                for loads in {1.0, problem.loads_per_block, 2.5}:
                    kind = replace(problem, hardware=machine, loads_per_block=loads)
                    found = Program(kind, table).rows
                    expected = coefficients(rows_of(kind).values(), kind.components)
                    scale = np.abs(expected).max(axis=1, keepdims=True)
                    assert (np.abs(found - expected) <= 1e-12 * scale).all()


def _unlike(hardware: HardwareProfile) -> list[HardwareProfile]:
    more = {tier: 2 * capacity for tier, capacity in capacities(hardware).items()}
    return [
        hardware,
        with_capacities(hardware, more),
        with_capacities(hardware, {"disk": 0}),
        RATES["disk_read"].scale(hardware, 2.0),
    ]


def _least_seconds(first: float, second: float, keeps: tuple[float, float]) -> float:
    """Schedule by hand: each alone for a while, both together for a while."""
    done = linprog([1, 1, 1], A_ub=[[-1, 0, -keeps[0]], [0, -1, -keeps[1]]], b_ub=[-first, -second])
    assert done.fun is not None
    return float(done.fun)


@pytest.mark.parametrize("keeps", [(0.6, 0.8), (0.9, 0.2), (0.3, 0.4), (1.0, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize("work", [(1.0, 1.0), (3.0, 1.0), (1.0, 5.0), (2.0, 0.0)])
def test_two_channels_take_as_long_as_the_best_way_to_share(
    keeps: tuple[float, float], work: tuple[float, float]
) -> None:
    """Both directions of the link in prefill: weights go up while the new cache comes down."""
    machine = make_machine(gpu_memory=10**12, gpu=make_compute())
    assert machine.gpu is not None

    def link(seconds: float, share: float) -> Link:
        rate = 1e6 / seconds if seconds else 1e30
        return Link(
            pinned_bytes_per_s=rate, pageable_bytes_per_s=rate, opposed_bytes_per_s=rate * share
        )

    gpu = replace(machine.gpu, h2d=link(work[0], keeps[0]), d2h=link(work[1], keeps[1]))
    problem = _problem(replace(machine, gpu=gpu), workload=Workload(prompt_len=16, gen_len=2))
    shares = make_shares(8, weights=ON_CPU, cache=ON_CPU, activations=ON_GPU, attended=1.0)
    prefill, _ = stages_of(problem)
    limits = stage_limits(problem, shares, prefill)
    up, down = limits["h2d"], limits["d2h"]
    assert limits["h2d beside d2h"] >= up and limits["d2h beside h2d"] >= down
    sharing = max(limits[name] for name in ("h2d", "d2h", "h2d beside d2h", "d2h beside h2d"))
    assert sharing == pytest.approx(_least_seconds(up, down, keeps))


def test_a_pair_named_in_the_profile_is_a_limit() -> None:
    pair = Contention(first="disk_read", second="cpu_compute", first_keeps=0.7, second_keeps=0.6)
    machine = replace(
        make_machine(disk_read=1e6, cpu=make_compute(decode=1e5, flop=1e9)), contention=(pair,)
    )
    # A second of the disk costs the CPU (1 - 0.6) / 0.7 and the other way round.
    policy = make_policy(weights=ON_DISK)
    seconds = phase_channels(policy, machine)["decode"]
    read, compute = seconds["disk_read"], seconds["cpu_compute"]
    assert estimate(policy, machine).decode_s == pytest.approx(
        _least_seconds(read, compute, (0.7, 0.6))
    )
    assert estimate(policy, machine).decode_s == pytest.approx(
        max(read + compute * 0.3 / 0.6, compute + read * 0.4 / 0.7)
    )


def test_reads_ahead_slow_computing_down_that_loads_on_demand_wait_for() -> None:
    pair = Contention(first="disk_read", second="cpu_compute", first_keeps=0.7, second_keeps=0.6)
    machine = make_machine(disk_read=1e8, cpu=make_compute(decode=1e5, flop=1e8))
    machine = replace(machine, contention=(pair,))
    model = make_mixture()
    weights = dict.fromkeys(model.component_names, ON_CPU) | {"experts": ON_DISK}
    base = make_policy(model=model, gpu_batch_size=1, num_gpu_batches=1, prefill_batch_size=1)
    policy = replace(base, loads_on_demand=True, weights=weights)
    ahead = replace(policy, weights=weights | {"attention": ON_DISK})
    read = [phase_channels(p, machine)["decode"]["disk_read"] for p in (policy, ahead)]
    taken = [estimate(p, machine).decode_s for p in (policy, ahead)]
    # A second of the disk costs the CPU (1 - 0.6) / 0.7.
    assert taken[1] - taken[0] == pytest.approx((read[1] - read[0]) * 0.4 / 0.7)
    # Computing waits for all experts, but for all chunks but the last, here one of two halves.
    computed = phase_channels(policy, machine)["decode"]["cpu_compute"]
    assert read[0] + computed / 2 < taken[0] < read[0] + computed


def test_what_is_not_hidden_adds_to_the_busiest_channel() -> None:
    machine = replace(
        make_machine(disk_read=1e6, disk_write=1e6, cpu=make_compute(flop=1e8)), unhidden_share=0.25
    )
    policy = make_policy(weights=ON_DISK, cache=ON_DISK)
    seconds = phase_channels(policy, machine)["decode"].values()
    others = sum(seconds) - max(seconds)
    assert estimate(policy, machine).decode_s == pytest.approx(max(seconds) + 0.25 * others)


@given(
    prompt_len=st.integers(1, 3000),
    gen_len=st.integers(1, 600),
    batch=st.integers(1, 64),
)
def test_segments_of_decode_add_up(prompt_len: int, gen_len: int, batch: int) -> None:
    workload = Workload(prompt_len=prompt_len, gen_len=gen_len)
    problem = _problem(make_machine(), workload=workload, gpu_batch_size=batch)
    prefill, *decode = stages_of(problem)
    assert (prefill.tokens, prefill.passes, prefill.first_pass) == (prompt_len, 1, 0)
    read = [prompt_len + step for step in range(gen_len - 1)]
    assert sum(stage.passes for stage in decode) == len(read)
    assert sum(stage.context_tokens for stage in decode) == pytest.approx(sum(read))
    # All slots but the last token's are written, each once.
    stored = prefill.stored_tokens + sum(stage.stored_tokens for stage in decode)
    assert stored == (workload.context_len - 1 if gen_len > 1 else 0)
    position = 0
    for stage in decode:
        assert stage.first_pass == position + 1
        passes = int(stage.passes)
        steps = read[position : position + passes]
        assert stage.context_tokens == pytest.approx(sum(steps))
        position += passes
        if len(decode) < MAX_SEGMENTS:
            # Segments are as long as each other, so the first grows most.
            assert steps[-1] / steps[0] <= SEGMENT_GROWTH * (1 + 0.5 / len(decode))
    assert len(decode) <= MAX_SEGMENTS


@settings(deadline=None)
@given(policies(), st.sampled_from(["t4-flexgen", "rtx4090-pc"]), st.sampled_from([0.0, 0.2]))
def test_the_lower_bound_is_one(policy: Policy, name: str, unhidden: float) -> None:
    hardware = replace(recorded_profile(name), contention=GPU_PAIRS, unhidden_share=unhidden)
    predicted = estimate(policy, hardware)
    assert 0 < predicted.lower_bound_s <= predicted.latency_s * (1 + 1e-12)
    assert predicted.latency_s == pytest.approx(predicted.prefill_s + predicted.decode_s)
    # No channel works longer than the block lasts.
    assert max(predicted.channel_s.values()) <= predicted.latency_s * (1 + 1e-12)


@settings(deadline=None)
@given(policies(has_gpu=False))
def test_the_lower_bound_is_one_without_a_gpu(policy: Policy) -> None:
    hardware = replace(recorded_profile("cpu-2core"), contention=CPU_PAIRS)
    predicted = estimate(policy, hardware)
    assert 0 < predicted.lower_bound_s <= predicted.latency_s * (1 + 1e-12)
    assert not predicted.channel_s.keys() & {"h2d", "d2h", "gpu_compute"}
