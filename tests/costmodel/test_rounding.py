"""From fractions to rows: everything covered once, pages whole, nothing moved twice."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given

from costmodel.model.layout import CUT_ROWS, model_layers
from costmodel.model.loading import load_model_spec
from costmodel.optimizer.job_throughput import job_throughput
from costmodel.optimizer.optimum import search
from costmodel.plan.cuts import (
    Segment,
    cache_spec,
    cut_cache,
    cut_component,
    cut_hidden,
    place_weights,
)
from costmodel.plan.policy import Placement, Policy, placed_alike
from costmodel.plan.rounding import round_policy, roundings_of
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import peak_bytes
from costmodel.pricing.problem import problem_of
from costmodel.pricing.shares import shares_of
from profiles.aligned_io import PAGE_BYTES
from profiles.recorded import recorded_profile
from tests.costmodel.machines import ON_CPU, ON_DISK, ON_GPU, make_model, make_policy
from tests.costmodel.strategies import mixtures, placements, policies


def batch_segments(policy: Policy, *, has_gpu: bool) -> tuple[Segment, ...]:
    """Cut what a batch keeps in each of the layers, which all keep the same."""
    (cache,) = {cache_spec(policy, layer) for layer in policy.model.layer_kinds}
    return cut_cache(policy, cache, policy.gpu_batch_size, has_gpu=has_gpu)


@given(placements())
def test_weights_are_cut_where_they_should_be(placement: Placement) -> None:
    for layout in model_layers(make_model())[1].components:
        cut = cut_component(layout, placement)
        assert 0 <= cut.gpu_end <= cut.cpu_end <= layout.num_bytes == cut.num_bytes
        # Half of the rows of 512 columns that are kept together, and half of a vector.
        slack = CUT_ROWS * 512
        assert abs(cut.gpu_end - placement.gpu * layout.num_bytes) <= slack
        assert abs(cut.disk_bytes - placement.disk * layout.num_bytes) <= slack


@given(mixtures())
def test_experts_are_placed_whole(policy: Policy) -> None:
    """Between whole units, one more or less in a layer than in others. The last in memory run on
    the CPU. Those of equal size are together as near to the fractions as whole experts can be."""
    found = 0
    whole = Counter[str]()
    by_size: dict[int, Counter[str]] = {}
    placement = policy.weights["experts"]
    for component in itertools.chain(*place_weights(policy, has_gpu=True)):
        cut, size = component.cut, component.layout.unit_bytes
        if component.layout.name != "experts":
            assert not component.bytes_in_place and not component.units_in_place
            continue
        found += 1
        count = component.layout.num_units
        assert cut.gpu_end % size == cut.cpu_end % size == component.bytes_in_place % size == 0
        assert abs(cut.gpu_end / size - placement.gpu * count) < 1
        assert abs(cut.disk_bytes / size - placement.disk * count) < 1
        in_memory = range(cut.gpu_end // size, cut.cpu_end // size)
        in_place = component.units_in_place
        assert set(in_place) <= set(in_memory)
        assert not in_place or in_place[-1] == in_memory[-1]
        assert abs(len(in_place) - policy.cpu_experts * len(in_memory)) < 1
        equal = by_size.setdefault(size, Counter())
        equal.update({"gpu": cut.gpu_end // size, "disk": cut.disk_bytes // size, "all": count})
        whole.update({"in memory": len(in_memory), "in place": len(in_place)})
    for equal in by_size.values():
        assert abs(equal["gpu"] - placement.gpu * equal["all"]) <= 0.5
        assert abs(equal["disk"] - placement.disk * equal["all"]) <= 0.5
    assert abs(whole["in place"] - policy.cpu_experts * whole["in memory"]) <= 0.5
    assert found == sum(
        count for kind, count in policy.model.kinds_and_counts if kind.experts is not None
    )


@given(policies())
def test_cache_rows_are_covered_once(policy: Policy) -> None:
    segments = batch_segments(policy, has_gpu=True)
    row = 0
    for segment in segments:
        assert segment.first_row == row < segment.end_row
        row = segment.end_row
        assert segment.home == "gpu" or segment.attended in ("gpu", "cpu")
        assert not (segment.home == "gpu" and segment.attended == "cpu")
        if segment.home == "disk":
            assert segment.token_bytes % PAGE_BYTES == 0
        row_bytes = 2 * policy.model.layer(0).attention.head_dim * policy.model.dtype_bytes
        assert segment.token_bytes >= segment.num_rows * row_bytes
    assert row == policy.gpu_batch_size * policy.model.layer(0).attention.num_kv_heads


@given(policies())
def test_pages_on_disk_are_within_the_padding_of_the_memory_model(policy: Policy) -> None:
    problem = problem_of(policy, recorded_profile("t4-flexgen"))
    segments = batch_segments(policy, has_gpu=True)
    row_bytes = 2 * policy.model.layer(0).attention.head_dim * policy.model.dtype_bytes
    used = sum(s.num_rows * row_bytes for s in segments if s.home == "disk")
    taken = sum(s.token_bytes for s in segments if s.home == "disk")
    assert taken <= used * problem.disk_cache_padding * (1 + 1e-12)


@given(policies())
def test_all_or_nothing_is_attended_where_asked(policy: Policy) -> None:
    for share, place in ((0.0, "gpu"), (1.0, "cpu")):
        asked = replace(policy, cpu_attention=share)
        for segment in batch_segments(asked, has_gpu=True):
            assert segment.home == "gpu" or segment.attended == place


@given(policies())
def test_without_a_gpu_everything_is_attended_where_it_computes(policy: Policy) -> None:
    cpu_only = make_policy(model=policy.model, cache=Placement(cpu=0.5, disk=0.5))
    for segment in batch_segments(cpu_only, has_gpu=False):
        assert segment.attended == "cpu" and segment.home in ("cpu", "disk")


@given(policies())
def test_hidden_states_are_covered(policy: Policy) -> None:
    disk_end, cpu_end = cut_hidden(policy, policy.gpu_batch_size)
    assert 0 <= disk_end <= cpu_end <= policy.gpu_batch_size
    assert abs(disk_end - policy.activations.disk * policy.gpu_batch_size) <= 0.5


@given(policies() | mixtures())
def test_rounding_a_rounded_policy_changes_nothing(policy: Policy) -> None:
    once = round_policy(policy, has_gpu=True)
    twice = round_policy(once, has_gpu=True)
    parts = [c for layer in model_layers(policy.model) for c in layer.components]
    for tier in ("gpu", "cpu", "disk"):
        for kind in ("cache", "activations"):
            before, after = (getattr(getattr(p, kind), tier) for p in (once, twice))
            assert after == pytest.approx(before, abs=1e-9), (kind, tier)
        for name in policy.weights:
            # Components of different sizes (chunks of the head, layers in other encodings) may
            # round one fraction to either side, by one cut at most.
            of_name = [part for part in parts if part.name == name]
            differ = len({part.num_bytes for part in of_name}) > 1
            row = max(part.cut_bytes for part in of_name) * len(of_name) * differ
            slack = row / sum(part.num_bytes for part in of_name) + 1e-9
            before, after = (getattr(p.weights[name], tier) for p in (once, twice))
            assert after == pytest.approx(before, abs=slack), (name, tier)
    assert twice.cpu_experts == pytest.approx(once.cpu_experts, abs=1e-9)
    assert twice.cpu_attention == pytest.approx(once.cpu_attention, abs=1e-9)


@given(policies() | mixtures())
def test_peaks_hold_what_the_cuts_need(policy: Policy) -> None:
    """Count homes and staging from the cuts themselves; the memory model says no less."""
    hardware = recorded_profile("t4-flexgen")
    rounded = round_policy(policy, has_gpu=True)
    peaks = peak_bytes(problem_of(rounded, hardware), shares_of(rounded))
    layers = model_layers(policy.model)
    placed = place_weights(policy, has_gpu=True)
    cuts = [part.cut for parts in placed for part in parts]
    segments = batch_segments(policy, has_gpu=True)
    disk_end, cpu_end = cut_hidden(policy, policy.gpu_batch_size)
    context, batches = policy.workload.context_len, policy.num_gpu_batches
    sequence = policy.workload.prompt_len * policy.model.hidden_size * policy.model.dtype_bytes

    def cache_bytes(home: str) -> int:
        row = sum(s.token_bytes for s in segments if s.home == home)
        return row * context * batches * policy.model.num_layers

    def hidden_bytes(count: int) -> int:
        return count * batches * sequence

    # What a layer of the schedule stages, its components together.
    staged = [
        [part.cut for part in parts]
        for parts, layer in zip(placed, layers, strict=True)
        if layer.kind != "embed"
    ]
    fetched = sum(s.token_bytes for s in segments if s.home != "gpu" and s.attended == "gpu")
    needed = {
        "gpu": sum(cut.gpu_end for cut in cuts)
        + 2 * max(sum(cut.off_gpu_bytes for cut in parts) for parts in staged)
        + cache_bytes("gpu")
        + 2 * context * fetched
        + hidden_bytes(policy.gpu_batch_size - cpu_end),
        "cpu": sum(cut.cpu_end - cut.gpu_end for cut in cuts)
        + 2 * max(sum(cut.disk_bytes for cut in parts) for parts in staged)
        + cache_bytes("cpu")
        + 2 * context * sum(s.token_bytes for s in segments if s.home == "disk")
        + hidden_bytes(cpu_end - disk_end),
        "disk": sum(cut.disk_bytes for cut in cuts) + cache_bytes("disk") + hidden_bytes(disk_end),
    }
    for tier, count in needed.items():
        assert count <= peaks[tier], tier


@pytest.mark.parametrize("corner", [ON_GPU, ON_CPU, ON_DISK])
def test_corners_stay_corners(corner: Placement) -> None:
    policy = make_policy(weights=corner, cache=corner, activations=corner)
    rounded = round_policy(policy, has_gpu=True)
    assert rounded.weights == placed_alike(policy.model, corner)
    assert (rounded.cache, rounded.activations) == (corner, corner)


def test_part_of_a_page_on_disk_is_rounded_to_pages() -> None:
    # 8 sequences x 2 heads x 256 bytes: a page holds the 16 rows of one token.
    policy = make_policy(
        workload=Workload(prompt_len=4, gen_len=2),
        gpu_batch_size=8,
        cache=Placement(cpu=0.6, disk=0.4),
    )
    assert round_policy(policy, has_gpu=False).cache == ON_CPU


@given(policies())
def test_roundings_lie_within_one_unit_and_are_exact(policy: Policy) -> None:
    rows = policy.gpu_batch_size * policy.model.layer(0).attention.num_kv_heads
    unit = max(
        1, PAGE_BYTES // (2 * policy.model.layer(0).attention.head_dim * policy.model.dtype_bytes)
    )
    for option in roundings_of(policy, has_gpu=True):
        assert abs(option.cache.gpu - policy.cache.gpu) * rows < 1 + 1e-6
        assert abs(option.cache.disk - policy.cache.disk) * rows < unit + 1e-6
        rounded = round_policy(option, has_gpu=True)
        assert rounded.cache.gpu == pytest.approx(option.cache.gpu, abs=1e-9)
        assert rounded.cache.disk == pytest.approx(option.cache.disk, abs=1e-9)


def test_one_row_too_many_on_a_slow_cpu_is_not_taken() -> None:
    """A single prompt of a small model: whatever part the CPU attends is a whole row at least."""
    hardware = recorded_profile("rtx4090-pc")
    work = Workload(prompt_len=1024, gen_len=128, num_prompts=1)
    result = search(hardware, load_model_spec("opt-125m"), work)
    on_gpu = replace(result.policy, cache=ON_GPU)
    assert result.job_tok_per_s >= job_throughput(on_gpu, hardware)
