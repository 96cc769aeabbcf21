"""Costs of a model whose checkpoint is quantized: bytes and seconds counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from costmodel.cli.flags import choose_permitted
from costmodel.cli.policy_report import format_prediction
from costmodel.cli.stored_weights import stored_weights
from costmodel.model.encoded_model import without_encodings
from costmodel.model.layout import round_up
from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import Permitted
from costmodel.optimizer.optimum import search
from costmodel.plan.policy import Placement, Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.experts import experts_of, touched_bytes
from costmodel.pricing.matrices import matmul_rate, multiplied_bytes, routed_rate
from costmodel.pricing.memory import memory_rows
from costmodel.pricing.price import estimate
from costmodel.pricing.problem import Problem, problem_of
from costmodel.pricing.shares import shares_of
from costmodel.pricing.stages import Stage, stages_of
from costmodel.pricing.workspace import workspace_bytes
from profiles import ComputeRates, HardwareProfile, InputError, RateCurve, recorded_profile
from profiles.aligned_io import PAGE_BYTES
from profiles.units import MIB
from tests.costmodel.encoded_models import as_q4_k_m, encoded_alike
from tests.costmodel.machines import (
    DECODER_BYTES,
    FAST,
    HEAD_BYTES,
    ON_DISK,
    ON_GPU,
    make_compute,
    make_machine,
    make_mixture,
    make_model,
    make_policy,
)

ENCODED = as_q4_k_m(make_model())
# Rows of 256 elements, and of 512: a superblock has 144 bytes in Q4_K, 210 in Q6_K.
Q4, Q6 = 144, 210
# Queries, keys and values are 256, 128 and 128 rows; output 256; gate and up 1024; down 256 of 512.
NORM = 512
ATTENTION = NORM + (512 + 256) * Q4, NORM + (384 + 256) * Q4 + 128 * Q6
MLP = NORM + 1024 * Q4 + 256 * 2 * Q4, NORM + 1024 * Q4 + 256 * 2 * Q6
# One norm, 1000 rows, and padding to a cache line.
HEAD = NORM + 1000 * Q6 + 48
ALL = 4 * (sum(ATTENTION) + sum(MLP)) + HEAD
# Elements by their encoding, head included.
Q6_ELEMENTS = 4 * (128 * 256 + 256 * 512) + 1000 * 256
Q4_ELEMENTS = 8 * ((512 + 256 + 1024) * 256 + 256 * 512) - 4 * (128 * 256 + 256 * 512)
SEQUENCES, STEPS = 8, 4


def _problem(model: ModelSpec, hardware: HardwareProfile, **changes: object) -> Problem:
    return problem_of(make_policy(model=model, **changes), hardware)


def _decode(problem: Problem) -> Stage:
    return next(stage for stage in stages_of(problem) if not stage.is_prefill)


def _curve(rate: float) -> RateCurve:
    return RateCurve(sizes=(1.0, 4096.0), rates=(rate, rate))


def _rates(q4: float, q6: float, *, plain: float = FAST) -> ComputeRates:
    return replace(
        make_compute(flop=plain),
        encoded_matmul={"Q4_K": _curve(q4), "Q6_K": _curve(q6)},
        encoded_unpack_bytes_per_s={"Q4_K": q4, "Q6_K": q6},
        unpack_bytes_per_s=FAST,
    )


def test_components_have_the_bytes_of_their_encodings() -> None:
    sizes = _problem(ENCODED, make_machine()).sizes
    assert sizes.component_bytes == {
        "attention": 4 * sum(ATTENTION),
        "mlp": 4 * sum(MLP),
        "head": HEAD,
    }
    assert sizes.weight_bytes == ALL
    # Less than a third of the plain model's.
    assert 3 * ALL < 8 * DECODER_BYTES + HEAD_BYTES


def test_each_tier_has_its_share_of_those_bytes() -> None:
    parts = Placement(gpu=0.5, cpu=0.25, disk=0.25)
    policy = make_policy(model=ENCODED, weights=parts)
    machine = make_machine(gpu_memory=10**12, gpu=_rates(1.0, 1.0))
    rows = memory_rows(problem_of(policy, machine), shares_of(policy))
    for tier, share in (("gpu", 0.5), ("cpu", 0.25), ("disk", 0.25)):
        for terms in rows[tier].values():
            assert terms["weights"] * policy.block_size == pytest.approx(share * ALL)


def test_weights_move_in_the_bytes_of_the_file() -> None:
    predicted = estimate(make_policy(model=ENCODED, weights=ON_DISK), make_machine(disk_read=1e6))
    assert predicted.prefill_s == pytest.approx(ALL / 1e6)
    assert predicted.decode_s == pytest.approx(STEPS * ALL / 1e6)


def test_a_cpu_multiplies_each_matrix_at_the_rate_of_its_encoding() -> None:
    policy = make_policy(model=ENCODED)
    predicted = estimate(policy, make_machine(cpu=_rates(1e9, 2e9)))
    flop_s = 2 * (Q4_ELEMENTS / 1e9 + Q6_ELEMENTS / 2e9)
    assert predicted.decode_s == pytest.approx(SEQUENCES * STEPS * flop_s)
    # Of the last layer, each prompt's last token only is multiplied by what follows attention.
    last_s = 2 * ((256 + 1024) * 256 / 1e9 + 256 * 512 / 2e9)
    head_s = 2 * 1000 * 256 / 2e9
    prefill_s = 16 * (flop_s - head_s) - 15 * last_s + head_s
    assert predicted.prefill_s == pytest.approx(SEQUENCES * prefill_s)


def test_an_emulated_gpu_multiplies_as_a_cpu_and_unpacks_nothing() -> None:
    machine = make_machine(gpu_memory=10**12, gpu=_rates(1e9, 2e9))
    assert machine.gpu is not None
    emulated = replace(machine, gpu=replace(machine.gpu, emulated=True))
    policy = make_policy(model=ENCODED, weights=ON_GPU, cache=ON_GPU, activations=ON_GPU)
    predicted = estimate(policy, emulated)
    flop_s = 2 * (Q4_ELEMENTS / 1e9 + Q6_ELEMENTS / 2e9)
    assert predicted.decode_s == pytest.approx(SEQUENCES * STEPS * flop_s)
    rows = memory_rows(problem_of(policy, emulated), shares_of(policy))
    assert all(terms["unpacked weights"] == 0 for terms in rows["gpu"].values())


def test_a_real_gpu_unpacks_encoded_matrices_once_for_all_batches() -> None:
    machine = make_machine(gpu_memory=10**12, gpu=_rates(1e9, 2e9, plain=1e10))
    policy = make_policy(model=ENCODED, weights=ON_GPU, cache=ON_GPU, activations=ON_GPU)
    unpack_s = 2 * (Q4_ELEMENTS / 1e9 + Q6_ELEMENTS / 2e9)
    flop_s = 2 * (Q4_ELEMENTS + Q6_ELEMENTS) / 1e10
    predicted = estimate(policy, machine)
    assert predicted.decode_s == pytest.approx(STEPS * (unpack_s + SEQUENCES * flop_s))
    rows = memory_rows(problem_of(policy, machine), shares_of(policy))
    # A layer's matrices in bfloat16 are more than those of the head.
    unpacked = DECODER_BYTES - 2 * NORM
    for terms in rows["gpu"].values():
        assert terms["unpacked weights"] * policy.block_size == pytest.approx(unpacked)


def test_plain_matrices_of_a_mixed_model_are_not_unpacked() -> None:
    mixed = encoded_alike(make_model(), "Q4_K", "gate_up.weight")
    machine = make_machine(gpu_memory=10**12, gpu=_rates(1e9, 1.0))
    policy = make_policy(model=mixed, weights=ON_GPU, cache=ON_GPU, activations=ON_GPU)
    predicted = estimate(policy, machine)
    assert predicted.decode_s == pytest.approx(STEPS * 2 * 8 * 1024 * 256 / 1e9)


def test_an_unknown_kind_is_no_faster_than_its_bytes_are_read() -> None:
    few = RateCurve(sizes=(1.0, 64.0, 4096.0), rates=(1e9, 1e9, FAST))
    machine = make_machine(cpu=replace(make_compute(), packed_matmul={"bfloat16": few}))
    (tensor,) = (
        tensor
        for tensor in _problem(ENCODED, machine).sizes.layers[1].components[0].tensors
        if tensor.name == "output.weight"
    )
    assert tensor.encoding is not None
    for memory_rate, expected in ((FAST, 1e9), (1e6, 2 * 4 * 256 / Q4 * 1e6)):
        slow = replace(machine, cpu=replace(machine.cpu, memory_bytes_per_s=memory_rate))
        problem = _problem(ENCODED, slow)
        stage = _decode(problem)
        rate = matmul_rate(problem, stage, slow.cpu.compute, (4.0,), tensor)
        assert rate == pytest.approx(expected)


@pytest.mark.parametrize(("batch", "is_direct"), [(16, True), (17, False)])
def test_a_gpu_multiplies_few_rows_by_packed_weights(batch: int, is_direct: bool) -> None:
    """Unpacking takes time, if it is done."""
    cpu = replace(make_compute(), unpack_bytes_per_s=1e6)
    machine = make_machine(
        gpu_memory=10**12, gpu=replace(cpu, packed_matmul={"bfloat16": _curve(FAST)}), cpu=cpu
    )
    everything = {"weights": ON_GPU, "cache": ON_GPU, "activations": ON_GPU}
    policy = make_policy(weight_bits=4, gpu_batch_size=batch, num_gpu_batches=1, **everything)
    unpacked = DECODER_BYTES - 2 * NORM
    seconds = 0 if is_direct else STEPS * (8 * unpacked + HEAD_BYTES - NORM) / 1e6
    assert estimate(policy, machine).decode_s == pytest.approx(seconds, abs=1e-3)


@pytest.mark.parametrize("most", [64.0, 4096.0])
def test_a_cpu_that_multiplies_many_rows_by_packed_weights_unpacks_none(most: float) -> None:
    curve = RateCurve(sizes=(1.0, most), rates=(1e9, 1e9))
    cpu = replace(make_compute(flop=1e9), unpack_bytes_per_s=1e6, packed_matmul={"bfloat16": curve})
    machine = make_machine(cpu=cpu)
    plain = make_policy(gpu_batch_size=65, num_gpu_batches=1)
    packed = replace(plain, weight_bits=4)
    expected, found = estimate(plain, machine), estimate(packed, machine)
    unpacked = DECODER_BYTES - 2 * NORM
    pass_s = 0 if most > 65 else (8 * unpacked + HEAD_BYTES - NORM) / 1e6
    assert found.prefill_s - expected.prefill_s == pytest.approx(pass_s, rel=1e-3, abs=1e-6)
    assert found.decode_s - expected.decode_s == pytest.approx(STEPS * pass_s, rel=1e-3, abs=1e-6)
    # Without groups of 64 there is no such product.
    grouped = estimate(replace(packed, group_size=32), machine)
    assert grouped.prefill_s > expected.prefill_s + 1


def test_latent_attention_unpacks_its_encoded_matrix_for_each_batch() -> None:
    plain = without_encodings(load_model_spec("deepseek-v3"))
    encoded = encoded_alike(plain, "Q8_0", "kv_b.weight")
    products = {"Q8_0": RateCurve.constant(FAST)}
    cpu = replace(make_compute(), unpack_bytes_per_s=1e6, encoded_matmul=products)
    machine = make_machine(cpu=cpu)
    seconds = [estimate(make_policy(model=m), machine).decode_s for m in (plain, encoded)]
    (latents,) = {kind.attention.latent for kind in plain.layer_kinds}
    heads = plain.layer(0).attention.num_heads
    assert latents is not None
    elements = heads * (latents.nope_dim + latents.value_dim) * latents.rank
    unpacked_s = 2 * elements * plain.num_layers / 1e6
    # Two batches.
    assert seconds[1] - seconds[0] == pytest.approx(STEPS * 2 * unpacked_s)


def test_a_cpu_reads_the_bytes_of_each_component() -> None:
    """Experts in 4 bits, everything else in bfloat16, as gpt-oss ships it."""
    names = "expert_gate_up.weight", "expert_down.weight"
    problem = _problem(encoded_alike(make_mixture(), "MXFP4", *names), make_machine())
    stage = _decode(problem)
    # Gate and up are 256 rows of 256, down 256 rows of 128: blocks of 32 have 17 bytes.
    # An expert begins on a page.
    expert = round_up(256 * 8 * 17 + 256 * 4 * 17, PAGE_BYTES)
    attention = NORM + 2 * 64 * 2 + 2 * 256 * (512 + 256)
    router = NORM + 2 * 8 * 256
    # Two batches of four sequences attend apart, and pass through mixtures together.
    read = {kind: 8 * num_bytes for kind, num_bytes in multiplied_bytes(problem, stage).items()}
    assert read["finish"] == pytest.approx(STEPS * 2 * 4 * attention)
    assert read["head"] == pytest.approx(STEPS * 2 * HEAD_BYTES)
    (mixture,) = {kind.spec.experts for kind in problem.layer_kinds}
    assert mixture is not None
    needed = 4 * mixture.touched(max(stage.expert_tokens)) * expert
    assert touched_bytes(problem, stage) == pytest.approx(needed)
    assert read["experts"] == pytest.approx(STEPS * (4 * router + needed))


@pytest.mark.parametrize("count", [1, 2])
def test_batches_that_share_a_chunk_of_the_head_read_it_once(count: int) -> None:
    # Chunks of 32 MiB: 200,000 rows of 512 bytes are three.
    problem = _problem(make_mixture(vocab_size=200_000), make_machine(), prefill_batch_size=1)
    problem = replace(problem, num_batches=(count, count), gpu_batch_size=8 // count)
    sizes, stage = problem.sizes.component_bytes, _decode(problem)
    read = {kind: 8 * num_bytes for kind, num_bytes in multiplied_bytes(problem, stage).items()}
    assert read["finish"] == pytest.approx(STEPS * count * sizes["attention"])
    assert read["head"] == pytest.approx(STEPS * sizes["head"])
    # Prompts pass through the layers one by one, their last tokens through the head together.
    prefill = next(s for s in stages_of(problem) if s.is_prefill)
    of_prompts = multiplied_bytes(problem, prefill)
    assert 8 * of_prompts["finish"] == pytest.approx(8 * sizes["attention"])
    assert 8 * of_prompts["head"] == pytest.approx(sizes["head"])


def test_tiles_of_experts_are_multiplied_from_a_cache() -> None:
    """Only few rows of plain weights wait for the memory."""
    curve = RateCurve(sizes=(1.0, 256.0), rates=(1.0, 256.0))
    cpu = replace(make_compute(), matmul={"bfloat16": curve}, unpack_8bit_bytes_per_s=1e6)
    machine = make_machine(cpu=cpu)
    rates = []
    for bits in (16, 8):
        problem = _problem(make_mixture(), machine, weight_bits=bits)
        (experts, component, _) = next(experts_of(problem))
        (tensor, *_) = component.tensors
        rates.append(routed_rate(problem, _decode(problem), machine.cpu.compute, experts, tensor))
    assert rates[0] < 10 and rates[1] == 256


def test_staging_has_room_for_the_largest_of_each_component() -> None:
    """One layer has more bits in its attention, another in its MLP."""
    plain = make_model(num_layers=2)
    attention = encoded_alike(plain, "Q6_K", "qkv.weight", "output.weight")
    mlp = encoded_alike(plain, "Q6_K", "gate_up.weight", "down.weight")
    kinds = (attention.layer_kinds[0], mlp.layer_kinds[0])
    mixed = replace(plain, layer_kinds=kinds, layer_order=(0, 1))
    sizes = _problem(mixed, make_machine()).sizes
    staged = {c.name: c.num_bytes for c in sizes.staged_layers["attention and mlp"].components}
    assert staged == {
        "attention": NORM + 2 * 256 * (512 + 256),
        "mlp": NORM + 2 * (1024 * 256 + 256 * 512),
    }


def test_decoding_takes_a_constant_of_workspace() -> None:
    machine = make_machine()
    for phase in ("prefill", "decode"):
        plain = workspace_bytes(_problem(make_model(), machine), phase)
        assert workspace_bytes(_problem(ENCODED, machine), phase) == plain + 16 * MIB


def _searched(**changes: object) -> Policy:
    machine = replace(recorded_profile("cpu-2core"), unhidden_share=0.0)
    workload = Workload(prompt_len=16, gen_len=5, num_prompts=8)
    permitted = Permitted(**changes)  # type: ignore[arg-type]  # plain keyword table
    return search(machine, ENCODED, workload, permitted=permitted).policy


def test_a_second_quantization_is_refused_unless_asked_for() -> None:
    with pytest.raises(InputError, match="--weight-bits") as caught:
        _searched(weight_bits=(16, 4))
    assert "--requantize" in str(caught.value) and "\n" not in str(caught.value)
    assert _searched().weight_bits == 16
    policy = _searched(weight_bits=(4,), requantizes=True)
    assert policy.weight_bits == 4
    assert stored_weights(policy) is None


def test_requantize_needs_fewer_bits() -> None:
    with pytest.raises(InputError, match="--requantize"):
        choose_permitted(
            weight_bits=None, cache_bits=(4,), group_size=None, sparsity=None, requantizes=True
        )


def test_reports_say_what_is_stored() -> None:
    policy = make_policy(model=ENCODED)
    stored = stored_weights(policy)
    assert stored is not None
    q4, q6 = Q4_ELEMENTS * Q4 / 256, Q6_ELEMENTS * Q6 / 256
    assert stored.shares == pytest.approx({"Q4_K": q4 / (q4 + q6), "Q6_K": q6 / (q4 + q6)})
    assert stored.bits == pytest.approx(8 * (q4 + q6) / (Q4_ELEMENTS + Q6_ELEMENTS))
    machine = make_machine()
    text = format_prediction(policy, machine, estimate(policy, machine))
    assert "weights as stored: Q4_K 75%, Q6_K 25% of bytes, 4.9 bits an element" in text
    assert "in 16 bits; " not in text
