"""Pipelines over lanes, as the executor runs them: prices against all blocks played out, and plans
that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from costmodel.cluster import block_passes, pipeline_search
from costmodel.cluster.block_passes import passes_of_lanes
from costmodel.cluster.estimate import estimate_pipeline
from costmodel.cluster.nodes import Cluster, Links, Node, NodeLink
from costmodel.cluster.plan import ClusterPlan
from costmodel.cluster.question import ClusterQuestion
from costmodel.cluster.search import ClusterSearch
from costmodel.cluster.stage_prices import price_lanes
from costmodel.cluster.stage_search import stage_lanes
from costmodel.cluster.stages import stages_of_counts
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import Pipeline
from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import Placement, Policy, placed_alike
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import capacities
from costmodel.pricing.passes import FloatArray
from costmodel.pricing.price import policy_peaks
from costmodel.schedule.admission import longest_first
from costmodel.schedule.job_simulation import simulate_job
from profiles import HardwareProfile, InfeasibleError
from tests.costmodel.machines import make_compute, make_machine, make_mixture, make_model

LAN = Links(default=NodeLink(bytes_per_s=1e8, latency_s=1e-4))
MODEL = make_model(num_layers=4)
# So large that half of it is more than the workspace of any policy differs by.
LARGE = make_model(num_layers=24)
HALVES, ON_DISK = Placement(cpu=0.5, disk=0.5), Placement(disk=1.0)
SIZE = 6


def _machine(speed: float = 1.0, *, cpu_memory: int = 10**12) -> HardwareProfile:
    compute = make_compute(flop=speed * 1e10, attention=1e11, decode=1e9, overhead_s=1e-5)
    return make_machine(cpu_memory=cpu_memory, disk_read=speed * 1e8, cpu=compute)


def _work(lengths: Lengths) -> Workload:
    return Workload(
        prompt_len=int(lengths.prompts.max()),
        gen_len=int(lengths.limits.max()),
        num_prompts=len(lengths),
        lengths=lengths.sketch(),
    )


def _equal(count: int) -> Lengths:
    return Lengths([32] * count, [20] * count)


def _drawn(count: int) -> Lengths:
    rng = np.random.default_rng(1)
    return Lengths(rng.integers(4, 60, count), rng.integers(2, 40, count))


def _stages(
    model: ModelSpec,
    counts: Sequence[int],
    workload: Workload,
    size: int = SIZE,
    deviations: float = math.inf,
) -> tuple[list[Policy], list[Node]]:
    """Return a pipeline whose stages differ in layers, placements and speed."""
    pipeline = Pipeline(num_stages=len(counts), block_size=size, deviations=deviations)
    policies = [
        Policy(
            model=stage,
            workload=workload,
            gpu_batch_size=size // (1 + place % 2),
            num_gpu_batches=1 + place % 2,
            prefill_batch_size=1,
            weights=placed_alike(stage, ON_DISK if place else HALVES),
            cache=Placement(cpu=1.0),
            activations=Placement(cpu=1.0),
            lanes=stage_lanes(workload, pipeline, chunk_rows=128),
            blocks_in_flight=len(counts),
        )
        for place, stage in enumerate(stages_of_counts(model, counts))
    ]
    nodes = [Node(name="abc"[i], hardware=_machine(1 + 0.3 * i)) for i in range(len(counts))]
    return policies, nodes


def _of_block(policy: Policy) -> Policy:
    """Return a policy whose cache is that of one block."""
    lanes = policy.lanes
    assert lanes is not None
    tokens = lanes.pool_tokens // policy.blocks_in_flight
    return replace(policy, lanes=replace(lanes, pool_tokens=tokens))


def _played(policies: Sequence[Policy], nodes: Sequence[Node], lengths: Lengths) -> float:
    """Return the seconds until all blocks are answered, each with its own prompts.

    Every stage and every link serves the block that came first.
    """
    num_blocks = len(policies)
    order = longest_first(lengths)
    model = policies[0].model
    ways: list[FloatArray] = []
    for block in range(num_blocks):
        picked = order[block::num_blocks]
        own = Lengths(lengths.prompts[picked], lengths.outputs[picked], lengths.limits[picked])
        jobs = [
            simulate_job(_of_block(policy), node.hardware, own)
            for policy, node in zip(policies, nodes, strict=True)
        ]
        rows = jobs[0].counts.decoding + jobs[0].counts.prompt_tokens
        num_bytes = rows * model.hidden_size * model.dtype_bytes
        link = LAN.default.latency_s + num_bytes / LAN.default.bytes_per_s
        back = LAN.default.latency_s + 8 * SIZE / LAN.default.bytes_per_s + 0 * rows
        servers = [each for job in jobs for each in (job.seconds, link)]
        ways.append(np.stack([*servers[:-1], back]))
    free = np.zeros(len(ways[0]))
    ready = np.zeros(num_blocks)
    left = [0] * num_blocks
    while True:
        # The first pass of each block, then whoever is back first.
        blocks = [b for b in range(num_blocks) if left[b] < ways[b].shape[1]]
        if not blocks:
            return float(ready.max())
        block = min(blocks, key=lambda b: (ready[b], b))
        for server, seconds in enumerate(ways[block][:, left[block]]):
            free[server] = ready[block] = max(ready[block], free[server]) + seconds
        left[block] += 1


@pytest.mark.parametrize(
    ("model", "counts", "lengths", "deviations", "tolerance"),
    [
        (MODEL, (2, 2), _equal(5 * 2 * SIZE), math.inf, 0.03),
        (MODEL, (1, 2, 1), _equal(4 * 3 * SIZE), math.inf, 0.03),
        (MODEL, (2, 2), _drawn(70), math.inf, 0.06),
        (MODEL, (2, 2), _drawn(70), 1.0, 0.06),
        (make_mixture(), (2, 1, 1), _drawn(100), math.inf, 0.06),
    ],
)
def test_the_price_is_that_of_all_blocks_played_out(
    model: ModelSpec, counts: Sequence[int], lengths: Lengths, deviations: float, tolerance: float
) -> None:
    policies, nodes = _stages(model, counts, _work(lengths), deviations=deviations)
    found = estimate_pipeline(policies, nodes, LAN)
    tokens = int(lengths.outputs.sum())
    played_s = _played(policies, nodes, lengths)
    assert found.throughput_tok_per_s == pytest.approx(tokens / played_s, rel=tolerance)
    assert found.prefill_s == 0.0


def test_a_block_in_step_costs_the_same_over_lanes() -> None:
    """A round of equal lengths: a pass of prompts, and then one for each token."""
    lengths = _equal(2 * SIZE)
    policies, nodes = _stages(MODEL, (2, 2), _work(lengths))
    over_lanes = estimate_pipeline(policies, nodes, LAN)
    in_step = [replace(policy, lanes=None, prefill_batch_size=3) for policy in policies]
    expected = estimate_pipeline(in_step, nodes, LAN)
    assert over_lanes.throughput_tok_per_s == pytest.approx(expected.throughput_tok_per_s, rel=0.02)


def test_a_long_job_is_priced_by_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = _drawn(900)
    policies, nodes = _stages(MODEL, (2, 2), _work(lengths))
    whole = estimate_pipeline(policies, nodes, LAN)
    monkeypatch.setattr(block_passes, "LEAST_SIMULATED", 60)
    passes = passes_of_lanes(policies[0], nodes[0].hardware, policies[0].workload)
    assert len(passes.jobs) == 2 and passes.num_prompts == 900
    shorter = estimate_pipeline(policies, nodes, LAN)
    assert shorter.throughput_tok_per_s == pytest.approx(whole.throughput_tok_per_s, rel=0.03)


def _short(workload: Workload) -> HardwareProfile:
    """Return a machine without a disk, and with room for half of the layers beside two lanes."""
    policies, nodes = _stages(LARGE, (12, 12), workload, size=2)
    in_memory = replace(policies[0], weights=placed_alike(policies[0].model, Placement(cpu=1.0)))
    peak = policy_peaks(in_memory, nodes[0].hardware)["cpu"]
    return _machine(cpu_memory=round(1.05 * peak)).with_budget(disk=0)


def _two(machine: HardwareProfile) -> Cluster:
    return Cluster(nodes=tuple(Node(name=name, hardware=machine) for name in "ab"), links=LAN)


def _runnable(cluster: Cluster, workload: Workload, *, only_copies: bool = False) -> ClusterPlan:
    question = ClusterQuestion(model=LARGE, workload=workload, only_copies=only_copies)
    return ClusterSearch(question).run(cluster)


def test_runnable_stages_fit_and_cost_what_they_say() -> None:
    work = _work(_drawn(30))
    cluster = _two(_short(work))
    (copy,) = _runnable(cluster, work).copies
    assert [stage.node for stage in copy.stages] == ["a", "b"]
    policies = [stage.policy for stage in copy.stages]
    assert len({(p.lanes.pool_tokens, p.lanes.pass_rows) for p in policies if p.lanes}) == 1
    for policy, node in zip(policies, cluster.nodes, strict=True):
        used, most = policy_peaks(policy, node.hardware), capacities(node.hardware)
        assert all(used[tier] <= most[tier] for tier in most)
        assert policy.cache.cpu == policy.activations.cpu == 1
    found = estimate_pipeline(policies, cluster.nodes, LAN)
    assert copy.predicted is not None
    assert copy.predicted.throughput_tok_per_s == pytest.approx(found.throughput_tok_per_s)


def test_a_cache_for_what_is_expected_has_room_for_more_sequences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers may be long and are not. A pass costs hardly more with more sequences."""
    work = _work(Lengths([40] * 96, [60] * 96, [900] * 96))
    compute = make_compute(flop=1e12, attention=1e12, decode=1e11, overhead_s=1e-5)
    machine = make_machine(cpu_memory=_short(work).cpu.memory_bytes, disk=0, cpu=compute)
    cluster = _two(machine)
    (expected,) = _runnable(cluster, work).copies
    monkeypatch.setattr(pipeline_search, "DEVIATIONS", (math.inf,))
    (longest,) = _runnable(cluster, work).copies
    assert expected.block_size > longest.block_size
    assert expected.predicted is not None and longest.predicted is not None
    gained = expected.predicted.throughput_tok_per_s / longest.predicted.throughput_tok_per_s
    assert gained > 1.5


def test_copies_alone_are_refused_where_only_stages_fit() -> None:
    work = _work(_drawn(30))
    with pytest.raises(InfeasibleError, match="2 nodes, not on one of them, and is not cut"):
        _runnable(_two(_short(work)), work, only_copies=True)
    plan = _runnable(_two(_machine()), work, only_copies=True)
    assert [len(copy.stages) for copy in plan.copies] == [1, 1]
    assert plan.links == LAN


def test_each_stage_of_a_plan_has_the_seconds_of_its_passes() -> None:
    work = _work(_equal(2 * SIZE))
    policies, nodes = _stages(MODEL, (3, 1), work)
    passes = passes_of_lanes(policies[0], nodes[0].hardware, work)
    # A pass of prompts and one for each further token.
    assert passes.rows.tolist() == [SIZE * 32.0, *[float(SIZE)] * 19]
    first, last = (
        price_lanes(p, n.hardware, passes).seconds for p, n in zip(policies, nodes, strict=True)
    )
    assert len(first) == len(last) == 20 and (first > last).all()
