"""Seconds of each channel against counts made by hand, and the price of policies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from costmodel.memory import workspace_bytes
from costmodel.policy import Placement, Prediction
from costmodel.price import check_fits, estimate
from costmodel.problem import problem_of
from costmodel.workload import Workload
from profiles import HardwareProfile, InfeasibleError, InputError, RateCurve
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
    make_model,
    make_policy,
)

# Two batches of four; prompts of 16, so that four decode steps read 16, 17, 18, 19 tokens.
SEQUENCES, PROMPT, STEPS = 8, 16, 4
CONTEXT = 16 + 17 + 18 + 19
LAYERS = 8
TOKEN = CACHE_TOKEN_BYTES * LAYERS


def _price(machine: HardwareProfile, **changes: object) -> Prediction:
    return estimate(make_policy(**changes), machine)


def test_weights_on_disk_are_read_once_per_pass() -> None:
    predicted = _price(make_machine(disk_read=1e6), weights=ON_DISK)
    assert predicted.prefill_s == pytest.approx(SMALL_BYTES / 1e6)
    assert predicted.decode_s == pytest.approx(STEPS * SMALL_BYTES / 1e6)
    assert predicted.bottleneck == "disk_read"
    assert predicted.throughput_tok_per_s == pytest.approx(SEQUENCES * 5 / (5 * SMALL_BYTES / 1e6))


def test_cache_on_disk_is_read_in_decode_and_written_in_both() -> None:
    # 4 sequences x 512 bytes are half a page: on disk each token takes a whole one.
    padding = 4096 / (4 * CACHE_TOKEN_BYTES)
    assert padding == 2
    predicted = _price(make_machine(disk_read=1e6, disk_write=1e3), cache=ON_DISK)
    written = SEQUENCES * TOKEN * padding / 1e3
    assert predicted.prefill_s == pytest.approx(PROMPT * written)
    # The token of the last step is never attended to, so its keys are not stored.
    assert predicted.decode_s == pytest.approx((STEPS - 1) * written)
    assert predicted.channel_s["disk_read"] == pytest.approx(
        SEQUENCES * TOKEN * padding * CONTEXT / 1e6
    )


def test_links_carry_weights_down_and_cache_both_ways() -> None:
    machine = make_machine(gpu_memory=10**12, h2d=1e6, d2h=1e3)
    predicted = _price(machine, cpu_attention=0.0, activations=ON_GPU)
    assert predicted.channel_s["h2d"] == pytest.approx(
        (5 * SMALL_BYTES + SEQUENCES * TOKEN * CONTEXT) / 1e6
    )
    assert predicted.channel_s["d2h"] == pytest.approx(
        SEQUENCES * TOKEN * (PROMPT + STEPS - 1) / 1e3
    )


def test_attention_on_the_cpu_sends_queries_instead_of_the_cache() -> None:
    cpu = make_compute(decode=1e5)
    machine = make_machine(gpu_memory=10**12, h2d=1e6, d2h=1e3, cpu=cpu)
    predicted = _price(machine, cpu_attention=1.0, weights=ON_GPU, activations=ON_GPU)
    queries = SEQUENCES * STEPS * LAYERS * 256 * 2
    assert predicted.channel_s["h2d"] == pytest.approx(queries / 1e6)
    assert predicted.channel_s["d2h"] == pytest.approx(
        (SEQUENCES * TOKEN * (PROMPT + STEPS) + queries) / 1e3
    )
    assert predicted.channel_s["cpu_compute"] == pytest.approx(SEQUENCES * TOKEN * CONTEXT / 1e5)


def test_hidden_states_move_between_every_two_layers() -> None:
    machine = make_machine(gpu_memory=10**12, h2d=1e3, d2h=1e3)
    moved = SEQUENCES * 256 * 2 * (LAYERS + 1) / 1e3
    predicted = _price(machine, weights=ON_GPU, cache=ON_GPU)
    assert predicted.prefill_s == pytest.approx(PROMPT * moved)
    assert predicted.decode_s == pytest.approx(STEPS * moved)
    assert predicted.channel_s["h2d"] == pytest.approx(predicted.channel_s["d2h"])


def test_products_count_two_flop_an_element_and_the_head_once_a_pass() -> None:
    flop = 2 * LAYERS * (DECODER_BYTES / 2 - 2 * 256)
    head = 2 * (HEAD_BYTES / 2 - 256)
    predicted = _price(make_machine(cpu=make_compute(flop=1e6)))
    assert predicted.prefill_s == pytest.approx(SEQUENCES * (PROMPT * flop + head) / 1e6)
    assert predicted.decode_s == pytest.approx(SEQUENCES * STEPS * (flop + head) / 1e6)


def test_rates_depend_on_the_rows_of_each_phase() -> None:
    # Prefill multiplies 2 x 16 rows at once, decode and the head 4.
    slow = replace(
        make_compute(), matmul={"bfloat16": RateCurve(sizes=(4.0, 32.0), rates=(1e6, 1e9))}
    )
    predicted = _price(make_machine(cpu=slow))
    flop = 2 * LAYERS * (DECODER_BYTES / 2 - 2 * 256)
    head = 2 * (HEAD_BYTES / 2 - 256)
    assert predicted.prefill_s == pytest.approx(SEQUENCES * (PROMPT * flop / 1e9 + head / 1e6))
    assert predicted.decode_s == pytest.approx(SEQUENCES * STEPS * (flop + head) / 1e6)


def test_attention_of_both_phases() -> None:
    predicted = _price(make_machine(cpu=make_compute(attention=1e6, decode=1e5)))
    assert predicted.prefill_s == pytest.approx(SEQUENCES * 4 * PROMPT**2 * 256 * LAYERS / 1e6)
    assert predicted.decode_s == pytest.approx(SEQUENCES * TOKEN * CONTEXT / 1e5)


def test_every_task_costs_its_overhead() -> None:
    predicted = _price(make_machine(cpu=make_compute(overhead_s=1.0)))
    tasks_of_a_pass = (1 + LAYERS + 1) * 2
    # Prefill computes each batch of 4 in two parts, and launches a layer's operators for each.
    assert predicted.prefill_s == pytest.approx(2 * tasks_of_a_pass)
    assert predicted.decode_s == pytest.approx(STEPS * tasks_of_a_pass)


def test_one_token_needs_no_decode() -> None:
    work = Workload(prompt_len=16, gen_len=1)
    machine = make_machine(disk_read=1e6, disk_write=1e3)
    predicted = _price(machine, workload=work, cache=ON_DISK, weights=ON_DISK)
    assert predicted.decode_s == 0
    assert predicted.prefill_s == pytest.approx(SMALL_BYTES / 1e6)


def test_peak_by_hand_without_a_gpu() -> None:
    predicted = _price(make_machine())
    hidden = SEQUENCES * PROMPT * 256 * 2
    logits = SEQUENCES * 256 * 2 + 4 * 1000 * 4
    workspace = workspace_bytes(problem_of(make_policy(), make_machine()), "prefill")
    edges = 2 * (2 * 4096 + 512 * 2)
    cache = SEQUENCES * TOKEN * (PROMPT + STEPS)
    assert predicted.peak_bytes["cpu"] == pytest.approx(
        SMALL_BYTES + hidden + logits + workspace + edges + cache, rel=1e-6
    )


def test_what_does_not_fit_is_named() -> None:
    predicted = _price(make_machine())
    need = predicted.peak_bytes["cpu"]
    check_fits(predicted, make_machine(cpu_memory=need))
    with pytest.raises(InfeasibleError, match="cpu is short by 1 bytes"):
        check_fits(predicted, make_machine(cpu_memory=need - 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": Placement(gpu=0.5, cpu=0.5)}, "no GPU"),
        ({"cache": ON_GPU}, "no GPU"),
        ({"model": make_model(max_positions=20)}, "20 positions"),
        ({"model": make_model(dtype="float16")}, "bfloat16"),
        ({"weight_bits": 4}, "weight_bits"),
        ({"cache_bits": 8}, "cache_bits"),
        ({"attention_sparsity": 0.5}, "attention_sparsity"),
    ],
)
def test_refused_policies(changes: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        _price(make_machine(), **changes)


def test_rounding_comes_before_the_price() -> None:
    machine = make_machine(gpu_memory=10**12, h2d=1e6)
    nearly = Placement(gpu=0.999, cpu=0.001)
    whole = _price(machine, cache=ON_GPU, activations=ON_GPU, weights=ON_GPU)
    rounded = _price(machine, cache=nearly, activations=ON_GPU, weights=ON_GPU)
    assert rounded == whole
    assert _price(machine, cache=ON_CPU, activations=ON_GPU, weights=ON_GPU) != whole
