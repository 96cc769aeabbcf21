"""More of anything never costs throughput, a tighter limit never gains any."""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest

from costmodel.model.loading import load_model_spec
from costmodel.optimizer.choices import MAX_BLOCK_SIZE, Permitted, problems_of
from costmodel.optimizer.job_throughput import job_throughput
from costmodel.optimizer.optimum import SearchResult, search
from costmodel.optimizer.program import Limits, solve
from costmodel.optimizer.solver import Infeasible
from costmodel.optimizer.tree import NEARLY_AS_FAST
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import capacities, with_capacities
from costmodel.pricing.rates import RATES
from costmodel.search import main
from profiles import HardwareProfile, InfeasibleError, recorded_profile
from profiles.hardware import Contention

CASES = {
    "t4": ("t4-flexgen", "opt-30b", (512, 32, 96), {"cpu": 80 * 10**9}),
    "disk": ("rtx4090-pc", "llama-3.1-70b", (100, 20, 8), {"cpu": 40 * 10**9}),
    "laptop": ("cpu-2core", "llama-3.2-3b", (128, 8, 64), {"cpu": 4 * 10**9}),
    "one prompt": ("rtx3090-pc", "llama-2-13b", (100, 20, 1), {"gpu": 8 * 10**9}),
}
FACTORS = (1.01, 1.3, 3.0)
RESOURCES = ("gpu", "cpu", "disk", *RATES)


def _more(hardware: HardwareProfile, resource: str, factor: float) -> HardwareProfile:
    if resource in RATES:
        return RATES[resource].scale(hardware, factor)
    capacity = capacities(hardware).get(resource, 0)
    return with_capacities(hardware, {resource: int(capacity * factor)} if capacity else {})


def _asked(case: str) -> tuple[HardwareProfile, Workload]:
    machine, _, (prompt_len, gen_len, num_prompts), budget = CASES[case]
    workload = Workload(prompt_len=prompt_len, gen_len=gen_len, num_prompts=num_prompts)
    return with_capacities(recorded_profile(machine), budget), workload


def _search(case: str, hardware: HardwareProfile, limit_s: float | None = None) -> SearchResult:
    _, workload = _asked(case)
    return search(hardware, load_model_spec(CASES[case][1]), workload, max_latency_s=limit_s)


@functools.cache
def _found(case: str) -> SearchResult:
    return _search(case, _asked(case)[0])


def _relaxed_tok_per_s(case: str, hardware: HardwareProfile) -> float:
    """Solve every problem once with its block size free: the bound before any branching."""
    _, workload = _asked(case)
    best = 0.0
    for problem in problems_of(hardware, load_model_spec(CASES[case][1]), workload, Permitted()):
        most = -(-(workload.num_prompts or MAX_BLOCK_SIZE) // problem.gpu_batch_size)
        sizes = (problem.gpu_batch_size, most * problem.gpu_batch_size)
        try:
            solution = solve(problem, Limits(block_sizes=sizes))
        except Infeasible:
            continue
        best = max(best, workload.gen_len / solution.bound_per_sequence_s)
    return best


@pytest.mark.parametrize("resource", RESOURCES)
@pytest.mark.parametrize("case", CASES)
def test_more_never_costs_throughput(case: str, resource: str) -> None:
    hardware, _ = _asked(case)
    rng = random.Random(f"{case} {resource}")
    richer = _more(hardware, resource, rng.choice(FACTORS))
    before, after = _found(case), _search(case, richer)
    # What fits the poorer machine fits the richer one, and is no slower there.
    assert before.job_tok_per_s <= after.bound_tok_per_s * (1 + 1e-6)
    # Rounding to rows and whole batches, and stopping near the optimum, is not monotone to the
    # last digit.
    assert after.job_tok_per_s >= before.job_tok_per_s * (1 - NEARLY_AS_FAST)


@pytest.mark.parametrize("case", ["laptop", "one prompt"])
def test_more_never_costs_the_bound(case: str) -> None:
    hardware, _ = _asked(case)
    before = _relaxed_tok_per_s(case, hardware)
    for resource in RESOURCES:
        for factor in FACTORS[:2]:
            after = _relaxed_tok_per_s(case, _more(hardware, resource, factor))
            assert after >= before * (1 - 1e-6), (resource, factor)


@pytest.mark.parametrize("case", CASES)
def test_a_tighter_limit_never_gains(case: str) -> None:
    hardware, free = _asked(case)[0], _found(case)
    looser = free.job_tok_per_s
    bound = free.bound_tok_per_s
    for share in (0.95, 0.6, 0.3):
        limit_s = share * free.predicted.latency_s
        try:
            held = _search(case, hardware, limit_s)
        except InfeasibleError as error:
            assert "--max-latency" in str(error) and "\n" not in str(error)
            continue
        assert held.predicted.latency_s <= limit_s
        assert held.job_tok_per_s <= looser * (1 + NEARLY_AS_FAST)
        assert held.job_tok_per_s <= bound * (1 + 1e-6)
        looser = held.job_tok_per_s


def test_a_limit_that_does_not_bind_changes_nothing() -> None:
    free = _found("laptop")
    held = _search("laptop", _asked("laptop")[0], 2 * free.predicted.latency_s)
    assert held.job_tok_per_s == pytest.approx(free.job_tok_per_s, rel=NEARLY_AS_FAST)


def test_what_a_machine_lacks_is_none_of_it() -> None:
    """No GPU memory is no GPU; no disk is only memory; the answer is a policy either way."""
    hardware, _ = _asked("one prompt")
    without_gpu = _search("one prompt", with_capacities(hardware, {"gpu": 0}))
    assert without_gpu.policy.hardware is not None and not without_gpu.policy.hardware.has_gpu
    assert without_gpu.job_tok_per_s <= _found("one prompt").job_tok_per_s
    without_disk = _search("one prompt", with_capacities(hardware, {"disk": 0}))
    assert all(placement.disk == 0 for placement in without_disk.policy.weights.values())
    assert without_disk.policy.cache.disk == 0
    assert without_disk.predicted.peak_bytes["disk"] == 0
    with pytest.raises(InfeasibleError, match="cpu is short by") as caught:
        _search("one prompt", with_capacities(hardware, {"cpu": 0}))
    assert "\n" not in str(caught.value)


def test_a_gigabyte_is_not_a_gibibyte_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    budgets = {}
    for size in ("8GB", "8GiB"):
        main(
            [
                "--hardware",
                "cpu-2core",
                "--model",
                "llama-3.1-8b",
                "--prompt-len",
                "64",
                "--gen-len",
                "8",
                "--num-prompts",
                "32",
                "--cpu-memory",
                size,
                "--output",
                f"{size}.json",
            ]
        )
        policy = Policy.load(tmp_path / f"{size}.json")
        assert policy.hardware is not None and policy.predicted is not None
        budgets[size] = (policy.hardware.cpu.memory_bytes, policy.predicted)
    assert (budgets["8GB"][0], budgets["8GiB"][0]) == (8 * 10**9, 8 * 2**30)
    small, large = budgets["8GB"][1], budgets["8GiB"][1]
    assert small.peak_bytes["cpu"] <= 8 * 10**9 < large.peak_bytes["cpu"] <= 8 * 2**30
    assert small.throughput_tok_per_s < large.throughput_tok_per_s


def test_zero_gpu_memory_and_zero_disk_are_legal_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for lacks_gpu, flags in ((True, ("--gpu-memory", "0")), (False, ("--disk", "0GiB"))):
        main(
            [
                "--hardware",
                "t4-flexgen",
                "--model",
                "opt-6.7b",
                "--num-prompts",
                "4",
                *flags,
            ]
        )
        policy = Policy.load(tmp_path / "policy.json")
        assert policy.hardware is not None
        assert policy.hardware.has_gpu is not lacks_gpu


def test_margin_is_left_free() -> None:
    hardware, workload = _asked("laptop")
    model = load_model_spec(CASES["laptop"][1])
    rates = []
    for margin in (0.0, 0.01, 0.1):
        found = search(hardware, model, workload, margin=margin)
        peaks = found.predicted.peak_bytes
        for tier, capacity in capacities(hardware).items():
            assert peaks[tier] <= capacity * (1 - margin)
        rates.append(found.job_tok_per_s)
    assert rates[0] > rates[1] > rates[2]
    assert found.policy.hardware == replace(hardware, measurements=())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_little_gpu_is_never_worse_than_none(dtype: str) -> None:
    machine = recorded_profile("rtx4090-pc" if dtype == "bfloat16" else "t4-flexgen")
    model = load_model_spec("opt-6.7b").with_dtype(dtype)
    workload = Workload(prompt_len=64, gen_len=16, num_prompts=4)
    rates = [
        search(machine.with_budget(gpu_memory=size), model, workload).job_tok_per_s
        for size in (0, 10**8, 10**9, 4 * 10**9)
    ]
    for less, more in itertools.pairwise(rates):
        assert more >= less * (1 - NEARLY_AS_FAST)


def test_a_machine_without_its_gpu_keeps_no_contention_with_it() -> None:
    pairs = (
        Contention(first="h2d", second="cpu_compute", first_keeps=0.8, second_keeps=0.9),
        Contention(first="disk_read", second="cpu_compute", first_keeps=0.8, second_keeps=0.9),
    )
    machine = replace(recorded_profile("rtx4090-pc"), contention=pairs)
    model = load_model_spec("llama-3.2-1b")
    workload = Workload(prompt_len=64, gen_len=16, num_prompts=4)
    assert search(machine.with_budget(gpu_memory=0), model, workload).job_tok_per_s > 0


@pytest.mark.parametrize(("num_prompts", "fraction"), [(3, 1.0), (7, 1.0), (7, 1.4)])
def test_a_limit_holds_for_a_block_not_for_its_share_of_the_job(
    num_prompts: int, fraction: float
) -> None:
    """With a limit in which a block of two just fits, three prompts take two blocks."""
    machine = recorded_profile("cpu-2core").with_budget(cpu_memory=8 * 2**30)
    model = load_model_spec("opt-6.7b").with_dtype("bfloat16")
    two = search(machine, model, Workload(prompt_len=64, gen_len=8, num_prompts=2))
    job = Workload(prompt_len=64, gen_len=8, num_prompts=num_prompts)
    # Rounding another optimum of equal latency to rows moves it by some 1e-4.
    limit_s = two.predicted.latency_s * fraction * (1 + 1e-3)
    by_hand = replace(two.policy, workload=job)
    found = search(machine, model, job, max_latency_s=limit_s)
    assert found.predicted.latency_s <= limit_s
    rate = job_throughput(by_hand, machine)
    assert rate <= found.bound_tok_per_s * (1 + 1e-6)
    assert rate <= found.job_tok_per_s * (1 + NEARLY_AS_FAST)
