"""Seconds of each channel against counts made by hand, and the price of policies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from costmodel.model.layout import CUT_ROWS
from costmodel.plan.policy import Placement, Prediction, placed_alike
from costmodel.plan.workload import Workload
from costmodel.pricing.price import check_executable, check_fits, estimate, phase_channels
from costmodel.pricing.problem import problem_of
from costmodel.pricing.workspace import workspace_bytes
from profiles import HardwareProfile, InfeasibleError, InputError, RateCurve
from tests.costmodel.machines import (
    AMPLE,
    CACHE_TOKEN_BYTES,
    DECODER_BYTES,
    HEAD_BYTES,
    ON_CPU,
    ON_DISK,
    ON_GPU,
    SMALL_BYTES,
    make_compute,
    make_machine,
    make_mixture,
    make_model,
    make_policy,
)

# Two batches of four; prompts of 16, so that four decode steps read 16, 17, 18, 19 tokens.
SEQUENCES, PROMPT, STEPS = 8, 16, 4
CONTEXT = 16 + 17 + 18 + 19
LAYERS = 8
TOKEN = CACHE_TOKEN_BYTES * LAYERS
# Of the last layer, only each prompt's last token is multiplied by what follows attention: all but
# the stacked projections, 512 rows of 256.
LAYER_FLOP = 2 * (DECODER_BYTES / 2 - 2 * 256)
PREFILL_FLOP = PROMPT * LAYERS * LAYER_FLOP - (PROMPT - 1) * (LAYER_FLOP - 2 * 512 * 256)


def _price(machine: HardwareProfile, **changes: object) -> Prediction:
    return estimate(make_policy(**changes), machine)


def test_weights_on_disk_are_read_once_per_pass() -> None:
    predicted = _price(make_machine(disk_read=1e6), weights=ON_DISK)
    assert predicted.prefill_s == pytest.approx(SMALL_BYTES / 1e6)
    assert predicted.decode_s == pytest.approx(STEPS * SMALL_BYTES / 1e6)
    assert predicted.bottleneck == "disk_read"
    assert predicted.throughput_tok_per_s == pytest.approx(SEQUENCES * 5 / (5 * SMALL_BYTES / 1e6))


def test_the_first_layer_passes_disk_and_link_before_the_gpu_begins() -> None:
    machine = make_machine(
        gpu_memory=10**12, disk_read=1e8, h2d=4e8, gpu=make_compute(flop=1e9, attention=1e9)
    )
    parts = Placement(gpu=0.5, cpu=0.25, disk=0.25)
    predicted = _price(machine, weights=parts, cache=ON_GPU, activations=ON_GPU)
    fill_s = 0.25 * DECODER_BYTES / 1e8 + 0.5 * DECODER_BYTES / 4e8
    flop = PREFILL_FLOP + 2 * (HEAD_BYTES / 2 - 256)
    square = 4 * PROMPT**2 * 256 * LAYERS
    computed_s = SEQUENCES * (flop + square) / 1e9
    assert computed_s > 0.25 * SMALL_BYTES / 1e8
    assert predicted.prefill_s == pytest.approx(fill_s + computed_s, rel=1e-4)
    # The channels themselves are busy for no longer than their own work.
    assert predicted.lower_bound_s < predicted.latency_s


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
    assert predicted.prefill_s == pytest.approx(SEQUENCES * (PREFILL_FLOP + head) / 1e6)
    assert predicted.decode_s == pytest.approx(SEQUENCES * STEPS * (flop + head) / 1e6)


# Prompts whose tokens are scored.
SCORED = Workload(prompt_len=PROMPT, gen_len=STEPS + 1, prompt_logprobs=0)


def test_scored_prompts_pass_the_last_layer_and_the_head_whole() -> None:
    flop = 2 * LAYERS * (DECODER_BYTES / 2 - 2 * 256)
    head = 2 * (HEAD_BYTES / 2 - 256)
    predicted = _price(make_machine(cpu=make_compute(flop=1e6)), workload=SCORED)
    assert predicted.prefill_s == pytest.approx(SEQUENCES * PROMPT * (flop + head) / 1e6)
    assert predicted.decode_s == pytest.approx(SEQUENCES * STEPS * (flop + head) / 1e6)


def test_every_chunk_of_the_head_loads_the_scored_tokens() -> None:
    model = make_model(vocab_size=5003)  # two chunks
    machine = make_machine(gpu_memory=10**12, h2d=1e3, d2h=1e3)
    predicted = _price(machine, model=model, weights=ON_GPU, cache=ON_GPU, workload=SCORED)
    moved = SEQUENCES * 256 * 2 / 1e3
    stored = moved * (LAYERS + 1) * (PROMPT + STEPS)
    assert predicted.channel_s["d2h"] == pytest.approx(stored)
    assert predicted.channel_s["h2d"] == pytest.approx(stored + moved * PROMPT)


def test_scores_are_counted_where_they_are_kept() -> None:
    """A score takes some bytes, each alternative 12; the logits of one tile come and go."""
    plain = replace(SCORED, prompt_logprobs=None, num_prompts=100)
    peaks = [
        _price(make_machine(), workload=replace(plain, prompt_logprobs=num_top)).peak_bytes["cpu"]
        for num_top in (None, 0, 10)
    ]
    assert peaks[1] - peaks[0] > 1024 * (1000 * (4 + 2) + 256 * (4 + 2 + 2))
    in_flight, kept = SEQUENCES * PROMPT, 100 * PROMPT
    assert peaks[2] - peaks[1] == (in_flight + kept) * 10 * 12


def test_rates_depend_on_the_rows_of_each_phase() -> None:
    # Prefill multiplies 2 x 16 rows at once, decode and the head 4.
    slow = replace(
        make_compute(), matmul={"bfloat16": RateCurve(sizes=(4.0, 32.0), rates=(1e6, 1e9))}
    )
    predicted = _price(make_machine(cpu=slow))
    flop = 2 * LAYERS * (DECODER_BYTES / 2 - 2 * 256)
    head = 2 * (HEAD_BYTES / 2 - 256)
    assert predicted.prefill_s == pytest.approx(SEQUENCES * (PREFILL_FLOP / 1e9 + head / 1e6))
    assert predicted.decode_s == pytest.approx(SEQUENCES * STEPS * (flop + head) / 1e6)


def test_attention_of_both_phases() -> None:
    predicted = _price(make_machine(cpu=make_compute(attention=1e6, decode=1e5)))
    assert predicted.prefill_s == pytest.approx(SEQUENCES * 4 * PROMPT**2 * 256 * LAYERS / 1e6)
    assert predicted.decode_s == pytest.approx(SEQUENCES * TOKEN * CONTEXT / 1e5)


def test_cache_from_disk_is_attended_as_it_lies_there() -> None:
    """Half of the cache is on disk and comes token by token; only attention costs anything."""
    rates = replace(make_compute(decode=1e5), attention_by_token={"full": 0.25})
    # Batches so large that half of their rows fill whole pages.
    half = {"cache": Placement(cpu=0.5, disk=0.5), "gpu_batch_size": 8 * 4}
    by_row_s = SEQUENCES * TOKEN * CONTEXT / 1e5
    predicted = _price(make_machine(cpu=rates), **half)
    assert predicted.decode_s == pytest.approx(8 * (0.5 + 0.5 / 0.25) * by_row_s)


def test_many_queries_for_each_element_slow_attention_down() -> None:
    by_row_s = SEQUENCES * TOKEN * CONTEXT / 1e5
    many = replace(make_compute(decode=1e5), attention_many_queries={"full": 0.5})
    model = make_model(head_dim=64, num_heads=16, num_kv_heads=2)
    assert _price(make_machine(cpu=many), model=model).decode_s == pytest.approx(2 * by_row_s)


def test_every_task_costs_its_overhead() -> None:
    predicted = _price(make_machine(cpu=make_compute(overhead_s=1.0)))
    # Two batches of 4. Prefill computes each in two parts and launches the operators of the
    # embedding and of a layer for each; the head, in one chunk, takes a batch at once.
    assert predicted.prefill_s == pytest.approx(2 * (2 * (1 + LAYERS) + 1))
    assert predicted.decode_s == pytest.approx(STEPS * 2 * (1 + LAYERS + 1))


def test_a_mixture_copies_a_row_for_each_token_and_expert() -> None:
    """In both phases, two experts of each token in four layers, rows of 256 elements."""
    rates = replace(make_compute(), grouping_bytes_per_s=1e5)
    predicted = _price(make_machine(cpu=rates), model=make_mixture())
    row_s = 2 * 2 * 256 / 1e5
    # The last layer of prefill passes on each prompt's last token only.
    assert predicted.prefill_s == pytest.approx(SEQUENCES * (3 * PROMPT + 1) * row_s)
    assert predicted.decode_s == pytest.approx(SEQUENCES * 4 * STEPS * row_s)


@pytest.mark.parametrize(
    ("batches", "batch", "share", "chunks"), [(2, 4, 1.0, 8), (2, 4, 0.5, 4), (1, 1, 1.0, 2)]
)
def test_every_chunk_of_experts_costs_half_of_a_layer(
    batches: int, batch: int, share: float, chunks: int
) -> None:
    """Of one expert each: all of the eight on disk, or the two of a single token."""
    machine = make_machine(cpu=make_compute(overhead_s=1.0))
    base = make_policy(model=make_mixture(), loads_on_demand=True)
    base = replace(base, num_gpu_batches=batches, gpu_batch_size=batch, prefill_batch_size=1)
    decode_s = []
    for disk in (0.0, share):
        weights = {**base.weights, "experts": Placement(cpu=1 - disk, disk=disk)}
        channels = phase_channels(replace(base, weights=weights), machine)
        decode_s.append(channels["decode"]["cpu_compute"])
    assert decode_s[1] - decode_s[0] == pytest.approx(STEPS * 4 * chunks / 2)


def test_a_cpu_unpacks_the_experts_that_it_multiplies_beside_a_gpu() -> None:
    model = make_mixture()
    gpu, cpu = (replace(make_compute(), unpack_8bit_bytes_per_s=r) for r in (1e5, 1e6))
    machine = make_machine(gpu_memory=AMPLE, gpu=gpu, cpu=cpu)
    in_memory = {**placed_alike(model, ON_GPU), "experts": Placement(cpu=1)}
    policy = make_policy(
        model=model,
        weights=in_memory,
        cache=ON_GPU,
        activations=ON_GPU,
        weight_bits=8,
        cpu_experts=1.0,
    )
    (mixture,) = {kind.experts for kind in model.layer_kinds}
    assert mixture is not None
    # Gate and up are 256 rows of 256 and down is 256 rows of 128.
    unpacked = 2 * (256 * 256 + 256 * 128) * mixture.touched(SEQUENCES)
    seconds, others = (
        phase_channels(replace(policy, cpu_experts=share), machine)["decode"] for share in (1, 0.25)
    )
    assert seconds["cpu_compute"] == pytest.approx(STEPS * 4 * unpacked / 1e6, rel=1e-3)
    # The GPU unpacks the others only.
    unpacked_s = others["gpu_compute"] - seconds["gpu_compute"]
    assert unpacked_s == pytest.approx(0.75 * STEPS * 4 * unpacked / 1e5, rel=1e-3)


def test_a_layer_that_hands_attention_down_is_two_tasks() -> None:
    machine = make_machine(gpu_memory=AMPLE, gpu=make_compute(overhead_s=1.0))
    predicted = _price(machine, activations=ON_GPU, cpu_attention=1.0)
    assert predicted.decode_s == pytest.approx(STEPS * 2 * (1 + 2 * LAYERS + 1))
    # Prefill attends on the GPU.
    assert predicted.prefill_s == pytest.approx(2 * (2 * (1 + LAYERS) + 1))


def test_every_chunk_of_the_head_is_a_task() -> None:
    # 5003 rows of 512 bytes are about twice a layer: two chunks.
    model = make_model(vocab_size=5003)
    predicted = _price(make_machine(cpu=make_compute(overhead_s=1.0)), model=model)
    assert predicted.decode_s == pytest.approx(STEPS * 2 * (1 + LAYERS + 2))


@pytest.mark.parametrize("has_gpu", [False, True])
def test_logits_pass_three_times_through_the_memory_of_the_device_that_computes(
    has_gpu: bool,
) -> None:
    machine = make_machine(gpu_memory=10**12 if has_gpu else None)
    if machine.gpu is not None:
        machine = replace(machine, gpu=replace(machine.gpu, memory_bytes_per_s=1e6))
    else:
        machine = replace(machine, cpu=replace(machine.cpu, memory_bytes_per_s=1e6))
    home = ON_GPU if has_gpu else ON_CPU
    predicted = _price(machine, weights=home, cache=home, activations=home)
    logits = SEQUENCES * 1000 * 4 * 3 / 1e6
    device = "gpu_compute" if has_gpu else "cpu_compute"
    assert predicted.channel_s[device] == pytest.approx(5 * logits)
    if has_gpu:
        # Where the CPU computes, reading its weights through that memory takes longer.
        assert predicted.prefill_s == pytest.approx(logits)
        assert predicted.decode_s == pytest.approx(STEPS * logits)


def test_memory_of_the_cpu_is_shared_by_all_that_passes_it() -> None:
    """All weights are read from memory for every batch computed, beside what comes from disk."""
    machine = make_machine(disk_read=1e9)
    machine = replace(machine, cpu=replace(machine.cpu, memory_bytes_per_s=1e6))
    predicted = _price(machine, weights=ON_DISK)
    # A pass of decode: the disk's bytes once, the layers' for each of two batches; and the cache.
    moved = STEPS * (1 + 2) * SMALL_BYTES + SEQUENCES * TOKEN * CONTEXT
    assert predicted.decode_s == pytest.approx(moved / 1e6)
    assert predicted.bottleneck == "cpu_memory"
    # Prefill computes two sequences at a time, four times, and attends to no cache. The head takes
    # two batches.
    moved = (1 + 4) * SMALL_BYTES - 2 * HEAD_BYTES
    assert predicted.prefill_s == pytest.approx(moved / 1e6)


def test_one_batch_passes_the_channels_one_after_another() -> None:
    """With a single batch nothing hides its own queries, attention and hidden states."""
    machine = make_machine(
        gpu_memory=10**12,
        h2d=1e6,
        d2h=2e6,
        cpu=make_compute(decode=1e6),
        gpu=make_compute(flop=1e9),
    )
    predicted = _price(machine, num_gpu_batches=1, weights=ON_GPU, cpu_attention=1.0)
    sequences = 4
    flop = 2 * LAYERS * (DECODER_BYTES / 2 - 2 * 256) + 2 * (HEAD_BYTES / 2 - 256)
    queries = LAYERS * 256 * 2
    new_rows = LAYERS * CACHE_TOKEN_BYTES
    hidden = (LAYERS + 1) * 256 * 2
    step_s = flop / 1e9 + (queries + new_rows + hidden) / 2e6 + (queries + hidden) / 1e6
    attend_s = TOKEN * CONTEXT / 1e6
    assert predicted.decode_s == pytest.approx(sequences * (STEPS * step_s + attend_s))
    assert predicted.bottleneck == "one batch in series"
    assert predicted.lower_bound_s < predicted.latency_s


def test_quantized_bytes_and_their_unpacking() -> None:
    """Four bits in groups of 64 with a scale and a minimum of 16 bits: 36 bytes for 64."""
    rates = replace(make_compute(), unpack_bytes_per_s=1e6)
    machine = make_machine(disk_read=1e3, cpu=rates)
    predicted = _price(machine, weights=ON_DISK, cache=ON_DISK, weight_bits=4, cache_bits=4)
    matrices = 2 * (LAYERS * (DECODER_BYTES / 2 - 2 * 256) + (HEAD_BYTES / 2 - 256))
    vectors = 2 * (LAYERS * 2 * 256 + 256)
    packed = matrices * (36 / 64) / 2 + vectors
    # A token of a batch is 4 x 2 heads x 2 x 36 bytes: on disk a whole page.
    cache = 2 * LAYERS * CONTEXT * 4096
    assert predicted.channel_s["disk_read"] == pytest.approx((5 * packed + cache) / 1e3)
    unpacked = 5 * matrices + SEQUENCES * TOKEN * (CONTEXT + PROMPT + STEPS - 1)
    assert predicted.channel_s["cpu_compute"] == pytest.approx(unpacked / 1e6)


def test_sparse_attention_reads_all_keys_and_some_values_where_it_attends() -> None:
    machine = make_machine(gpu_memory=10**12, h2d=1e6, cpu=make_compute(decode=1e6))
    changes = {"weights": ON_GPU, "activations": ON_GPU, "attention_sparsity": 0.1}
    attended = _price(machine, cpu_attention=1.0, **changes)
    whole_s = SEQUENCES * CONTEXT * TOKEN / 1e6
    picked = 1 - 0.9 ** make_model().layer(0).attention.group_size
    assert attended.channel_s["cpu_compute"] == pytest.approx(whole_s * (1 + picked) / 2)
    # What is fetched comes whole: which values will be wanted is not known before.
    fetched = _price(machine, cpu_attention=0.0, **changes)
    assert fetched.channel_s["h2d"] == pytest.approx(whole_s)


def test_small_reads_from_disk_move_at_the_rate_of_small_requests() -> None:
    machine = make_machine()
    slow = RateCurve(sizes=(4096.0, 4194304.0), rates=(1e3, 1e6))
    machine = replace(machine, disk=replace(machine.disk, read=slow))
    # A batch's rows of one token fill half a page, of the mean context of 17.5 less than 36 kB.
    predicted = _price(machine, cache=ON_DISK)
    rate = slow.at(4 * CACHE_TOKEN_BYTES * 17.5)
    assert rate < 1e4
    # Four steps are read in segments, whose means differ a little.
    assert predicted.channel_s["disk_read"] == pytest.approx(
        2 * SEQUENCES * TOKEN * CONTEXT / rate, rel=0.05
    )


def test_one_token_needs_no_decode() -> None:
    work = Workload(prompt_len=16, gen_len=1)
    machine = make_machine(disk_read=1e6, disk_write=1e3)
    predicted = _price(machine, workload=work, cache=ON_DISK, weights=ON_DISK)
    assert predicted.decode_s == 0
    assert predicted.prefill_s == pytest.approx(SMALL_BYTES / 1e6)
    # Nor does it keep a cache: weights on whole pages are all that is on disk.
    assert predicted.peak_bytes["disk"] < SMALL_BYTES + 4096 * 4 * LAYERS


def test_peak_by_hand_without_a_gpu() -> None:
    predicted = _price(make_machine())
    hidden = SEQUENCES * PROMPT * 256 * 2
    logits = SEQUENCES * 256 * 2 + 4 * 1000 * 4
    workspace = workspace_bytes(problem_of(make_policy(), make_machine()), "prefill")
    # Both components of a decoder layer are cut, the MLP between rows of 1024 bytes.
    edges = 2 * (2 * 4096 + CUT_ROWS * 512 + 2 * 4096 + CUT_ROWS * 1024)
    cache = SEQUENCES * TOKEN * (PROMPT + STEPS)
    # A cosine and a sine for every pair of a head, of each sequence's position or of a prompt's.
    rotations = (SEQUENCES + PROMPT) * 64 * 2
    assert predicted.peak_bytes["cpu"] == pytest.approx(
        SMALL_BYTES + hidden + logits + rotations + workspace + edges + cache, rel=1e-6
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
        ({"model": make_model(max_positions=19)}, "19 positions"),
        ({"model": make_model(dtype="float16")}, "bfloat16"),
        ({"weight_bits": 4}, "rate of unpacking"),
        ({"cache_bits": 8}, "rate of unpacking"),
    ],
)
def test_refused_policies(changes: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        _price(make_machine(), **changes)


def test_what_is_priced_and_cannot_be_run_is_refused_by_name() -> None:
    rates = replace(make_compute(), unpack_bytes_per_s=1e9)
    machine = make_machine(gpu_memory=10**12, cpu=rates, gpu=rates)
    policy = make_policy(activations=ON_GPU, unpacks_per_batch=True)
    assert estimate(policy, machine).latency_s > 0
    with pytest.raises(InputError, match=r"policy\.unpacks_per_batch: got true") as caught:
        check_executable(policy)
    assert "try" in str(caught.value) and "\n" not in str(caught.value)
    check_executable(make_policy())


def test_rounding_comes_before_the_price() -> None:
    machine = make_machine(gpu_memory=10**12, h2d=1e6)
    nearly = Placement(gpu=0.999, cpu=0.001)
    whole = _price(machine, cache=ON_GPU, activations=ON_GPU, weights=ON_GPU)
    rounded = _price(machine, cache=nearly, activations=ON_GPU, weights=ON_GPU)
    assert rounded == whole
    assert _price(machine, cache=ON_CPU, activations=ON_GPU, weights=ON_GPU) != whole
