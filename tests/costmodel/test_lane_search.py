"""The search over policies with lanes, against brute force, its bound and blocks in step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import DEFAULT_PERMITTED, Permitted
from costmodel.optimizer.fitting import fit
from costmodel.optimizer.job_throughput import seconds_in_step
from costmodel.optimizer.lane_bound import least_seconds
from costmodel.optimizer.lane_search import LaneSearch
from costmodel.optimizer.optimum import SearchResult, search
from costmodel.optimizer.program import Limits, Program
from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import LanePolicy, Placement, Policy, placed_alike
from costmodel.plan.prefixes import Prefixes
from costmodel.pricing.memory import capacities
from costmodel.pricing.price import block_seconds, estimate, policy_peaks
from costmodel.pricing.problem import Problem
from costmodel.schedule.job_simulation import simulate_job
from profiles.hardware import HardwareProfile
from profiles.recorded import find_profile
from profiles.units import GIB
from tests.costmodel.lane_policies import models
from tests.costmodel.test_lane_price import drawn, work_of

ON_CPU = Placement(cpu=1)


def machine(gib: float) -> HardwareProfile:
    """Return a recorded CPU with a budget."""
    return find_profile("cpu-2core").with_budget(cpu_memory=round(gib * GIB))


def found(
    lengths: Lengths, hardware: HardwareProfile, model: ModelSpec, permitted: Permitted
) -> SearchResult:
    """Search, and hold the result against its own prediction, its memory and its bound."""
    result = search(hardware, model, work_of(lengths), permitted=permitted)
    predicted = estimate(result.policy, result.hardware)
    assert result.predicted == predicted
    if result.policy.lanes is not None:
        assert result.job_tok_per_s == predicted.throughput_tok_per_s
    assert result.job_tok_per_s <= result.bound_tok_per_s
    for tier, capacity in capacities(result.hardware).items():
        assert predicted.peak_bytes[tier] <= capacity * (1 - result.margin)
    return result


def grid(lengths: Lengths, hardware: HardwareProfile, model: ModelSpec) -> Iterator[Policy]:
    """Yield policies with lanes that fit, with as many weights in memory as fit by eighths."""
    work = work_of(lengths)
    stored = np.sort(lengths.stored)[::-1]
    limits = {tier: c * 0.99 for tier, c in capacities(hardware).items()}
    for lanes, batches, share, more in itertools.product(
        (3, 8, 16, len(lengths)), (1, 2), (0.3, 0.6, 1.0), (0,)
    ):
        tokens = max(int(stored[0]), int(stored[:lanes].sum() * share))
        batch = -(-lanes // batches)
        rows = int(lengths.prompts.max()) + more + batch * batches
        for eighths in range(8, -1, -1):
            policy = Policy(
                model=model,
                workload=work,
                gpu_batch_size=batch,
                num_gpu_batches=batches,
                prefill_batch_size=1,
                weights=placed_alike(model, Placement(cpu=eighths / 8, disk=1 - eighths / 8)),
                cache=ON_CPU,
                activations=ON_CPU,
                lanes=LanePolicy(pool_tokens=tokens, pass_rows=rows),
            )
            peaks = policy_peaks(policy, hardware)
            if all(peaks[tier] <= limit for tier, limit in limits.items()):
                yield policy
                break


@pytest.mark.parametrize(("gib", "seed"), [(2.5, 1), (4.0, 2)])
def test_no_policy_of_a_grid_is_faster(gib: float, seed: int) -> None:
    lengths, hardware, model = drawn(seed, 24), machine(gib), load_model_spec("llama-3.2-3b")
    result = found(lengths, hardware, model, DEFAULT_PERMITTED)
    assert result.policy.lanes is not None
    rates = [estimate(p, hardware).throughput_tok_per_s for p in grid(lengths, hardware, model)]
    assert len(rates) > 8
    assert max(rates) <= result.bound_tok_per_s
    assert max(rates) <= result.job_tok_per_s * 1.01


@pytest.mark.parametrize("name", ["windows", "mixture", "3b"])
def test_the_program_and_the_bound_are_below_every_simulation(name: str) -> None:
    model, rng = models()[name], np.random.default_rng(5)
    hardware = machine(3.5 if name == "3b" else 0.6)
    lengths = drawn(7, 60)
    # Some answers may become longer than expected.
    lengths = Lengths(lengths.prompts, lengths.outputs, 2 * lengths.outputs).sketch().lengths()
    workload = work_of(lengths)
    several = Permitted(weight_bits=(16, 4), cache_bits=(16, 4))
    space = LaneSearch(hardware, model, workload)
    for problem in space.problems(several):
        bound_s = least_seconds(problem, space.lengths)
        lanes, batches = int(rng.integers(1, 30)), int(rng.integers(1, 3))
        longest = int(lengths.stored.max())
        problem = replace(
            problem,
            gpu_batch_size=lanes,
            num_batches=(batches, batches),
            lanes=LanePolicy(
                pool_tokens=longest + int(rng.integers(0, lanes * 200)),
                pass_rows=int(lengths.prompts.max()) + lanes * batches,
                chunk_rows=int(rng.choice([64, 256])),
            ),
        )
        program, size = Program(problem), lanes * batches
        relaxed = program.solve(Limits(block_sizes=(size, size)))
        fitted = fit(program, batches, max_latency_s=None)
        assert fitted is not None
        seconds = simulate_job(fitted[0], hardware, space.lengths).total_s
        assert relaxed.bound_per_sequence_s * len(lengths) <= seconds * (1 + 1e-6)
        assert bound_s <= seconds * (1 + 1e-6)


def test_lanes_are_taken_where_lengths_differ() -> None:
    lengths, hardware, model = drawn(4, 64), machine(4), load_model_spec("llama-3.2-3b")
    result = found(lengths, hardware, model, DEFAULT_PERMITTED)
    assert result.policy.lanes is not None
    assert result.policy.workload == work_of(lengths)
    in_step = search(hardware, model, replace(work_of(lengths), lengths=None)).policy
    assert in_step.lanes is None
    seconds = seconds_in_step(in_step, hardware, lengths)
    assert result.predicted.latency_s < seconds / 2
    # A limit for a block is for blocks.
    limited = search(hardware, model, work_of(lengths), max_latency_s=1e9).policy
    assert limited.lanes is None


def test_lanes_run_on_a_machine_without_its_gpu() -> None:
    lengths, model = drawn(4, 30), load_model_spec("llama-3.2-3b")
    policy = search(find_profile("a100-80gb"), model, work_of(lengths)).policy
    assert policy.lanes is None


def test_equal_lengths_are_as_fast_as_blocks_in_step() -> None:
    hardware, model = machine(4), load_model_spec("llama-3.2-3b")
    lengths = Lengths([64] * 40, [50] * 40)
    result = found(lengths, hardware, model, DEFAULT_PERMITTED)
    in_step = search(hardware, model, replace(work_of(lengths), lengths=None))
    assert result.job_tok_per_s == pytest.approx(in_step.job_tok_per_s, rel=0.05)
    assert result.policy.block_size == pytest.approx(in_step.policy.block_size, rel=0.1)


def test_fewer_bits_are_taken_where_they_are_permitted_and_faster() -> None:
    lengths, hardware, model = drawn(5, 24), machine(3), load_model_spec("llama-3.2-3b")
    plain = found(lengths, hardware, model, DEFAULT_PERMITTED)
    packed = found(lengths, hardware, model, Permitted(weight_bits=(16, 4)))
    assert packed.policy.lanes is not None
    assert packed.policy.weight_bits == 4
    assert packed.job_tok_per_s > 1.5 * plain.job_tok_per_s


def test_a_shared_prefix_makes_room_for_more_lanes() -> None:
    alone, hardware, model = drawn(5, 40), machine(4), load_model_spec("llama-3.2-3b")
    alone = Lengths(alone.prompts + 512, alone.outputs)
    shared = alone.sharing(Prefixes(np.zeros(40, np.int64), np.array([512])))
    results = [found(lengths, hardware, model, DEFAULT_PERMITTED) for lengths in (alone, shared)]
    first, second = (result.policy for result in results)
    assert first.lanes is not None and second.lanes is not None
    assert second.lanes.pool_tokens / second.block_size < first.lanes.pool_tokens / first.block_size
    assert results[1].job_tok_per_s > 1.3 * results[0].job_tok_per_s
    # A packed cache shares nothing.
    packed = replace(second, cache_bits=4)
    seconds = [simulate_job(packed, hardware, lengths).total_s for lengths in (alone, shared)]
    assert seconds[0] == seconds[1]


def test_blocks_in_step_are_priced_by_their_own_lengths() -> None:
    lengths, hardware = Lengths([40, 10, 30, 20, 10], [5, 8, 3, 9, 4]), machine(4)
    work = replace(work_of(lengths), lengths=None)
    model = models()["plain"]
    policy = Policy(
        model=model,
        workload=work,
        gpu_batch_size=2,
        num_gpu_batches=1,
        prefill_batch_size=2,
        weights=placed_alike(model, ON_CPU),
        cache=ON_CPU,
        activations=ON_CPU,
    )
    expected = 0.0
    for prompt_len, gen_len, size in ((40, 5, 2), (20, 9, 2), (10, 4, 1)):
        block = replace(
            policy,
            gpu_batch_size=size,
            prefill_batch_size=size,
            workload=replace(work, prompt_len=prompt_len, gen_len=gen_len, num_prompts=size),
        )
        expected += block_seconds(block, hardware)
    assert seconds_in_step(policy, hardware, lengths) == pytest.approx(expected)


def test_caches_go_to_disk_where_few_lanes_fit() -> None:
    """Memory has room for a few prompts of 600 tokens, and every pass reads most of the weights."""
    lengths, hardware = Lengths([600] * 24, [200] * 24), machine(1.6)
    model = load_model_spec("llama-3.2-3b")
    result = found(lengths, hardware, model, DEFAULT_PERMITTED)
    in_memory = MemoryOnly(result.hardware, model, work_of(lengths)).run(DEFAULT_PERMITTED)
    assert in_memory is not None
    assert in_memory.policy.cache == ON_CPU
    assert result.policy.cache.disk > 0
    assert result.policy.block_size > in_memory.policy.block_size
    assert result.predicted.latency_s < in_memory.seconds / 1.1


class MemoryOnly(LaneSearch):
    """A search that keeps all of the cache in memory."""

    def problems(self, permitted: Permitted) -> Iterator[Problem]:
        """Yield the problems without staging."""
        return (p for p in super().problems(permitted) if not p.stages_cache)
