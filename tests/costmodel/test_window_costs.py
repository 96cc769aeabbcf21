"""The cost of windows: slots, bytes and passes, by hand and step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.feed_forward_spec import MlpSpec
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec, model_of_layers
from costmodel.plan.workload import Workload
from costmodel.pricing.latency import stage_work
from costmodel.pricing.memory import memory_rows
from costmodel.pricing.price import phase_channels
from costmodel.pricing.problem import Problem, problem_of
from costmodel.pricing.shares import shares_of
from costmodel.pricing.stages import stages_of
from costmodel.schedule.timeline import simulate
from tests.costmodel.machines import ON_CPU, ON_DISK, make_machine, make_policy

CONTEXT_LEN = 32768
WORKLOAD = Workload(prompt_len=CONTEXT_LEN - 255, gen_len=256)


def make_windowed(
    windows: list[int | None], *, num_heads: int, num_kv_heads: int, head_dim: int
) -> ModelSpec:
    """Make a model with so many layers, and attention as given."""
    layers = [
        LayerSpec(
            attention=AttentionSpec(
                num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, window=window
            ),
            mlp=MlpSpec(size=512),
        )
        for window in windows
    ]
    return model_of_layers(
        layers,
        name="windowed",
        family="mistral",
        vocab_size=1000,
        hidden_size=256,
        max_positions=131072,
    )


# Of their configs: layers, windows and shapes.
GPT_OSS_20B = make_windowed([128, None] * 12, num_heads=64, num_kv_heads=8, head_dim=64)
GEMMA3_27B = make_windowed(
    [None if (i + 1) % 6 == 0 else 1024 for i in range(62)],
    num_heads=32,
    num_kv_heads=16,
    head_dim=128,
)


@pytest.mark.parametrize(
    ("model", "num_bytes"),
    [
        # A token takes 2 * 8 * 64 * 2 bytes in a layer, or 2 * 16 * 128 * 2.
        (GPT_OSS_20B, 2048 * (12 * 32768 + 12 * 128)),
        (GEMMA3_27B, 8192 * (10 * 32768 + 52 * 1024)),
    ],
)
def test_a_cache_takes_the_bytes_of_its_windows(model: ModelSpec, num_bytes: int) -> None:
    policy = make_policy(model=model, workload=WORKLOAD, weights=ON_CPU, cache=ON_CPU)
    problem = problem_of(policy, make_machine())
    assert problem.cache_sequence_bytes == num_bytes
    rows = memory_rows(problem, shares_of(policy))["cpu"]
    assert all(terms["cache"] == num_bytes for terms in rows.values())
    # Without windows, it was so much more.
    whole = replace(model.layer(0), attention=replace(model.layer(0).attention, window=None))
    plain = replace(model, layer_kinds=(whole,), layer_order=(0,) * model.num_layers)
    ratio = make_problem(plain, WORKLOAD).cache_sequence_bytes / num_bytes
    assert ratio == pytest.approx({24: 1.99, 62: 5.33}[model.num_layers], abs=0.01)


def make_problem(model: ModelSpec, workload: Workload) -> Problem:
    return problem_of(make_policy(model=model, workload=workload), make_machine())


@given(
    prompt_len=st.integers(1, 300),
    gen_len=st.integers(1, 300),
    window=st.integers(1, 400),
)
def test_passes_read_and_store_what_the_window_keeps(
    prompt_len: int, gen_len: int, window: int
) -> None:
    model = make_windowed([window, None], num_heads=4, num_kv_heads=2, head_dim=64)
    problem = make_problem(model, Workload(prompt_len=prompt_len, gen_len=gen_len))
    for kind in problem.layer_kinds:
        most = kind.cache.window or prompt_len + gen_len
        prefill, *decode = stages_of(problem)
        assert prefill.slots_read(kind.cache) == 0
        assert prefill.slots_stored(kind.cache) == (min(most, prompt_len) if decode else 0)
        for stage in decode:
            passes = range(stage.first_pass, stage.first_pass + int(stage.passes))
            read = sum(min(most, prompt_len + t - 1) for t in passes)
            assert stage.slots_read(kind.cache) == pytest.approx(read)
            assert stage.slots_stored(kind.cache) == stage.stored_tokens


def test_a_window_of_all_tokens_costs_what_none_does() -> None:
    workload = Workload(prompt_len=40, gen_len=30)
    seconds = []
    for window in (69, None):
        model = make_windowed([window] * 3, num_heads=4, num_kv_heads=2, head_dim=64)
        policy = make_policy(model=model, workload=workload, cache=ON_DISK)
        seconds.append(phase_channels(policy, make_machine()))
    for phase, channels in seconds[0].items():
        assert channels == pytest.approx(seconds[1][phase])


def test_moves_are_of_the_slots_that_are_kept() -> None:
    model = make_windowed([8, None], num_heads=4, num_kv_heads=2, head_dim=64)
    policy = make_policy(model=model, workload=Workload(prompt_len=40, gen_len=11), cache=ON_DISK)
    machine = make_machine(disk_read=1e6, disk_write=1e6)
    problem = problem_of(policy, machine)
    token_bytes = 2 * 2 * 64 * 2
    prefill, *decode = (
        {w.kind: w for w in stage_work(problem, shares_of(policy), stage)}
        for stage in stages_of(problem)
    )
    padding = problem.disk_cache_padding
    assert prefill["write_cache"].memory_bytes == pytest.approx(token_bytes * (8 + 40) * padding)
    read = sum(work["read_cache"].memory_bytes or 0 for work in decode)
    steps = sum(8 + 40 + t - 1 for t in range(1, 11))
    assert read == pytest.approx(token_bytes * steps * padding)
    # Tasks of the timeline add up to the same, and grow in the layer without a window only.
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for timed in simulate(policy, machine).tasks:
        if timed.task.kind == "read_cache" and timed.task.batch == 0:
            seconds[timed.task.layer].append(timed.end_s - timed.start_s)
    predicted = sum(work["read_cache"].seconds for work in decode) * policy.gpu_batch_size
    assert sum(map(sum, seconds.values())) == pytest.approx(predicted)
    assert min(seconds[1]) == pytest.approx(max(seconds[1]))
    assert seconds[2][-1] / seconds[2][0] == pytest.approx(49 / 40)
