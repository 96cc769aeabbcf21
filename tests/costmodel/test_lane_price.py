"""The price of jobs over lanes: against blocks in step, and long jobs against all passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from costmodel.model.cache import cache_of
from costmodel.plan.lengths import Lengths
from costmodel.plan.pages import PAGE, pages_of
from costmodel.plan.policy import LanePolicy, Placement, Policy
from costmodel.plan.workload import Workload
from costmodel.pricing import lane_price
from costmodel.pricing.passes import seconds_between_passes
from costmodel.pricing.price import estimate, limits_by_phase, phase_channels, phase_seconds
from costmodel.schedule.job_simulation import simulate_job
from profiles.aligned_io import REQUEST_BYTES
from tests.costmodel.lane_policies import CPU, lane_policy, models


def work_of(lengths: Lengths) -> Workload:
    """Return the workload of a job."""
    return Workload(
        prompt_len=int(lengths.prompts.max()),
        gen_len=int(lengths.limits.max()),
        num_prompts=len(lengths),
        lengths=lengths.sketch(),
    )


def drawn(seed: int, count: int) -> Lengths:
    """Draw the lengths of a job."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(40 * np.exp(rng.normal(0, 1, count)), 1, 700).astype(int)
    return Lengths(prompts, np.clip(30 * np.exp(rng.normal(0, 0.8, count)), 1, 300).astype(int))


@pytest.mark.parametrize("name", ["plain", "windows", "mixture", "3b"])
def test_equal_lengths_are_priced_as_a_block_in_step(name: str) -> None:
    policy = lane_policy(
        models()[name],
        num_gpu_batches=8,
        workload=Workload(prompt_len=32, gen_len=200),
        lanes=LanePolicy(pool_tokens=32 * 256, pass_rows=2000, chunk_rows=128),
    )
    found, expected = estimate(policy, CPU), estimate(replace(policy, lanes=None), CPU)
    expected_s = expected.latency_s + 200 * seconds_between_passes(CPU)
    assert found.latency_s == pytest.approx(expected_s, rel=0.01)
    speed = expected.throughput_tok_per_s * expected.latency_s / expected_s
    assert found.throughput_tok_per_s == pytest.approx(speed, rel=0.01)
    assert found.bottleneck == expected.bottleneck
    assert found.channel_s == pytest.approx(expected.channel_s, rel=0.01)
    assert found.lower_bound_s == pytest.approx(expected.lower_bound_s, rel=0.02)
    assert (found.prefill_s, found.decode_s) == (0, found.latency_s)


def _policy(lengths: Lengths) -> Policy:
    return lane_policy(
        models()["3b"],
        workload=work_of(lengths),
        lanes=LanePolicy(pool_tokens=3000, pass_rows=2048, chunk_rows=256),
    )


def test_a_job_is_the_sum_of_its_passes() -> None:
    lengths = drawn(1, 40)
    policy, lengths = _policy(lengths), lengths.sketch().lengths()
    timeline = simulate_job(policy, CPU, lengths)
    found = estimate(policy, CPU)
    assert found.latency_s == pytest.approx(timeline.total_s)
    assert found.throughput_tok_per_s == pytest.approx(lengths.outputs.sum() / timeline.total_s)
    assert found.lower_bound_s <= found.latency_s
    assert phase_seconds(policy, CPU) == {"run": found.latency_s}
    assert phase_channels(policy, CPU) == {"run": found.channel_s}
    assert limits_by_phase(policy, CPU) == {"run": found.bottleneck}
    # Every pass reads what is on the disk.
    policy = replace(policy, workload=replace(policy.workload, lengths=None, num_prompts=1))
    once = estimate(policy, CPU).channel_s["disk_read"] / policy.workload.gen_len
    assert found.channel_s["disk_read"] == pytest.approx(once * timeline.trace.num_passes)


def test_a_long_job_is_priced_by_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = drawn(2, 1500)
    policy = _policy(lengths)
    sketch = policy.workload.lengths
    assert sketch is not None
    whole = simulate_job(policy, CPU, sketch.lengths())
    monkeypatch.setattr(lane_price, "LEAST_SIMULATED", 400)
    found = estimate(policy, CPU)
    assert found.latency_s == pytest.approx(whole.total_s, rel=0.03)
    assert found.throughput_tok_per_s == pytest.approx(whole.throughput_tok_per_s, rel=0.03)


@pytest.mark.parametrize("name", ["plain", "windows"])
def test_caches_on_disk_are_moved_in_whole_pages(name: str) -> None:
    """Eight lanes of 40 tokens, which decode 64 more."""
    lanes = LanePolicy(pool_tokens=8 * 128, pass_rows=2000, chunk_rows=128)
    work = work_of(Lengths([40] * 8, [65] * 8))
    policy = lane_policy(models()[name], workload=work, lanes=lanes)
    on_disk = replace(policy, cache=Placement(disk=1))
    found, expected = estimate(on_disk, CPU), estimate(policy, CPU)
    read = written = 0
    for kind, count in policy.model.kinds_and_counts:
        cache = cache_of(kind, 16, 64, 2)
        ring = pages_of(cache.window) if cache.window else 100
        pages = [min(ring, pages_of(40 + i)) for i in range(64)]
        read += count * cache.token_bytes * PAGE * 8 * sum(pages)
        written += count * cache.token_bytes * (PAGE * 8 * 64 + 8 * min(40, cache.window or 40))
    caches = [cache_of(kind, 16, 64, 2) for kind in policy.model.layer_kinds]
    page_bytes = PAGE * max(cache.token_bytes for cache in caches)
    seconds = {
        "disk_read": read / CPU.disk.read.at(REQUEST_BYTES),
        "disk_write": written / CPU.disk.write.at(page_bytes),
    }
    for channel, more in seconds.items():
        grown = found.channel_s[channel] - expected.channel_s[channel]
        # The last page of a ring that grows is half full in the mean of 32 passes.
        assert grown == pytest.approx(more, rel=1e-6 if name == "plain" else 0.05)
    assert found.channel_s["cpu_compute"] == pytest.approx(expected.channel_s["cpu_compute"])
