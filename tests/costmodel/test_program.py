"""The program against optima found by hand, and against brute force."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.model.layout import CUT_ROWS
from costmodel.optimizer.choices import decide
from costmodel.optimizer.program import Limits, Solution, solve
from costmodel.optimizer.shortage import shortage_of
from costmodel.optimizer.solver import Infeasible
from costmodel.plan.policy import Placement
from costmodel.plan.workload import Workload
from costmodel.pricing.limits import limit_forms, stage_limits
from costmodel.pricing.memory import capacities, memory_rows, with_capacities
from costmodel.pricing.problem import Problem
from costmodel.pricing.rates import RATES
from costmodel.pricing.shares import Shares, TierShares
from costmodel.pricing.stages import stages_of
from costmodel.pricing.workspace import workspace_bytes
from profiles import HardwareProfile, RateCurve, recorded_profile
from tests.costmodel.machines import (
    CACHE_TOKEN_BYTES,
    DECODER_BYTES,
    HEAD_BYTES,
    ON_CPU,
    ON_DISK,
    ON_GPU,
    SMALL_BYTES,
    make_compute,
    make_machine,
    make_mixture,
    make_model,
    make_shares,
)

WORK = Workload(prompt_len=16, gen_len=5)
# Elements of a layer that are multiplied before its attention.
PROJECTED = 512 * 256
MOST_POINTS = 300
DENSE_SEEDS, ALL_SEEDS = 18, 24


def _problem(hardware: HardwareProfile, **changes: object) -> Problem:
    fields: dict[str, object] = {
        "hardware": hardware,
        "model": make_model(),
        "workload": WORK,
        "gpu_batch_size": 4,
        "prefill_batch_size": 2,
    }
    return Problem(**(fields | changes))  # type: ignore[arg-type]  # plain keyword table


def _solve(problem: Problem, block_size: int | None = None, **limits: object) -> Solution:
    """Solve at one block size, or at the best of up to 64 sequences."""
    sizes = (problem.gpu_batch_size, 64) if block_size is None else (block_size, block_size)
    batches = (sizes[0] // problem.gpu_batch_size, sizes[1] // problem.gpu_batch_size)
    problem = replace(problem, num_batches=batches)
    return solve(problem, Limits(block_sizes=sizes, **limits))  # type: ignore[arg-type]


def _weight_share(found: Solution, problem: Problem, tier: str) -> float:
    """Return the share of the bytes of all weights on a tier, times ``per_block``."""
    parts = (
        getattr(found.shares.weights[name], tier) * size
        for name, size in problem.sizes.component_bytes.items()
    )
    return float(sum(parts)) / problem.sizes.weight_bytes


def test_weights_fill_memory_and_the_rest_is_read() -> None:
    """Two batches on a machine where only reading weights takes time."""
    hidden = 8 * 16 * 256 * 2
    logits = 8 * 256 * 2 + 4 * 1000 * 4
    # A cosine and a sine for every pair of a head, of each sequence's position or of a prompt's.
    rotations = (8 + 16) * 64 * 2
    workspace = workspace_bytes(_problem(make_machine()), "prefill")
    # Both components of a decoder layer are cut, the MLP between rows of 1024 bytes.
    edges = 2 * (2 * 4096 + CUT_ROWS * 512 + 2 * 4096 + CUT_ROWS * 1024)
    cache = 8 * CACHE_TOKEN_BYTES * 8 * 20
    # Disk costs time for the cache too, so the cache stays in memory.
    fixed = hidden + logits + rotations + workspace + edges + cache
    capacity = fixed + 4_000_000
    # The staging buffers are as large as what a decoder layer reads, so all of the head is read:
    # 8 * kept + 2 * (a decoder layer - kept) = 4 MB
    kept = (4_000_000 - 2 * DECODER_BYTES) / 6
    assert DECODER_BYTES - kept > HEAD_BYTES
    share = 8 * kept / SMALL_BYTES
    machine = make_machine(cpu_memory=capacity, disk_read=1e6, disk_write=1e3)
    problem = _problem(machine)
    found = _solve(problem, 8)
    in_memory = _weight_share(found, problem, "cpu") * 8
    assert in_memory == pytest.approx(share, rel=1e-5)
    assert found.latency_per_sequence_s * 8 == pytest.approx(
        5 * (1 - share) * SMALL_BYTES / 1e6, rel=1e-5
    )


def test_attention_is_split_so_that_link_and_cpu_end_together() -> None:
    """All weights fit on the GPU and no cache does: balance fetching against attending."""
    model = make_model(max_positions=4096)
    work = Workload(prompt_len=2000, gen_len=2)
    token = CACHE_TOKEN_BYTES * 8
    cpu = make_compute(decode=2e6)
    # Room for the weights and for staging all of the cache, not for keeping any.
    machine = make_machine(gpu_memory=10**9, h2d=1e6, cpu=cpu)
    problem = _problem(machine, model=model, workload=work, gpu_batch_size=1, prefill_batch_size=1)
    rows = memory_rows(problem, make_shares(1, weights=ON_GPU, cache=ON_CPU))["gpu"]
    tight = make_machine(
        gpu_memory=int(max(sum(terms.values()) for terms in rows.values())) + 1, h2d=1e6, cpu=cpu
    )
    found = _solve(replace(problem, hardware=tight), 1)
    assert found.shares.cache_gpu == pytest.approx(0, abs=1e-3)
    # The link takes (1 - a) * context / 1e6 and the results of the CPU; the one batch waits for
    # a * context / 2e6 of attention and for the same results.
    assert found.shares.attended == pytest.approx(2 / 3, rel=2e-3)
    step_s = (1 / 3 * token * 2000 + 2 / 3 * 256 * 2 * 8) / 1e6
    assert found.latency_per_sequence_s == pytest.approx(step_s, rel=2e-3)


def test_where_all_fits_latency_is_flop_over_rate() -> None:
    """Nothing moves, so every sequence costs its own arithmetic whatever the block."""
    machine = make_machine(cpu=make_compute(flop=1e9))
    decoder, head = DECODER_BYTES // 2 - 2 * 256, 1000 * 256
    # 16 prompt tokens and 4 decode steps pass through 8 layers, but for what follows attention in
    # the last one, which sees 1 + 4 tokens as the head does.
    flop = 2 * ((16 + 4) * 8 * decoder - 15 * (decoder - PROJECTED) + 5 * head)
    for block_size in (None, 4, 64):
        found = _solve(_problem(machine), block_size)
        assert found.latency_per_sequence_s == pytest.approx(flop / 1e9, rel=1e-6)


@pytest.mark.parametrize(("h2d", "disk_read"), [(1e6, 1e8), (1e8, 1e6), (1e6, 0.5e6)])
def test_the_slower_of_link_and_disk_decides(h2d: float, disk_read: float) -> None:
    """A third of the weights would fit the GPU, and a third the CPU, were all placed alike.

    What is not on the GPU passes the link, what is on neither passes the disk, in each of five
    passes.
    """
    # Handing cache down costs ages, so it stays on the GPU with the hidden states.
    fast = make_machine(gpu_memory=10**9, h2d=h2d, d2h=1.0, disk_read=disk_read)
    problem = _problem(fast)
    nothing = make_shares(4, weights=ON_DISK, cache=ON_GPU)
    rows = memory_rows(problem, nothing)
    least = {tier: max(sum(t.values()) for t in rows[tier].values()) * 4 for tier in ("gpu", "cpu")}
    # Staging of two layers shrinks with what is staged: on the GPU all that it does not hold, on
    # the CPU what comes from disk.
    third, staging = SMALL_BYTES / 3, 2 * DECODER_BYTES
    tight = make_machine(
        gpu_memory=math.ceil(least["gpu"] + third - staging / 3),
        cpu_memory=math.ceil(least["cpu"] + third - staging * 2 / 3),
        h2d=h2d,
        d2h=1.0,
        disk_read=disk_read,
    )
    found = _solve(replace(problem, hardware=tight), 4)
    assert found.shares.cache_gpu == pytest.approx(1)
    # Of two buffers as large as what a decoder layer sends, a byte more of every layer on the GPU
    # saves two, so that the head stays off it: 8 * kept - 2 * kept = third - staging / 3.
    on_gpu = 8 / 6 * (third - staging / 3)
    # The CPU's buffers hold what a decoder layer reads, or the head: as much, and a cut of the MLP
    # more. 8 * (a decoder layer - on_gpu / 8 - read) + (head - read - edge) + 2 * read
    # = third + staging / 3
    edge = 2 * 4096 + CUT_ROWS * 1024
    read = (SMALL_BYTES - edge - on_gpu - staging / 3 - third) / 7
    expected = 5 * max((SMALL_BYTES - on_gpu) / h2d, (9 * read + edge) / disk_read)
    assert found.latency_per_sequence_s * 4 == pytest.approx(expected, rel=1e-4)


def test_in_place_keeps_hidden_states_on_the_device_that_computes() -> None:
    machine = make_machine(gpu_memory=10**9)
    found = _solve(_problem(machine))
    assert found.shares.activations_gpu == 1
    found = _solve(_problem(make_machine()))
    assert found.shares.activations_cpu == 1
    assert found.shares.cache_gpu == found.shares.attended == 0
    assert all(shares.gpu == 0 for shares in found.shares.weights.values())


def _prices(problem: Problem, points: Sequence[Shares[float]]) -> list[float]:
    # Forms are made once for all points: a point's limits are their values there.
    stages = [limit_forms(problem, stage) for stage in stages_of(problem)]
    return [
        sum(max(point.value_of(form) for form in forms.values()) for forms in stages)
        for point in points
    ]


def _fits(problem: Problem, shares: Shares[float], slack: float = 1e-9) -> bool:
    limits = capacities(problem.hardware)
    return all(
        sum(terms.values()) <= limits[tier] * shares.per_block * (1 + slack)
        for tier, rows in memory_rows(problem, shares).items()
        for terms in rows.values()
    )


def _splits(steps: int, *, has_gpu: bool) -> list[Placement]:
    grid = itertools.product(range(steps + 1), repeat=2)
    splits = [
        Placement(gpu=g / steps, cpu=c / steps, disk=(steps - g - c) / steps)
        for g, c in grid
        if g + c <= steps
    ]
    return splits if has_gpu else [split for split in splits if split.gpu == 0]


def _grid(problem: Problem, block_size: int) -> list[Shares[float]]:
    """Every placement in quarters and every share of attention in halves; one component apart
    from the others, and of a mixture experts that the CPU multiplies."""
    has_gpu = problem.hardware.has_gpu
    here = ON_GPU if has_gpu else ON_CPU
    hidden = [here] if problem.hidden_in_place else _splits(2, has_gpu=has_gpu)
    halves = (0.0, 0.5, 1.0)
    points = [
        (w, c, h, part)
        for w, c, h in itertools.product(
            _splits(4, has_gpu=has_gpu), _splits(4, has_gpu=has_gpu), hidden
        )
        for part in (halves if has_gpu else (0.0,))
    ]
    rng = random.Random(block_size)
    points = rng.sample(points, min(len(points), MOST_POINTS))
    splits, names = _splits(4, has_gpu=has_gpu), problem.components
    return [
        make_shares(
            block_size,
            model=problem.model,
            weights=dict.fromkeys(names, w) | {rng.choice(names): rng.choice(splits)},
            cache=c,
            activations=h,
            attended=part,
            in_place=rng.choice(halves) if problem.cpu_experts else 0.0,
        )
        for w, c, h, part in points
    ]


def _random_problem(seed: int) -> Problem:
    """Draw a machine whose channels all matter, with memory for about half of everything.

    The last quarter of the seeds have a mixture of experts.
    """
    rng = random.Random(seed)

    def rate(middle: float) -> float:
        return middle * 10 ** rng.uniform(-0.7, 0.7)

    def compute(factor: float) -> object:
        return make_compute(
            flop=rate(3e9 * factor),
            attention=rate(1e9 * factor),
            decode=rate(2e8 * factor),
            overhead_s=1e-5,
        )

    has_gpu = seed % 3 > 0
    changes: dict[str, object] = {
        "workload": Workload(prompt_len=rng.choice([8, 64]), gen_len=rng.choice([2, 16])),
        "gpu_batch_size": rng.choice([1, 4, 16]),
        "prefill_batch_size": 1,
        "hidden_in_place": rng.random() < 0.5,
    }
    if seed >= DENSE_SEEDS:
        changes |= {
            "model": make_mixture(mlp_only_layers=[0], intermediate_size=512),
            "loads_on_demand": rng.random() < 0.5,
            "cpu_experts": has_gpu and rng.random() < 0.5,
        }
        if changes["loads_on_demand"] or changes["cpu_experts"]:
            changes["hidden_in_place"] = True
    # What no placement can save: temporaries, and staging of layers.
    like_it = make_machine(gpu_memory=1 if has_gpu else None)
    least = workspace_bytes(_problem(like_it, **changes), "prefill") + 3_000_000
    machine = make_machine(
        gpu_memory=int(rate(4e6)) + least if has_gpu else None,
        cpu_memory=int(rate(8e6)) + least,
        disk=int(rate(5e7)),
        disk_read=rate(2e7),
        disk_write=rate(1e7),
        h2d=rate(1e8),
        d2h=rate(1e8),
        gpu=compute(10),  # type: ignore[arg-type]  # make_compute's own result
        cpu=compute(1),  # type: ignore[arg-type]  # make_compute's own result
    )
    return _problem(machine, **changes)


@pytest.mark.parametrize("seed", range(ALL_SEEDS))
def test_no_point_of_a_grid_beats_the_program(seed: int) -> None:
    problem = _random_problem(seed)
    batch = problem.gpu_batch_size
    try:
        relaxed = _solve(problem)
    except Infeasible:
        relaxed = None
    fitting = 0
    for block_size in (batch, 2 * batch, 5 * batch):
        if block_size > 64:
            continue
        # What a block of that many batches takes, of which the program knows for every range.
        count = block_size // batch
        priced = replace(problem, num_batches=(count, count))
        points = [s for s in _grid(problem, block_size) if _fits(priced, s)]
        fitting += len(points)
        if not points:
            continue
        best = min(_prices(priced, points))
        exact = _solve(problem, block_size)
        assert exact.latency_per_sequence_s <= best * (1 + 1e-6)
        assert _fits(problem, exact.shares, slack=1e-5)
        assert relaxed is not None
        assert relaxed.bound_per_sequence_s <= exact.latency_per_sequence_s * (1 + 1e-9)
        assert relaxed.bound_per_sequence_s <= best
    if relaxed is None:
        assert not fitting


@pytest.mark.parametrize("seed", [0, 3, 6, 9, 12])
def test_a_fine_grid_comes_as_near_as_its_mesh(seed: int) -> None:
    """Without a GPU there are three free shares: of the cache, of the head, and of a decoder layer,
    whose components differ in nothing. A grid of 801 x 801 x 9 finds the same optimum."""
    problem = replace(_random_problem(seed), hidden_in_place=True)
    block_size = 2 * problem.gpu_batch_size
    try:
        exact = _solve(problem, block_size)
    except Infeasible:
        pytest.skip("this machine is too small")
    u = 1 / block_size
    mesh = np.linspace(0, 1, 801)
    weights, cache = mesh[:, None, None], mesh[None, :, None]
    head = np.linspace(0, 1, 9)[None, None, :]
    columns: dict[str, Any] = {
        "weights": {
            name: TierShares(gpu=0.0 * share, cpu=share * u, disk=(1 - share) * u)
            for name, share in (("attention", weights), ("mlp", weights), ("head", head))
        },
        "cache_cpu": cache,
        "cache_disk": 1 - cache,
        "cache_cpu_per_block": cache * u,
        "cache_disk_per_block": (1 - cache) * u,
    }
    # Formulas take arrays as well as numbers.
    corner = make_shares(block_size, weights=ON_CPU, cache=ON_CPU, activations=ON_CPU)
    shares = replace(corner, **columns)
    limits = capacities(problem.hardware)
    fits = np.ones((len(mesh), len(mesh), head.size), dtype=bool)
    for tier, rows in memory_rows(problem, shares).items():
        for terms in rows.values():
            fits &= sum(terms.values()) <= limits[tier] * u * (1 + 1e-9)
    stages = (stage_limits(problem, shares, stage) for stage in stages_of(problem))
    price = sum(functools.reduce(np.maximum, limits.values()) for limits in stages)
    best = float(np.where(fits, price, np.inf).min())
    assert exact.latency_per_sequence_s <= best * (1 + 1e-6)
    assert best <= exact.latency_per_sequence_s * 1.005


@pytest.mark.parametrize("seed", range(6))
def test_an_open_problem_bounds_all_that_it_stands_for(seed: int) -> None:
    """Also where products of more rows are slower, and where a part of it fits and a part does
    not."""
    problem = replace(_random_problem(seed), gpu_batch_size=16, hidden_in_place=None)
    dips = RateCurve(sizes=(8, 64, 1024), rates=(1e9, 8e9, 5e8))
    cpu = problem.hardware.cpu
    compute = replace(cpu.compute, matmul={"bfloat16": dips})
    hardware = replace(problem.hardware, cpu=replace(cpu, compute=compute))
    problem = replace(problem, hardware=hardware, open_prefill_batch_sizes=(1, 4, 16))
    decided = list(decide(problem))
    assert problem.is_open and not any(other.is_open for other in decided)
    assert len({(other.hidden_in_place, other.prefill_batch_size) for other in decided}) == 6
    for block_size in (None, 16, 32):
        bounds = [_bound(other, block_size) for other in decided]
        assert _bound(problem, block_size) <= min(bounds) * (1 + 1e-9)
    assert min(bounds) < math.inf


def _bound(problem: Problem, block_size: int | None) -> float:
    try:
        return _solve(problem, block_size).bound_per_sequence_s
    except Infeasible:
        return math.inf


def test_the_grid_is_not_empty_everywhere() -> None:
    sizes = [len(_grid(_random_problem(seed), 4)) for seed in range(3)]
    assert min(sizes) >= 25
    fitting = [
        any(_fits(problem, s) for s in _grid(problem, problem.gpu_batch_size))
        for problem in map(_random_problem, range(ALL_SEEDS))
    ]
    assert sum(fitting[:DENSE_SEEDS]) >= 9 and sum(fitting[DENSE_SEEDS:]) >= 3


@pytest.mark.parametrize("seed", range(6))
def test_the_objective_is_the_price_of_its_own_shares(seed: int) -> None:
    problem = _random_problem(seed)
    block_size = 2 * problem.gpu_batch_size
    try:
        found = _solve(problem, block_size)
    except Infeasible:
        pytest.skip("this machine is too small")
    (price,) = _prices(problem, [found.shares])
    assert found.latency_per_sequence_s == pytest.approx(price, rel=1e-6)
    assert found.bound_per_sequence_s == pytest.approx(price, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.sampled_from([1, 2, 4, 5, 7, 8]),
    resource=st.sampled_from([*RATES, "gpu", "cpu", "disk"]),
    factor=st.floats(1.0, 8.0),
)
def test_more_of_anything_is_never_slower(seed: int, resource: str, factor: float) -> None:
    problem = _random_problem(seed)
    try:
        before = _solve(problem)
    except Infeasible:
        return
    if resource in RATES:
        hardware = RATES[resource].scale(problem.hardware, factor)
    else:
        capacity = capacities(problem.hardware)[resource]
        hardware = with_capacities(problem.hardware, {resource: int(capacity * factor)})
    after = _solve(replace(problem, hardware=hardware))
    assert after.bound_per_sequence_s <= before.bound_per_sequence_s * (1 + 1e-6)


def test_a_latency_limit_is_kept_and_costs_throughput() -> None:
    problem = _random_problem(1)
    batch = problem.gpu_batch_size
    free = _solve(problem)
    least_s = _solve(problem, batch).latency_per_sequence_s * batch
    free_s = free.latency_per_sequence_s / free.shares.per_block
    limit = (least_s * free_s) ** 0.5
    assert least_s < limit < free_s
    held = _solve(problem, max_latency_s=limit)
    assert held.latency_per_sequence_s / held.shares.per_block <= limit * (1 + 1e-6)
    assert held.latency_per_sequence_s >= free.latency_per_sequence_s * (1 - 1e-3)
    with pytest.raises(Infeasible):
        _solve(problem, max_latency_s=1e-9)


def test_reserve_leaves_bytes_free() -> None:
    problem = _random_problem(2)
    block_size = problem.gpu_batch_size
    spare = {"cpu": 100_000}
    found = _solve(problem, block_size, reserve=spare)
    rows = memory_rows(problem, found.shares)["cpu"]
    used = max(sum(terms.values()) for terms in rows.values()) * block_size
    assert used <= (problem.hardware.cpu.memory_bytes - 100_000) * (1 + 1e-6)


def test_rows_are_named() -> None:
    found = _solve(_problem(recorded_profile("t4-flexgen")))
    assert {
        "time.prefill.h2d",
        "time.decode from pass 1.disk_read",
        "time.decode from pass 1.cpu_memory",
        "time.decode from pass 1.h2d beside d2h",
        "capacity.gpu.decode, fetched cache, attention and mlp",
        "capacity.gpu.decode, fetched cache, head",
        "capacity.cpu.attention and mlp",
        "capacity.disk.whole run",
    } <= set(found.duals)


@pytest.mark.parametrize(
    ("cpu_memory", "disk"), [(1_000_000, 0), (5_000_000, 100_000), (100, 10**10), (10**10, 0)]
)
def test_the_shortage_is_the_smallest(cpu_memory: int, disk: int) -> None:
    """With a fiftieth less than what is said to be missing, it does not fit; with it, it does."""
    model = make_model(num_layers=400)
    machine = make_machine(cpu_memory=cpu_memory, disk=disk)
    problem = _problem(machine, model=model, gpu_batch_size=1, prefill_batch_size=1)
    try:
        _solve(problem, 1)
    except Infeasible:
        missing = shortage_of(problem).missing_bytes
    else:
        assert cpu_memory == 10**10
        return
    assert missing

    def with_more(share: float) -> Problem:
        more = machine.with_budget(
            cpu_memory=cpu_memory + int(share * missing.get("cpu", 0)),
            disk=disk + int(share * missing.get("disk", 0)),
        )
        return replace(problem, hardware=more)

    with pytest.raises(Infeasible):
        _solve(with_more(0.98), 1)
    _solve(with_more(1.02), 1)
