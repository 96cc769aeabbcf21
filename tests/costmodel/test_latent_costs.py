"""The cost of latent attention, by hand for DeepSeek V3."""

from __future__ import annotations

from dataclasses import replace

import pytest

from costmodel.model.encoded_model import without_encodings
from costmodel.model.layout import model_layers
from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.arithmetic import attention_seconds, matmul_seconds
from costmodel.pricing.latency import stage_work
from costmodel.pricing.memory import memory_rows
from costmodel.pricing.problem import Problem, problem_of
from costmodel.pricing.shares import shares_of
from costmodel.pricing.stages import stages_of
from profiles.compute_rates import ComputeRates
from tests.costmodel.machines import (
    ON_CPU,
    ON_GPU,
    make_compute,
    make_machine,
    make_policy,
)

V3 = without_encodings(load_model_spec("deepseek-v3"))
WORKLOAD = Workload(prompt_len=100, gen_len=11)
# A row has 512 elements of the latent and 64 with the position, of 2 bytes.
ROW_BYTES = 2 * (512 + 64)


def policy_of(model: ModelSpec, **changes: object) -> Policy:
    return make_policy(model=model, workload=WORKLOAD, **changes)


def problem_with(model: ModelSpec, compute: ComputeRates) -> Problem:
    return problem_of(policy_of(model), make_machine(cpu=compute))


def test_a_token_takes_a_row_in_each_layer() -> None:
    problem = problem_with(V3, make_compute())
    assert problem.unpacked_token_bytes == 61 * ROW_BYTES
    # The cache has no slot for the last token, which nothing attends to.
    assert problem.cache_sequence_bytes == 61 * ROW_BYTES * 110
    rows = memory_rows(problem, shares_of(policy_of(V3)))["cpu"]
    assert all(terms["cache"] == 61 * ROW_BYTES * 110 for terms in rows.values())
    # Groups of 64 in 4 bits: half a byte an element, and 4 bytes a group.
    packed = replace(problem, cache_bits=4)
    assert packed.layer_kinds[0].cache.token_bytes == 576 // 2 + 4 * 9


def test_parts_of_a_layer_have_the_sizes_of_the_config() -> None:
    (attention,) = model_layers(V3)[1].components[:1]
    shapes = {tensor.name: tensor.shape for tensor in attention.tensors}
    assert shapes == {
        "attention_norm.weight": (7168,),
        "q_a_norm.weight": (1536,),
        "kv_a_norm.weight": (512,),
        "qkv.weight": (1536 + 512 + 64, 7168),
        "q_b.weight": (128 * 192, 1536),
        "kv_b.weight": (128 * 256, 512),
        "output.weight": (7168, 128 * 128),
    }


def test_products_of_a_prompt_expand_every_latent() -> None:
    flop = 1e12
    problem = problem_with(V3, make_compute(flop=flop))
    prefill, *decode = stages_of(problem)
    before = (1536 + 576) * 7168 + 128 * 192 * 1536
    expanding, output = 128 * 256 * 512, 7168 * 128 * 128
    projected = matmul_seconds(problem, prefill, problem.hardware.cpu.compute).project
    assert projected == pytest.approx(61 * 100 * 2 * (before + expanding) / flop)
    dense = 3 * 7168 * 18432
    steps = [matmul_seconds(problem, stage, problem.hardware.cpu.compute) for stage in decode]
    # Decode multiplies queries by the key half, and the result by the value half.
    assert sum(step.project for step in steps) == pytest.approx(
        61 * 10 * 2 * (before + expanding / 2) / flop
    )
    finished = 61 * (output + expanding / 2) + 3 * dense
    assert sum(step.finish for step in steps) == pytest.approx(10 * 2 * finished / flop)


def test_a_cpu_transposes_the_key_rows_for_each_batch() -> None:
    compute = replace(make_compute(), unpack_bytes_per_s=1e9)
    problem = problem_with(V3, compute)
    decode = stages_of(problem)[1:]
    seconds = sum(matmul_seconds(problem, stage, compute).project for stage in decode)
    # In batches of four, ten times: 128 rows of 512 elements of each head and layer.
    assert seconds == pytest.approx(61 * 10 * 2 * 128 * 128 * 512 / 1e9 / 4)
    policy = policy_of(V3, weights=ON_GPU, cache=ON_GPU, activations=ON_GPU)
    on_gpu = problem_of(policy, make_machine(gpu_memory=10**15, gpu=compute))
    assert matmul_seconds(on_gpu, decode[0], compute).project == pytest.approx(0, abs=1e-9)


def test_attention_takes_the_longer_of_reading_and_computing() -> None:
    read_slots = sum(100 + t - 1 for t in range(1, 11))
    # Each of 128 heads multiplies 576 elements of a row, then 512.
    flop, num_bytes = 2 * 128 * (576 + 512) * read_slots, ROW_BYTES * read_slots
    for compute, expected in (
        (make_compute(flop=1e12, decode=1e11), 61 * flop / 1e12),
        (make_compute(flop=1e15, decode=1e9), 61 * num_bytes / 1e9),
    ):
        problem = problem_with(V3, compute)
        decode = stages_of(problem)[1:]
        rates = problem.hardware.cpu.compute
        found = sum(attention_seconds(problem, stage, rates) for stage in decode)
        assert found == pytest.approx(expected)
    problem = problem_with(V3, make_compute(attention=1e12))
    prefill = stages_of(problem)[0]
    found = attention_seconds(problem, prefill, problem.hardware.cpu.compute)
    # Values of 128 are padded to the 192 of keys; a rate counts the whole square.
    assert found == pytest.approx(61 * 4 * 128 * 192 * 100**2 / 1e12)


def test_the_link_carries_latent_queries_down_and_latents_up() -> None:
    policy = policy_of(V3, cpu_attention=1.0, weights=ON_GPU, cache=ON_CPU, activations=ON_GPU)
    machine = make_machine(gpu_memory=10**15, h2d=1e9, d2h=1e9)
    problem = problem_of(policy, machine)
    _, *decode = stages_of(problem)
    work = [{w.kind: w for w in stage_work(problem, shares_of(policy), s)} for s in decode]
    down = sum(w["return_queries"].memory_bytes or 0 for w in work)
    up = sum(w["send_attended"].memory_bytes or 0 for w in work)
    # A head's query is as wide as a row, and beside them goes the new row.
    assert down == pytest.approx(61 * 10 * 2 * (128 * 576 + 576))
    assert up == pytest.approx(61 * 10 * 2 * 128 * 512)


def test_a_sparse_cache_keeps_no_sums() -> None:
    """Its rows are all read as keys, so that their mean costs no further read."""
    policy, machine = policy_of(V3, attention_sparsity=0.1), make_machine()
    rows = memory_rows(problem_of(policy, machine), shares_of(policy))["cpu"]
    assert all(terms["value sums"] == 0 for terms in rows.values())
    compute = make_compute(decode=1e9)
    dense = problem_with(V3, compute)
    seconds = [
        attention_seconds(problem, stages_of(problem)[1], compute)
        for problem in (dense, replace(dense, attention_sparsity=0.1))
    ]
    assert seconds[1] == pytest.approx(seconds[0])


def test_the_scale_has_the_factor_of_long_contexts() -> None:
    """DeepSeek V3 multiplies it by (0.1 ln 40 + 1) squared."""
    scale = V3.layer(0).attention.scale
    assert scale == pytest.approx(192**-0.5 * 1.3688879454113936**2)
    rotary = V3.layer(0).attention.rotary
    assert rotary is not None and (rotary.dim, rotary.attention_factor) == (64, 1.0)
