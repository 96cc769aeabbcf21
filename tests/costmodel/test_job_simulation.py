"""Passes over lanes and whole jobs, against stages, ``estimate`` and a count of every pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from costmodel.plan.lengths import Lengths
from costmodel.plan.pages import PAGE
from costmodel.plan.policy import LanePolicy, Placement, Policy
from costmodel.plan.prefixes import Prefixes
from costmodel.plan.workload import Workload
from costmodel.pricing.limits import stage_limits
from costmodel.pricing.pass_stages import Reach, reach_of
from costmodel.pricing.passes import PassCounts, PassPrice, seconds_between_passes
from costmodel.pricing.price import estimate
from costmodel.pricing.problem import problem_of
from costmodel.pricing.shares import shares_of
from costmodel.pricing.stages import stages_of
from costmodel.schedule.admission import Admission
from costmodel.schedule.job_simulation import JobTimeline, simulate_job
from profiles.errors import InputError
from profiles.hardware import HardwareProfile
from profiles.recorded import find_profile
from tests.costmodel.lane_policies import CPU, lane_policy, models


def counts_of(policy: Policy, hardware: HardwareProfile, **values: float) -> PassCounts:
    """Return the counts of one pass, with equal ``slots``, ``stored`` and ``seen`` everywhere."""
    kinds = problem_of(policy, hardware).layer_kinds
    windows = {kind.cache.window for kind in kinds}
    reaches: set[Reach] = {reach_of(kind.spec.attention) for kind in kinds}

    def array(name: str) -> np.ndarray:
        return np.array([values.get(name, 0.0)], float)

    return PassCounts(
        decoding=array("decoding"),
        newcomers=array("newcomers"),
        prompt_tokens=array("prompt_tokens"),
        slots={window: array("slots") for window in windows},
        stored={window: array("stored") for window in windows},
        seen={reach: array("seen") for reach in reaches},
    )


@pytest.mark.parametrize("name", ["plain", "mixture", "3b"])
@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
def test_a_pass_of_decode_is_a_stage_of_one_pass(name: str, lanes: int) -> None:
    policy = lane_policy(models()[name])
    batches = max(1, lanes // 4)
    alone = replace(
        policy,
        gpu_batch_size=lanes // batches,
        num_gpu_batches=batches,
        prefill_batch_size=1,
    )
    problem, shares = problem_of(alone, CPU), shares_of(alone)
    stage = replace(
        stages_of(problem)[1],
        passes=1,
        tokens=1,
        context_tokens=123.5,
        stored_tokens=1,
    )
    expected = {k: v * lanes for k, v in stage_limits(problem, shares, stage).items()}
    counts = counts_of(policy, CPU, decoding=lanes, slots=lanes * 123.5)
    found = PassPrice(policy, CPU).limits(counts)
    assert found.keys() == expected.keys()
    for limit, seconds in expected.items():
        assert found[limit][0] == pytest.approx(seconds, rel=1e-6), limit


@pytest.mark.parametrize("name", ["plain", "windows", "3b"])
@pytest.mark.parametrize("scores", [None, 0])
def test_a_pass_of_prompts_is_the_stage_of_prefill(name: str, scores: int | None) -> None:
    workload = Workload(prompt_len=64, gen_len=2, prompt_logprobs=scores)
    # Four prompts of 64 tokens in one product.
    policy = lane_policy(
        models()[name],
        num_gpu_batches=1,
        workload=workload,
        lanes=LanePolicy(pool_tokens=10_000, pass_rows=1000, chunk_rows=256),
    )
    problem, shares = problem_of(policy, CPU), shares_of(policy)
    prefill = stages_of(problem)[0]
    expected = max(stage_limits(problem, shares, prefill).values()) * 4
    timeline = simulate_job(policy, CPU, Lengths([64] * 4, [2] * 4))
    assert timeline.trace.num_passes == 2
    expected += seconds_between_passes(CPU)
    assert timeline.seconds[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["plain", "windows", "mixture", "3b"])
@pytest.mark.parametrize("bits", [16, 4])
def test_equal_lengths_take_as_long_as_a_block_in_step(name: str, bits: int) -> None:
    # A batch of prompts is multiplied at once in both.
    policy = lane_policy(
        models()[name],
        num_gpu_batches=8,
        workload=Workload(prompt_len=32, gen_len=200),
        weight_bits=bits,
        cache_bits=bits,
        lanes=LanePolicy(pool_tokens=32 * 256, pass_rows=2000, chunk_rows=128),
    )
    timeline = simulate_job(policy, CPU, Lengths([32] * 32, [200] * 32))
    assert timeline.trace.num_passes == 200
    assert timeline.trace.waited == 0
    expected_s = estimate(replace(policy, lanes=None), CPU).latency_s
    expected_s += 200 * seconds_between_passes(CPU)
    assert timeline.total_s == pytest.approx(expected_s, rel=0.01)
    assert timeline.throughput_tok_per_s == pytest.approx(32 * 200 / expected_s, rel=0.01)


def brute_force(timeline: JobTimeline, lengths: Lengths, window: int) -> list[list[float]]:
    """Return lanes, newcomers, prompt tokens and slots without and with a window of each pass,
    counted sequence by sequence."""
    rows = [[0.0] * 5 for _ in range(timeline.trace.num_passes)]
    trace = timeline.trace
    columns = trace.requests, trace.admitted, trace.skipped
    for request, number, skipped in zip(*(x.tolist() for x in columns), strict=True):
        prompt = int(lengths.prompts[request])
        rows[number][1] += 1
        rows[number][2] += prompt - skipped
    runs = timeline.trace.runs
    for first, passes, slots in zip(runs.first, runs.passes, runs.slots, strict=True):
        for step in range(passes):
            rows[first + step][0] += 1
            rows[first + step][3] += slots + step
            rows[first + step][4] += min(slots + step, window)
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_every_sequence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40))
    prompts = np.clip(30 * np.exp(rng.normal(0, 1, count)), 1, 300).astype(int)
    answers = np.clip(20 * np.exp(rng.normal(0, 1, count)), 1, 200).astype(int)
    guesses = np.maximum(1, (answers * rng.choice([0.2, 1, 3], count)).astype(int))
    # Every second job has prompts that share 64 or 96 tokens.
    tokens = np.array([2, 3]) * PAGE
    numbers = np.where(prompts > 100, rng.integers(-1, 2, count), -1) if seed % 2 else None
    prefixes = None if numbers is None else Prefixes(numbers, tokens)
    lengths = Lengths(prompts, guesses, np.maximum(guesses, answers) + 5, prefixes=prefixes)
    policy = lane_policy(
        models()["windows"],
        lanes=LanePolicy(pool_tokens=int(rng.integers(600, 2500)), pass_rows=600, chunk_rows=64),
    )
    timeline = simulate_job(policy, CPU, lengths, answers=answers)
    counts = timeline.counts
    found = np.stack(
        [
            counts.decoding,
            counts.newcomers,
            counts.prompt_tokens,
            counts.slots[None],
            counts.slots[40],
        ]
    )
    assert found.T.tolist() == brute_force(timeline, lengths, 40)
    served = timeline.trace.requests
    # A prompt makes the first token of its answer.
    decoded = np.zeros(len(lengths), int)
    np.add.at(decoded, timeline.trace.runs.requests, timeline.trace.runs.passes)
    assert decoded[served].tolist() == (answers[served] - 1).tolist()
    assert timeline.generated_tokens == answers[served].sum()
    assert timeline.num_refused == count - len(served)
    pairs = zip(prompts[served].tolist(), timeline.trace.skipped.tolist(), strict=True)
    seen = [_seen_twice(p) - _seen_twice(skipped) for p, skipped in pairs]
    assert counts.seen[40, False].sum() == sum(seen)


def _seen_twice(tokens: int) -> int:
    return 2 * tokens * min(tokens, 40) - min(tokens, 40) ** 2


def test_a_shared_prefix_is_computed_and_kept_once() -> None:
    policy = lane_policy(
        models()["3b"],
        lanes=LanePolicy(pool_tokens=40 * PAGE, pass_rows=2000, chunk_rows=64),
    )
    alone = Lengths([16 * PAGE + 8] * 8, [20] * 8)
    shared = alone.sharing(Prefixes(np.zeros(8, np.int64), np.array([16 * PAGE])))
    before, after = (simulate_job(policy, CPU, lengths) for lengths in (alone, shared))
    # Two at a time, of 17 pages each; then all of them in 16 and 8.
    assert (before.trace.num_passes, after.trace.num_passes) == (4 * 20, 20)
    assert before.trace.most_pages == (34,) and after.trace.most_pages == (24,)
    assert after.trace.skipped.tolist() == [0] + [16 * PAGE] * 7
    assert before.counts.prompt_tokens.sum() == 8 * (16 * PAGE + 8)
    assert after.counts.prompt_tokens.sum() == 16 * PAGE + 8 * 8
    assert after.counts.slots[None].sum() == before.counts.slots[None].sum()
    assert after.counts.stored[None].sum() == 16 * PAGE + 8 * 8
    assert after.total_s < before.total_s / 3


@pytest.mark.parametrize("right", [True, False])
def test_passes_at_once_are_passes_one_by_one(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    answers = rng.integers(1, 150, 80)
    lengths = Lengths(
        rng.integers(1, 200, 80), answers if right else (answers + 2) // 3, answers * 2
    )
    policy = lane_policy(
        models()["windows"], lanes=LanePolicy(pool_tokens=1200, pass_rows=500, chunk_rows=64)
    )
    at_once = simulate_job(policy, CPU, lengths, answers=answers)
    monkeypatch.setattr(Admission, "skip", lambda self, most: 0)
    one_by_one = simulate_job(policy, CPU, lengths, answers=answers)
    assert at_once.seconds.tolist() == one_by_one.seconds.tolist()
    assert at_once.trace.waited == one_by_one.trace.waited
    assert at_once.trace.most_pages == one_by_one.trace.most_pages


def test_wrong_guesses_wait_and_cost_time() -> None:
    rng = np.random.default_rng(1)
    answers = rng.integers(50, 150, 60)
    policy = lane_policy(
        models()["3b"],
        lanes=LanePolicy(pool_tokens=900, pass_rows=600, chunk_rows=64),
    )
    prompts = np.full(60, 30)
    right = simulate_job(policy, CPU, Lengths(prompts, answers, answers * 4))
    guessed = Lengths(prompts, answers // 3, answers * 4)
    wrong = simulate_job(policy, CPU, guessed, answers=answers)
    assert wrong.trace.waited > right.trace.waited
    assert wrong.waiting_s > 0
    assert wrong.trace.most_pages[0] <= 900 // 32 + 1
    assert wrong.generated_tokens == right.generated_tokens == answers.sum()


def test_jobs_that_cannot_run_are_refused() -> None:
    policy = lane_policy(models()["plain"])
    with pytest.raises(InputError, match=r"policy\.lanes: got null"):
        simulate_job(replace(policy, lanes=None), CPU, Lengths([5], [5]))
    with pytest.raises(InputError, match="room for at least one"):
        simulate_job(policy, CPU, Lengths([5000], [5]))
    some = simulate_job(policy, CPU, Lengths([5000, 10], [5, 5]))
    assert (some.num_refused, some.generated_tokens) == (1, 5)


@pytest.mark.parametrize("machine", ["h100-80gb", "rtx4090-pc"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("plain", {"cache": Placement(gpu=0.5, cpu=0.5), "cpu_attention": 1.0}),
        ("windows", {"cache": Placement(gpu=1)}),
        ("mixture", {"cache": Placement(gpu=0.5, cpu=0.5), "loads_on_demand": True}),
        ("mixture", {"cache": Placement(cpu=1), "cpu_attention": 1.0, "cpu_experts": 1.0}),
    ],
)
@pytest.mark.parametrize("lanes", [4, 8])
def test_a_pass_beside_a_gpu_is_a_stage_of_one_pass(
    machine: str, name: str, changes: dict[str, object], lanes: int
) -> None:
    hardware = find_profile(machine)
    policy = lane_policy(
        models()[name],
        has_gpu=True,
        weights=Placement(gpu=0.5, cpu=0.5),
        activations=Placement(gpu=1),
        **changes,
    )
    alone = replace(policy, num_gpu_batches=lanes // 4)
    problem, shares = problem_of(alone, hardware), shares_of(alone)
    # The context is below every window.
    stage = replace(
        stages_of(problem)[1],
        passes=1,
        tokens=1,
        first_pass=1,
        context_tokens=16.0,
        stored_tokens=1,
    )
    expected = {k: v * lanes for k, v in stage_limits(problem, shares, stage).items()}
    counts = counts_of(policy, hardware, decoding=lanes, slots=lanes * 16.0)
    found = PassPrice(policy, hardware).limits(counts)
    assert found.keys() == expected.keys()
    for limit, seconds in expected.items():
        assert found[limit][0] == pytest.approx(seconds, rel=1e-6, abs=1e-15), limit
