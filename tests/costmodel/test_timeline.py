"""The simulated timeline: the program's seconds, plus waiting that it must not be blind to."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from costmodel.model.loading import load_model_spec
from costmodel.optimizer import waits
from costmodel.optimizer.optimum import search
from costmodel.plan.policy import Placement, Policy, placed_alike
from costmodel.plan.workload import Workload
from costmodel.pricing.price import check_fits, estimate, phase_channels
from costmodel.schedule.chrome_trace import write_trace
from costmodel.schedule.prediction import MOST_SIMULATED, predict
from costmodel.schedule.timeline import simulate
from profiles import InputError, recorded_profile
from profiles.emulate import with_emulated_gpu
from profiles.hardware import Contention
from tests.costmodel.machines import (
    DECODER_BYTES,
    HEAD_BYTES,
    ON_CPU,
    ON_DISK,
    ON_GPU,
    make_compute,
    make_machine,
    make_mixture,
    make_policy,
)

LONG = Workload(prompt_len=512, gen_len=32)


def test_weights_from_disk_by_hand() -> None:
    """One batch, no time but reading: as many passes as there are tokens, back to back."""
    machine = make_machine(disk_read=1e6)
    policy = make_policy(weights=ON_DISK, num_gpu_batches=1)
    timeline = simulate(policy, machine)
    assert timeline.latency_s == pytest.approx(5 * (8 * DECODER_BYTES + HEAD_BYTES) / 1e6, rel=1e-3)
    assert timeline.prefill_s == pytest.approx(timeline.latency_s / 5, rel=1e-3)


def test_channels_that_share_slow_each_other_down() -> None:
    """Reading keeps half of its rate beside computing, which keeps all of its own: two seconds of
    computing leave one second's worth of reading to be made up."""
    pair = Contention(first="disk_read", second="cpu_compute", first_keeps=0.5, second_keeps=1.0)
    seconds = 8 * DECODER_BYTES + HEAD_BYTES
    machine = make_machine(disk_read=seconds / 2, cpu=make_compute(overhead_s=1 / 20))
    policy = make_policy(
        weights=ON_DISK, num_gpu_batches=1, workload=Workload(prompt_len=16, gen_len=1)
    )
    alone = simulate(policy, machine).latency_s
    beside = simulate(policy, replace(machine, contention=(pair,))).latency_s
    computing = phase_channels(policy, machine)["prefill"]["cpu_compute"]
    assert computing > 0.1
    # The last chunk is computed when all has been read, so it disturbs nothing; the embedding,
    # which is a task of its own here, does.
    assert alone < beside <= alone + 0.55 * computing


@pytest.mark.parametrize(
    ("machine", "model", "workload"),
    [
        ("t4-flexgen", "opt-6.7b", LONG),
        ("t4-flexgen", "opt-30b", replace(LONG, num_prompts=7)),
        ("t4-flexgen", "opt-30b", LONG),
        ("t4-flexgen", "opt-175b", replace(LONG, num_prompts=96)),
        ("rtx3090-pc", "llama-3.1-70b", replace(LONG, num_prompts=120)),
        ("a100-80gb", "llama-3.1-70b", replace(LONG, num_prompts=50)),
        ("cpu-2core", "llama-3.2-3b", replace(LONG, num_prompts=20)),
    ],
)
def test_policies_of_the_search_take_what_the_program_says(
    machine: str, model: str, workload: Workload
) -> None:
    """Within 5 %: no term is missing where the program is taken at its word. Three passes stand
    for all, prefill and decode told apart."""
    hardware = recorded_profile(machine)
    if machine == "cpu-2core":
        hardware = hardware.with_budget(cpu_memory=4 * 10**9)
    spec = load_model_spec(model).with_dtype("float16" if hardware.has_gpu else "bfloat16")
    policy = search(hardware, spec, workload).policy
    predicted = estimate(policy, hardware)
    timeline = simulate(policy, hardware, num_passes=4)
    assert timeline.prefill_s == pytest.approx(predicted.prefill_s, rel=0.05)
    decode_s = (timeline.latency_s - timeline.prefill_s) / 3
    assert decode_s == pytest.approx(predicted.decode_s / (workload.gen_len - 1), rel=0.05)


def _random_placement(rng: random.Random) -> Placement:
    if rng.random() < 0.5:
        return rng.choice([ON_GPU, ON_CPU, ON_DISK])
    gpu = rng.random()
    cpu = rng.random() * (1 - gpu)
    return Placement(gpu=gpu, cpu=cpu, disk=1 - gpu - cpu)


@pytest.mark.parametrize("seed", range(24))
def test_any_policy_takes_about_what_the_program_says(seed: int) -> None:
    """Policies by chance, with one batch too: never faster than predicted beyond rounding, and
    at most 8 % slower on a model of 12 layers, where filling and draining show."""
    rng = random.Random(seed)
    batch = rng.choice([1, 4, 16, 64])
    model = replace(load_model_spec("opt-30b"), layer_order=(0,) * 12)
    policy = Policy(
        model=model,
        workload=Workload(prompt_len=rng.choice([16, 128, 512]), gen_len=rng.choice([2, 5, 9])),
        gpu_batch_size=batch,
        prefill_batch_size=min(batch, 4),
        num_gpu_batches=rng.choice([1, 2, 3, 6]),
        weights=placed_alike(model, _random_placement(rng)),
        cache=_random_placement(rng),
        activations=_random_placement(rng),
        cpu_attention=rng.choice([0.0, 0.5, 1.0]),
    )
    hardware = recorded_profile("t4-flexgen")
    predicted = estimate(policy, hardware)
    assert -0.02 < simulate(policy, hardware).latency_s / predicted.latency_s - 1 < 0.08


@pytest.mark.parametrize("seed", range(16))
def test_any_policy_of_a_mixture_takes_about_what_the_program_says(seed: int) -> None:
    """Experts loaded ahead and on demand, on the GPU, sent, and multiplied in CPU memory.

    They are placed apart from the rest, which is placed alike: loads are one layer ahead, so that
    those of a head that is placed apart are hidden less than the program says. At most 10 %
    slower, because attention alone is little to hide the loads of experts behind.
    """
    rng = random.Random(seed)
    batch = rng.choice([1, 4, 16, 64])
    policy = _mixture_policy(
        rng, batch, workload=Workload(prompt_len=rng.choice([16, 128, 512]), gen_len=17)
    )
    hardware = recorded_profile("t4-flexgen")
    predicted = estimate(policy, hardware)
    assert -0.02 < simulate(policy, hardware).latency_s / predicted.latency_s - 1 < 0.10


@pytest.mark.parametrize("seed", range(16))
def test_a_mixture_is_predicted_with_the_waits_of_its_schedule(seed: int) -> None:
    """Every component is placed apart. The first passes stand for all of them."""
    rng = random.Random(seed)
    batch = rng.choice([1, 4, 16, 64])
    policy = _mixture_policy(rng, batch, workload=Workload(prompt_len=64, gen_len=17))
    policy = replace(policy, weights={name: _random_placement(rng) for name in policy.weights})
    hardware = recorded_profile("t4-flexgen")
    limits, predicted = estimate(policy, hardware), predict(policy, hardware)
    simulated = simulate(policy, hardware)
    assert predicted.latency_s >= limits.latency_s
    assert predicted.latency_s == pytest.approx(simulated.latency_s, rel=0.02)
    assert predicted.prefill_s + predicted.decode_s == pytest.approx(predicted.latency_s)
    assert predicted.throughput_tok_per_s == pytest.approx(
        policy.block_size * policy.workload.gen_len / predicted.latency_s
    )


def test_dense_models_are_predicted_by_their_limits() -> None:
    hardware = recorded_profile("t4-flexgen")
    policy = make_policy(model=load_model_spec("opt-1.3b"), weights=ON_CPU, num_gpu_batches=1)
    assert predict(policy, hardware) == estimate(policy, hardware)


@pytest.mark.parametrize("gen_len", [1, 2, 30])
def test_a_mixture_of_short_answers_is_simulated_as_a_whole(gen_len: int) -> None:
    rng = random.Random(5)
    policy = _mixture_policy(rng, 4, workload=Workload(prompt_len=16, gen_len=gen_len))
    hardware = replace(recorded_profile("t4-flexgen"), unhidden_share=0.0)
    limits, predicted = estimate(policy, hardware), predict(policy, hardware)
    assert predicted.latency_s == pytest.approx(simulate(policy, hardware).latency_s, rel=0.02)
    # What calibration has found not to be hidden comes on top.
    worse = replace(hardware, unhidden_share=0.5)
    ratio = predict(policy, worse).latency_s / predicted.latency_s
    assert ratio == pytest.approx(estimate(policy, worse).latency_s / limits.latency_s, rel=0.05)


def test_very_large_passes_are_predicted_by_their_limits() -> None:
    hardware = recorded_profile("t4-flexgen")
    policy = _mixture_policy(random.Random(5), 4, workload=Workload(prompt_len=16, gen_len=4))
    policy = replace(policy, num_gpu_batches=MOST_SIMULATED // 40)
    assert predict(policy, hardware) == estimate(policy, hardware)


@pytest.mark.parametrize(
    ("machine", "budget"),
    [("t4-flexgen", {"gpu_memory": 2 * 10**9}), ("cpu-2core", {"cpu_memory": 10**9})],
)
def test_a_search_tells_the_waits_of_a_mixture(machine: str, budget: dict[str, int]) -> None:
    hardware = recorded_profile(machine).with_budget(**budget)
    workload = Workload(prompt_len=32, gen_len=16)
    result = search(
        hardware, _mixture_policy(random.Random(0), 1, workload=workload).model, workload
    )
    assert result.predicted == predict(result.policy, hardware)
    assert 0 < result.cost_of_waits < 0.5
    assert result.job_tok_per_s == pytest.approx(result.predicted.throughput_tok_per_s)
    assert -1e-9 <= result.gap < 0.05


def test_a_search_prefers_policies_that_do_not_wait_for_transfers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the limits alone, a cache in CPU memory and a share of the experts on a link are free."""
    hardware = with_emulated_gpu(
        recorded_profile("cpu-2core").with_budget(cpu_memory=4 * 10**9),
        memory_bytes=6 * 10**8,
        link_bytes_per_s=2e9,
    )
    apart = tuple(
        replace(pair, first_keeps=0.95, second_keeps=0.95)
        if {pair.first, pair.second} == {"gpu_compute", "cpu_compute"}
        else pair
        for pair in hardware.contention
    )
    hardware = replace(hardware, contention=apart)
    model = load_model_spec("granite-3.0-1b-a400m")
    workload = Workload(prompt_len=32, gen_len=16, num_prompts=64)
    found = search(hardware, model, workload)
    assert (found.policy.cpu_experts, found.policy.cache.gpu) == (1, 1)
    check_fits(found.predicted, hardware)
    monkeypatch.setattr(waits, "MOST_VARIED", 0)
    others = search(hardware, model, workload)
    assert found.job_tok_per_s > 1.05 * others.job_tok_per_s


def _mixture_policy(rng: random.Random, batch: int, *, workload: Workload) -> Policy:
    model = make_mixture(
        num_hidden_layers=16,
        hidden_size=2048,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=768,
        num_attention_heads=16,
        head_dim=128,
        vocab_size=4000,
        dtype="float16",
    )
    return make_policy(
        model=model,
        workload=workload,
        gpu_batch_size=batch,
        prefill_batch_size=min(batch, 4),
        num_gpu_batches=rng.choice([1, 2, 3]),
        weights={**placed_alike(model, _random_placement(rng)), "experts": _random_placement(rng)},
        cache=_random_placement(rng),
        activations=ON_GPU,
        cpu_attention=rng.choice([0.0, 0.5, 1.0]),
        cpu_experts=rng.choice([0.0, 0.0, 0.5, 1.0]),
        loads_on_demand=rng.random() < 0.5,
    )


@pytest.mark.parametrize("scored", [None, 0])
def test_every_channel_is_as_busy_as_predicted(scored: int | None) -> None:
    """Without contention, the tasks' seconds are the program's, dealt out to the last one."""
    hardware = recorded_profile("t4-flexgen")
    assert hardware.gpu is not None
    free = {
        name: replace(link, opposed_bytes_per_s=link.pinned_bytes_per_s)
        for name, link in (("h2d", hardware.gpu.h2d), ("d2h", hardware.gpu.d2h))
    }
    hardware = replace(hardware, gpu=replace(hardware.gpu, h2d=free["h2d"], d2h=free["d2h"]))
    thirds = Placement(gpu=0.3, cpu=0.3, disk=0.4)
    # The head is larger than a layer: it is cut in chunks.
    model = replace(load_model_spec("opt-6.7b"), layer_order=(0,) * 4, vocab_size=100_000)
    policy = Policy(
        model=model,
        workload=Workload(prompt_len=64, gen_len=40, prompt_logprobs=scored),
        gpu_batch_size=16,
        num_gpu_batches=2,
        prefill_batch_size=4,
        weights=placed_alike(model, thirds),
        cache=thirds,
        activations=thirds,
        cpu_attention=0.5,
    )
    timeline = simulate(policy, hardware)
    busy: dict[str, dict[str, float]] = {
        "prefill": defaultdict(float),
        "decode": defaultdict(float),
    }
    for timed in timeline.tasks:
        phase = "prefill" if timed.task.is_prefill else "decode"
        busy[phase][timed.task.channel] += timed.end_s - timed.start_s
    for phase, channels in phase_channels(policy, hardware).items():
        for channel, seconds in channels.items():
            # The gather of the embedding is counted with the layers.
            assert busy[phase][channel] == pytest.approx(seconds, rel=0.02), (phase, channel)


def test_a_timeline_is_a_chrome_trace(tmp_path: Path) -> None:
    timeline = simulate(make_policy(weights=ON_DISK), make_machine(disk_read=1e6))
    path = tmp_path / "trace.json"
    write_trace(path, timeline.tasks, label="predicted")
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == len(timeline.tasks)
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    end_us = max(event["ts"] + event["dur"] for event in slices)
    assert end_us == pytest.approx(max(t.end_s for t in timeline.tasks) * 1e6)
    assert {names[event["tid"]] for event in slices} == {"disk_read", "cpu_compute"}


def test_blocks_too_large_to_keep_are_refused() -> None:
    policy = make_policy(num_gpu_batches=10_000)
    with pytest.raises(InputError, match=r"--passes: got 5 .* at most 2"):
        simulate(policy, make_machine())
