"""Experts that are loaded when the router has chosen them: how many, and how many bytes."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from costmodel.families import spec_from_config
from costmodel.model import layout
from costmodel.model.layout import model_layers
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Placement, Policy
from costmodel.pricing import buffers
from costmodel.pricing.buffers import chunks_of
from costmodel.schedule.tasks import Task
from costmodel.schedule.zigzag import ZigzagSchedule
from executor.checkpoint.dummy import DummyCheckpoint
from executor.engine.trace import Span
from executor.model.sampling import Sampler
from executor.run.runner import Runner
from executor.stores.weights import WeightStore
from profiles.aligned_io import PAGE_BYTES
from profiles.units import MIB
from tests.executor.tiny_machines import (
    ON_CPU,
    ON_DISK,
    ON_GPU,
    change_policy,
    draw_policy,
    make_hardware,
    make_policy,
)
from tests.plain_models import plain_config

PROMPT_LEN = 3
# Eight experts of which a token takes two.
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 80},
    "qwen3_moe": EXPERTS,
}
# Each block passes through experts once, so that all its visits are independent of the others'.
NUM_BLOCKS = 25
# Equal chances for every token.
UNIFORM = Sampler(temperature=1000.0, seed=4)


def _spec(family: str = "mixtral", **changes: Any) -> ModelSpec:
    config = plain_config(family=family, num_kv_heads=2, hidden_size=128, vocab_size=400)
    return spec_from_config(config | SHAPES[family] | changes, name=family)


def _run(
    policy: Policy,
    folder: Path,
    *,
    gpu: bool = False,
    num_blocks: int = 1,
    num_prompts: int | None = None,
) -> tuple[Counter[str], Counter[str]]:
    """Run blocks, or some prompts; returns the bytes of decode by channel, and the number of
    reads."""
    rng = random.Random(0)
    vocab_size, count = policy.model.vocab_size, num_prompts or num_blocks * policy.block_size
    prompts = [[rng.randrange(vocab_size) for _ in range(PROMPT_LEN)] for _ in range(count)]
    moved, reads = Counter[str](), Counter[str]()

    def note(span: Span) -> None:
        if span.task.token > 0:
            moved[span.task.channel] += span.num_bytes
            reads[span.task.kind] += 1

    source = DummyCheckpoint(spec=policy.model)
    hardware = make_hardware(gpu=gpu)
    with Runner(policy, hardware, source, folder, sampler=UNIFORM, on_span=note) as runner:
        list(runner.run(prompts))
    return moved, reads


@pytest.mark.parametrize("num_batches", [1, 4])
@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 1}], ids=["two", "one"])
def test_as_many_experts_are_read_as_random_routing_touches(
    changes: dict[str, Any], num_batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = _spec(**changes)
    counts = list[int]()
    original = WeightStore.read_chunk

    def read_chunk(store: WeightStore, task: Task, experts: Sequence[int], first: int) -> int:
        if task.token:
            # A visit to a layer reads its experts in chunks.
            counts.extend([0] * (task.batch == 0))
            counts[-1] += len(experts)
        return original(store, task, experts, first)

    monkeypatch.setattr(WeightStore, "read_chunk", read_chunk)
    base = make_policy(spec, prompt_len=PROMPT_LEN, gen_len=2, weights=ON_DISK)
    for batch_size in (1, 3):
        counts.clear()
        policy = replace(
            base,
            gpu_batch_size=batch_size,
            prefill_batch_size=1,
            num_gpu_batches=num_batches,
            loads_on_demand=True,
        )
        _run(policy, tmp_path, num_blocks=NUM_BLOCKS)
        assert len(counts) == NUM_BLOCKS * spec.num_layers
        experts = spec.layer(0).experts
        assert experts is not None
        error = statistics.stdev(counts) / len(counts) ** 0.5
        expected = experts.touched(policy.block_size)
        # Some are read before anyone knows whether they are needed.
        chunks = chunks_of(experts, policy.block_size, experts.num_experts, 0.0, expert_bytes=1)
        expected += chunks.ahead * chunks.size * (1 - expected / experts.num_experts)
        assert abs(statistics.mean(counts) - expected) <= 3 * error + 1e-9, batch_size


def test_large_blocks_read_experts_before_they_are_routed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless hidden states are on disk. Then batches load experts, and pass through the chunks of
    the head, one after another. Tokens do not depend on that, nor on loads on demand."""
    # No other test has this vocabulary, whose layouts are kept.
    monkeypatch.setattr(layout, "SMALL_CHUNK_BYTES", 2**16)
    spec = _spec("qwen3_moe", num_hidden_layers=3, vocab_size=1111)
    half = Placement(gpu=0.0, cpu=0.5, disk=0.5)
    base = make_policy(spec, prompt_len=PROMPT_LEN, gen_len=4, weights=half)
    base = replace(base, gpu_batch_size=5, num_gpu_batches=3)
    rng = random.Random(1)
    prompts = [[rng.randrange(spec.vocab_size) for _ in range(PROMPT_LEN)] for _ in range(15)]
    found, early = [], []
    for hidden, loads_on_demand in itertools.product((ON_CPU, ON_DISK), (True, False)):
        policy = replace(base, activations=hidden, loads_on_demand=loads_on_demand)
        source, hardware = DummyCheckpoint(spec=spec), make_hardware(gpu=False)
        with Runner(policy, hardware, source, tmp_path) as runner:
            found.append([block.output_ids for block in runner.run(prompts)])
            assert sum(layer.kind == "head" for layer in runner.plan.layers) == 9
            tasks = ZigzagSchedule(runner.plan, num_batches=3, num_tokens=4)
            order = [(t.kind, t.token, t.layer) for t in tasks]
        reads = {task for task in order if task[0] == "read_experts"}
        routes = {task: order.index(("route", *task[1:])) for task in reads}
        early.append(sum(order.index(task) < routes[task] for task in reads))
    assert all(tokens == found[0] for tokens in found)
    assert early == [3 * 4, 0, 0, 0]


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    ("family", "changes"), [("mixtral", {}), ("qwen2_moe", {"moe_intermediate_size": 40})]
)
def test_no_more_is_moved_on_demand_than_whole(
    family: str, changes: dict[str, Any], gpu: bool, tmp_path: Path
) -> None:
    spec = _spec(family, **changes)
    base = make_policy(spec, prompt_len=PROMPT_LEN, gen_len=5)
    rng = random.Random(f"{family} {gpu}")
    for _ in range(4):
        # Where hidden states are elsewhere, each batch loads experts for itself.
        home = ON_GPU if gpu else ON_CPU
        policy = replace(draw_policy(base, rng, gpu=gpu), activations=home)
        if not policy.weights["experts"].disk:
            policy = replace(policy, weights={**policy.weights, "experts": ON_DISK})
        _check_bytes(policy, tmp_path, gpu=gpu)


def _check_bytes(policy: Policy, folder: Path, *, gpu: bool) -> None:
    whole, _ = _run(replace(policy, loads_on_demand=False), folder, gpu=gpu)
    needed, tasks = _run(replace(policy, loads_on_demand=True), folder, gpu=gpu)
    # The page that two experts share is read with each of them.
    count = max(k.experts.num_experts for k in policy.model.layer_kinds if k.experts)
    shared = 0 if _fills_pages(policy) else tasks["route"] * count * PAGE_BYTES
    assert set(needed) == set(whole)
    for channel, num_bytes in whole.items():
        assert needed[channel] <= num_bytes + shared * (channel == "disk_read"), policy


def _fills_pages(policy: Policy) -> bool:
    (expert,) = {
        c.unit_bytes
        for layer in model_layers(policy.model)
        for c in layer.components
        if c.name == "experts"
    }
    return expert % PAGE_BYTES == 0


def test_few_sequences_move_a_small_part(tmp_path: Path) -> None:
    """Two of eight experts, on each way: from disk, and to the GPU."""
    spec = _spec()
    base = make_policy(spec, prompt_len=PROMPT_LEN, gen_len=5)
    one = change_policy(
        base, gpu_batch_size=1, num_gpu_batches=1, prefill_batch_size=1, activations=ON_GPU
    )
    experts = 4 * sum(
        c.num_bytes for layer in model_layers(spec) for c in layer.components if c.name == "experts"
    )
    for home, channel in ((ON_DISK, "disk_read"), (ON_CPU, "h2d")):
        policy = replace(one, weights={**one.weights, "experts": home})
        whole, _ = _run(policy, tmp_path, gpu=True)
        needed, _ = _run(replace(policy, loads_on_demand=True), tmp_path, gpu=True)
        assert whole[channel] - needed[channel] == experts * 6 // 8


def test_one_prompt_loads_as_little_under_a_policy_for_many(tmp_path: Path) -> None:
    """It needs two of eight experts, so that none is read before its tokens are routed."""
    base = make_policy(_spec(), prompt_len=PROMPT_LEN, gen_len=5, weights=ON_DISK)
    one, many = (
        replace(
            base,
            gpu_batch_size=size,
            prefill_batch_size=1,
            num_gpu_batches=1,
            loads_on_demand=True,
        )
        for size in (1, 16)
    )
    moved = [_run(policy, tmp_path, num_prompts=1)[0] for policy in (one, many)]
    assert moved[0]["disk_read"] == moved[1]["disk_read"] > 0


@pytest.mark.parametrize("expert_bytes", [2**18, 2**21, 2**23])
def test_chunks_of_small_experts_are_large_enough(
    expert_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless half of all experts are smaller."""
    monkeypatch.setattr(buffers, "LEAST_CHUNK_BYTES", 8 * MIB)
    experts = _spec().layer(0).experts
    assert experts is not None
    for num_tokens in (1, 64):
        chunks = chunks_of(experts, num_tokens, 8, 0.0, expert_bytes=expert_bytes)
        assert chunks.size * expert_bytes >= 8 * MIB or chunks.size == 4
        assert chunks.size * chunks.staged <= 8
        assert chunks.count * chunks.size >= min(2 * num_tokens, 8)


@pytest.mark.parametrize("num_prompts", [1, 6])
def test_chunks_of_the_usual_size_change_no_token(
    num_prompts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here they have half of a layer's experts each."""
    monkeypatch.setattr(buffers, "LEAST_CHUNK_BYTES", 8 * MIB)
    rng = random.Random(2)
    prompts = [[rng.randrange(400) for _ in range(PROMPT_LEN)] for _ in range(num_prompts)]
    found = []
    for home in (ON_CPU, ON_DISK):
        base = make_policy(_spec(), prompt_len=PROMPT_LEN, gen_len=5, weights=home)
        policy = replace(base, gpu_batch_size=3, loads_on_demand=True)
        source, hardware = DummyCheckpoint(spec=policy.model), make_hardware(gpu=False)
        with Runner(policy, hardware, source, tmp_path) as runner:
            found.append([block.output_ids for block in runner.run(prompts)])
            for layer in runner.plan.route.demanding:
                assert runner.plan.chunks(layer, 2, 3).size == 4
    assert found[0] == found[1]
