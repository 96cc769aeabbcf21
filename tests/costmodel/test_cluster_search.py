"""The search for a cluster against all plans of small ones, and against the plain search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from costmodel.cluster.nodes import Cluster, Links, Node, NodeLink, PairLink, equal_nodes
from costmodel.cluster.plan import ClusterPlan
from costmodel.cluster.question import ClusterQuestion
from costmodel.cluster.search import ClusterSearch
from costmodel.cluster.stage_prices import StagePrices
from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import Pipeline
from costmodel.optimizer.optimum import search
from costmodel.plan.lengths import Lengths
from costmodel.plan.workload import Workload
from costmodel.pricing.price import check_fits, estimate
from costmodel.pricing.sizes import sizes_of
from profiles import HardwareProfile, InfeasibleError, InputError, recorded_profile
from profiles.packing import DEFAULT_GROUP_SIZE
from profiles.units import GIB
from tests.costmodel.all_plans import best_throughput
from tests.costmodel.machines import (
    AMPLE,
    DECODER_BYTES,
    make_compute,
    make_machine,
    make_mixture,
    make_model,
)

WORK = Workload(prompt_len=16, gen_len=9, num_prompts=6)
LAN = NodeLink(bytes_per_s=1e9, latency_s=1e-4)
SLOW = NodeLink(bytes_per_s=1e5, latency_s=1e-2)
MODEL = make_model(num_layers=4)


def _machine(speed: float = 1.0, *, cpu_memory: int = AMPLE) -> HardwareProfile:
    """A machine that multiplies fast and reads its disk slowly."""
    compute = make_compute(flop=speed * 1e11, attention=1e12, decode=1e10, overhead_s=1e-5)
    return make_machine(cpu_memory=cpu_memory, disk_read=speed * 1e6, cpu=compute)


@cache
def _too_little(model: ModelSpec) -> int:
    """Return memory for two thirds of a model's weights, and for all else."""
    result = search(_machine(), model, replace(WORK, num_prompts=3))
    weights = sizes_of(model, None, DEFAULT_GROUP_SIZE).weight_bytes
    return result.predicted.peak_bytes["cpu"] - weights // 3


def _short(speed: float = 1.0, model: ModelSpec = MODEL) -> HardwareProfile:
    return _machine(speed, cpu_memory=_too_little(model))


def _plan(cluster: Cluster, model: ModelSpec, workload: Workload) -> ClusterPlan:
    question = ClusterQuestion(model=model, workload=workload, only_runnable=False)
    return ClusterSearch(question).run(cluster)


def _rate(plan: ClusterPlan) -> float:
    assert plan.predicted is not None
    return plan.predicted.throughput_tok_per_s


def _cluster(*machines: HardwareProfile, links: Links | None = None) -> Cluster:
    nodes = (Node(name=name, hardware=m) for name, m in zip("abcd", machines, strict=False))
    return Cluster(nodes=tuple(nodes), links=links or Links(default=LAN))


def _pair(source: str, target: str) -> PairLink:
    return PairLink(source=source, target=target, link=SLOW)


MIXTURE = make_mixture(tie_word_embeddings=False)
RING = (_pair("a", "b"), _pair("b", "c"), _pair("c", "a"))
CASES: dict[str, tuple[Callable[[], Cluster], ModelSpec]] = {
    "weights on disk": (lambda: _cluster(_short(), _short()), MODEL),
    "all in memory": (lambda: _cluster(_machine(), _machine()), MODEL),
    "uneven": (lambda: _cluster(_short(), _short(3.0), _short()), MODEL),
    "one with room": (lambda: _cluster(_short(), _machine(), _short()), MODEL),
    "slow network": (lambda: _cluster(_short(), _short(), links=Links(default=SLOW)), MODEL),
    "slow links": (
        lambda: _cluster(*[_short()] * 3, links=Links(default=LAN, pairs=RING)),
        MODEL,
    ),
    "a node too small": (lambda: _cluster(_machine(), _machine(cpu_memory=10**6)), MODEL),
    "mixture": (lambda: _cluster(_short(1.0, MIXTURE), _short(2.0, MIXTURE)), MIXTURE),
}


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_best_of_all(name: str) -> None:
    make, model = CASES[name]
    cluster = make()
    plan = _plan(cluster, model, WORK)
    assert _rate(plan) == pytest.approx(best_throughput(cluster, model, WORK), rel=1e-9)
    for copy in plan.copies:
        for stage in copy.stages:
            hardware = cluster.node(stage.node).hardware
            check_fits(estimate(stage.policy, hardware), hardware)
    assert sum(copy.share for copy in plan.copies) == pytest.approx(1)


def test_stages_that_fit_in_memory_are_more_than_twice_as_fast() -> None:
    """Alone, a machine reads a third of the weights from a slow disk in every pass."""
    one = search(_short(), MODEL, WORK).job_tok_per_s
    plan = _plan(_cluster(_short(), _short()), MODEL, WORK)
    assert [len(copy.stages) for copy in plan.copies] == [2]
    assert _rate(plan) > 2.5 * one


def test_machines_with_room_for_the_model_run_copies() -> None:
    plan = _plan(_cluster(*[_machine()] * 3), MODEL, WORK)
    assert [len(copy.stages) for copy in plan.copies] == [1, 1, 1]
    assert [copy.share for copy in plan.copies] == pytest.approx([1 / 3] * 3)


def test_a_slow_network_is_named() -> None:
    """Neither machine has room for the whole model, disk included."""
    machine = _short().with_budget(disk=0)
    links = Links(default=NodeLink(bytes_per_s=1e4))
    plan = _plan(_cluster(machine, machine, links=links), MODEL, WORK)
    assert plan.predicted is not None
    assert plan.predicted.limit == "the link from a to b"


@pytest.mark.parametrize(
    ("machine", "model", "workload"),
    [
        ("t4-flexgen", "opt-30b", Workload(prompt_len=512, gen_len=32)),
        ("rtx4090-pc", "llama-3.1-8b", Workload(prompt_len=64, gen_len=8, num_prompts=77)),
    ],
)
def test_one_node_is_the_plain_search(machine: str, model: str, workload: Workload) -> None:
    hardware, spec = recorded_profile(machine), load_model_spec(model)
    plan = _plan(equal_nodes(hardware, 1, LAN), spec, workload)
    alone = search(hardware, spec, workload)
    ((stage,),) = (copy.stages for copy in plan.copies)
    assert stage.policy == alone.policy
    assert _rate(plan) == alone.job_tok_per_s


def test_one_node_with_lanes_is_the_plain_search() -> None:
    rng = np.random.default_rng(0)
    lengths = Lengths(rng.integers(5, 60, 40), rng.integers(2, 90, 40))
    workload = Workload(
        prompt_len=int(lengths.prompts.max()),
        gen_len=int(lengths.limits.max()),
        num_prompts=40,
        lengths=lengths.sketch(),
    )
    hardware = recorded_profile("cpu-2core").with_budget(cpu_memory=4 * GIB)
    spec = load_model_spec("qwen2.5-0.5b")
    plan = _plan(equal_nodes(hardware, 1, LAN), spec, workload)
    alone = search(hardware, spec, workload)
    assert alone.policy.lanes is not None
    assert plan.copies[0].stages[0].policy == alone.policy


def test_copies_have_the_prompts_that_their_part_of_the_nodes_has() -> None:
    work = replace(WORK, num_prompts=30)
    plan = _plan(_cluster(*[_machine()] * 3), MODEL, work)
    assert [c.stages[0].policy.workload.num_prompts for c in plan.copies] == [10, 10, 10]
    assert plan.workload == work


def test_another_node_brings_what_a_larger_cluster_has() -> None:
    seek = ClusterSearch(ClusterQuestion(model=MODEL, workload=WORK, only_runnable=False))
    cluster = _cluster(_short(), _short(3.0))
    plan = seek.run(cluster, asks_one_more=True)
    assert plan.predicted is not None
    more = {found.like: found.throughput_tok_per_s for found in plan.predicted.one_more}
    larger = _cluster(_short(), _short(3.0), _short(3.0))
    assert list(more) == ["a", "b"]
    assert more["b"] == pytest.approx(_rate(_plan(larger, MODEL, WORK)))
    assert more["b"] > _rate(plan)


def test_nodes_that_differ_by_noise_are_asked_for_once() -> None:
    cluster = _cluster(_machine(1.0), _machine(1.03))
    seek = ClusterSearch(ClusterQuestion(model=MODEL, workload=WORK, only_runnable=False))
    plan = seek.run(cluster, asks_one_more=True)
    assert plan.predicted is not None
    assert [found.like for found in plan.predicted.one_more] == ["a"]


def test_a_model_that_fits_nowhere_is_said() -> None:
    machine = make_machine(cpu_memory=DECODER_BYTES, disk=0)
    with pytest.raises(InfeasibleError, match="does not fit on the 2 nodes"):
        _plan(_cluster(machine, machine), MODEL, WORK)
    with pytest.raises(InfeasibleError, match="is short by"):
        _plan(_cluster(machine), MODEL, WORK)
    with pytest.raises(InputError, match="positions"):
        _plan(_cluster(_machine()), make_model(max_positions=10), WORK)


def test_many_nodes_are_searched_in_teams() -> None:
    """Twelve machines with room for two thirds of the layers."""
    model = make_model(num_layers=24)
    machine = _short(1.0, model)
    cluster = equal_nodes(machine, 12, LAN)
    work = replace(WORK, num_prompts=None)
    plan = _plan(cluster, model, work)
    sizes = {len(copy.stages) for copy in plan.copies}
    assert sum(len(copy.stages) for copy in plan.copies) == 12 and min(sizes) > 1
    assert len(set(plan.nodes)) == 12
    for copy in plan.copies:
        counts = [stage.policy.model.num_layers for stage in copy.stages]
        assert sum(counts) == 24 and max(counts) - min(counts) <= 1


def test_stages_that_cannot_run_are_left_out() -> None:
    """Those with a GPU, and those whose cache has no room in memory."""
    gpu = make_machine(gpu_memory=10**9).gpu
    pipeline = Pipeline(num_stages=2, block_size=8)
    question = ClusterQuestion(model=MODEL, workload=WORK, margin=0.0)
    free, held = StagePrices(replace(question, only_runnable=False)), StagePrices(question)
    machine = replace(_machine(), gpu=gpu)
    found = [prices.price(machine, 0, (0, 2), pipeline, WORK) for prices in (free, held)]
    has_gpu = [stage and stage.policy.hardware and stage.policy.hardware.has_gpu for stage in found]
    assert has_gpu == [True, False]
    # So little memory that the cache is on disk.
    small = _machine(cpu_memory=40 * 10**6)
    large = Pipeline(num_stages=2, block_size=64)
    stage = free.price(small, 1, (0, 2), large, WORK)
    assert stage is not None and stage.policy.cache.disk > 0
    assert held.price(small, 1, (0, 2), large, WORK) is None
