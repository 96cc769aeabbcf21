"""The schedule: every task once, nothing moved without need, and no collision at any pace."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.model.layout import model_layers
from costmodel.plan.plan import Plan
from costmodel.plan.policy import Placement, Policy, placed_alike
from costmodel.schedule import lookahead
from costmodel.schedule.tasks import Task
from costmodel.schedule.zigzag import ZigzagSchedule
from tests.costmodel.hazards import BlockMemory, find_hazards, random_durations, simulate
from tests.costmodel.machines import (
    ON_CPU,
    ON_DISK,
    ON_GPU,
    make_mixture,
    make_model,
    make_policy,
)
from tests.costmodel.strategies import mixtures, policies

NUM_TOKENS = st.integers(1, 4)
NUM_BATCHES = st.integers(1, 4)
LOADS = ("read_weights", "send_weights", "read_cache", "send_cache", "read_hidden", "send_hidden")
EXPERT_KINDS = (
    "run_chunk",
    "route",
    "read_experts",
    "send_experts",
    "return_tokens",
    "run_experts",
    "send_made",
    "combine",
)
STORES = ("return_cache", "write_cache", "return_hidden", "write_hidden")
CHANNELS = ("disk_read", "h2d", "gpu_compute", "cpu_compute", "d2h", "disk_write")
MIXED = Placement(gpu=0.25, cpu=0.25, disk=0.5)


def _tasks(policy: Policy, *, has_gpu: bool, num_tokens: int) -> list[Task]:
    plan = Plan.of(policy, has_gpu=has_gpu)
    schedule = ZigzagSchedule(plan, num_batches=policy.num_gpu_batches, num_tokens=num_tokens)
    return list(schedule)


def _memory(policy: Policy, *, has_gpu: bool) -> BlockMemory:
    return BlockMemory(policy, model_layers(policy.model), has_gpu=has_gpu)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Policy, bool]:
    has_gpu = draw(st.booleans())
    policy = draw(policies(has_gpu=has_gpu) | mixtures(has_gpu=has_gpu))
    return replace(policy, num_gpu_batches=draw(NUM_BATCHES)), has_gpu


@given(blocks(), NUM_TOKENS)
def test_waits_are_earlier_and_on_other_channels(
    block: tuple[Policy, bool], num_tokens: int
) -> None:
    policy, has_gpu = block
    tasks = _tasks(policy, has_gpu=has_gpu, num_tokens=num_tokens)
    allowed = CHANNELS if has_gpu else ("disk_read", "cpu_compute", "disk_write")
    for index, task in enumerate(tasks):
        assert task.index == index and task.channel in allowed
        for wait in task.waits:
            assert wait < index and tasks[wait].channel != task.channel
        assert len(task.waits) == len({tasks[wait].channel for wait in task.waits})


@settings(deadline=None)
@given(blocks())
def test_passes_without_an_end_are_the_decode_of_a_block(block: tuple[Policy, bool]) -> None:
    """All of them, from the first one on; what comes before its first layer is loaded first."""
    policy, _ = block
    weights = {name: Placement(cpu=1 - p.disk, disk=p.disk) for name, p in policy.weights.items()}
    policy = replace(policy, weights=weights, cache=ON_CPU, activations=ON_CPU)
    policy = replace(policy, cpu_attention=1.0, cpu_experts=0.0)
    plan = Plan.of(policy, has_gpu=False)
    passes = ZigzagSchedule(plan, num_batches=policy.num_gpu_batches, num_tokens=None)
    # The loads of two passes ahead may come between.
    endless = list(itertools.takewhile(lambda task: task.token < 8, passes))
    in_block = _tasks(policy, has_gpu=False, num_tokens=8)
    moves = {
        (whose, token): [
            (task.kind, task.layer, task.batch, [tasks[i].kind for i in task.waits])
            for task in tasks
            if task.token == token
        ]
        for whose, tasks in (("endless", endless), ("block", in_block))
        for token in range(5)
    }
    # Loads are made up to two passes ahead, and the first pass of a block is prefill.
    for token in (3, 4):
        assert moves["endless", token] == moves["block", token]
    for token in (0, 1):
        found = sorted(move[:3] for move in moves["endless", token])
        assert found == sorted(move[:3] for move in moves["endless", 2])


@settings(deadline=None, max_examples=150)
@given(blocks(), NUM_TOKENS, st.integers(0, 2**32))
def test_nothing_collides_at_any_pace(
    block: tuple[Policy, bool], num_tokens: int, seed: int
) -> None:
    """Of a block with as many sequences and tokens as the policy has, or fewer."""
    policy, has_gpu = block
    rng = random.Random(seed)
    batch_size = rng.randint(1, policy.gpu_batch_size)
    prompt_len = rng.randint(1, policy.workload.prompt_len)
    schedule = ZigzagSchedule(
        Plan.of(policy, has_gpu=has_gpu),
        num_batches=policy.num_gpu_batches,
        num_tokens=num_tokens,
        batch_size=batch_size,
        prompt_len=prompt_len,
    )
    tasks = list(schedule)
    memory = BlockMemory(
        policy,
        model_layers(policy.model),
        has_gpu=has_gpu,
        batch_size=batch_size,
        prompt_len=prompt_len,
    )
    for _ in range(3):
        spans = simulate(tasks, random_durations(rng))
        assert find_hazards(spans, memory) == []


@pytest.mark.parametrize("has_gpu", [False, True])
def test_the_tracker_notices_waits_that_are_dropped(has_gpu: bool) -> None:
    """Without the waits of any one kind of task, some policy at some pace collides."""
    home = ON_GPU if has_gpu else ON_CPU
    share = MIXED if has_gpu else Placement(cpu=0.5, disk=0.5)
    rng = random.Random(0)
    waiting: set[str] = set()
    noticed: set[str] = set()
    dense = make_model(num_layers=2, num_kv_heads=4, head_dim=64)
    mixture = make_mixture(num_hidden_layers=2)
    for model, weights, cache, hidden in (
        (dense, share, share, share),
        (dense, home, share, home),
        (dense, share, home, home),
        (mixture, share, home, home),
    ):
        policy = make_policy(
            model=model,
            gpu_batch_size=8,
            num_gpu_batches=3,
            weights=weights,
            cache=cache,
            activations=hidden,
            cpu_attention=0.5,
            cpu_experts=0.5 if has_gpu and model is mixture else 0.0,
            loads_on_demand=model is mixture,
        )
        tasks = _tasks(policy, has_gpu=has_gpu, num_tokens=3)
        memory = _memory(policy, has_gpu=has_gpu)
        kinds = {task.kind for task in tasks if task.waits}
        waiting |= kinds
        for kind in sorted(kinds - noticed):
            hasty = [replace(task, waits=()) if task.kind == kind else task for task in tasks]
            paces = (random_durations(rng) for _ in range(40))
            if any(find_hazards(simulate(hasty, pace), memory) for pace in paces):
                noticed.add(kind)
    assert len(waiting) == (23 if has_gpu else 9)  # every kind that the machine has
    assert waiting == noticed


def _batches(task: Task, policy: Policy, has_gpu: bool) -> range:
    """Batches that a task computes: experts take those of the block together in decode, or where
    a CPU loads them on demand, if the hidden states are on the device that computes."""
    is_together = (policy.activations.gpu if has_gpu else policy.activations.cpu) == 1
    kind = model_layers(policy.model)[task.layer].kind
    is_walked = not has_gpu and task.layer in _memory(policy, has_gpu=has_gpu).demanding
    if is_together and kind == "experts" and (task.token > 0 or is_walked):
        assert task.batch == 0
        return range(policy.num_gpu_batches)
    return range(task.batch, task.batch + 1)


@given(blocks(), NUM_TOKENS)
def test_every_computation_is_there_once_and_in_order(
    block: tuple[Policy, bool], num_tokens: int
) -> None:
    policy, has_gpu = block
    tasks = _tasks(policy, has_gpu=has_gpu, num_tokens=num_tokens)
    num_layers = len(model_layers(policy.model))
    for batch in range(policy.num_gpu_batches):
        ends = [
            (task.token, task.layer)
            for task in tasks
            if task.kind in ("compute", "finish") and batch in _batches(task, policy, has_gpu)
        ]
        assert ends == list(itertools.product(range(num_tokens), range(num_layers)))
    split: dict[str, list[tuple[int, int, int]]] = {
        kind: [] for kind in ("project", "return_queries", "attend", "send_attended", "finish")
    }
    for task in tasks:
        if task.kind in split:
            split[task.kind].append((task.token, task.layer, task.batch))
    assert len({tuple(places) for places in split.values()}) == 1
    assert all(token > 0 for token, _, _ in split["attend"])


@given(blocks(), NUM_TOKENS)
def test_weights_move_once_for_each_visit_of_a_layer(
    block: tuple[Policy, bool], num_tokens: int
) -> None:
    policy, has_gpu = block
    tasks = _tasks(policy, has_gpu=has_gpu, num_tokens=num_tokens)
    memory = _memory(policy, has_gpu=has_gpu)
    for kind, layers in (
        ("read_weights", memory.disk_layers - {0}),
        ("send_weights", memory.moved_layers if has_gpu else set()),
    ):
        moved = Counter((t.token, t.layer, t.batch) for t in tasks if t.kind == kind)
        assert moved == Counter(
            (token, layer, piece)
            for token in range(num_tokens)
            for layer in layers
            for piece in range(max(2, policy.num_gpu_batches))
        )


@settings(deadline=None)
@given(st.booleans().flatmap(lambda gpu: st.tuples(mixtures(has_gpu=gpu), st.just(gpu))))
def test_experts_are_routed_loaded_and_combined_once_for_each_visit(
    block: tuple[Policy, bool],
) -> None:
    policy, has_gpu = block
    policy = replace(policy, num_gpu_batches=3)
    tasks = _tasks(policy, has_gpu=has_gpu, num_tokens=3)
    memory = _memory(policy, has_gpu=has_gpu)
    found = Counter((t.kind, t.token, t.layer) for t in tasks if t.kind in EXPERT_KINDS)
    if has_gpu:
        expected = Counter[tuple[str, int, int]]()
        for kind, layers, count in (
            ("route", memory.demanding | memory.in_place, 1),
            ("read_experts", memory.demanding & memory.disk_layers, 3),
            ("send_experts", memory.demanding, 3),
            *((kind, memory.in_place, 1) for kind in EXPERT_KINDS[4:]),
        ):
            expected |= {(kind, token, layer): count for token in (1, 2) for layer in layers}
        assert found == expected
    else:
        assert {(kind, layer) for kind, _, layer in found} == {
            (kind, layer)
            for kind in ("route", "read_experts", "run_chunk")
            for layer in memory.demanding
        }
        assert all(found["run_chunk", t, i] == found["read_experts", t, i] for _, t, i in found)
    # Whatever else a channel has to do, the router has chosen before, and both have multiplied.
    order = [(t.kind, t.token, t.layer) for t in tasks]
    early = {(t.kind, t.token, t.layer) for t in tasks if memory.is_ahead(t)}
    for kind, token, layer in found:
        place = order.index((kind, token, layer))
        assert order.index(("route", token, layer)) <= place or (kind, token, layer) in early
        if kind == "combine":
            before = ("compute", "run_experts", "send_made")
            assert all(order.index((other, token, layer)) < place for other in before)


@pytest.mark.parametrize(("has_gpu", "home"), [(True, ON_GPU), (False, ON_CPU)])
def test_nothing_moves_where_all_is_resident(has_gpu: bool, home: Placement) -> None:
    policy = make_policy(weights=home, cache=home, activations=home)
    tasks = _tasks(policy, has_gpu=has_gpu, num_tokens=3)
    assert {task.kind for task in tasks} == {"compute"}
    assert not any(task.waits for task in tasks)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"weights": ON_CPU}, {"send_weights"}),
        ({"weights": ON_DISK}, {"send_weights", "read_weights"}),
        ({"activations": ON_CPU}, {"send_hidden", "return_hidden"}),
        ({"cache": ON_CPU, "cpu_attention": 0.0}, {"send_cache", "return_cache"}),
        # What is attended on the CPU comes down once, after prefill, and never goes up.
        ({"cache": ON_CPU, "cpu_attention": 1.0}, {"return_cache"}),
        ({"cache": ON_DISK, "cpu_attention": 1.0}, {"return_cache", "read_cache", "write_cache"}),
    ],
)
def test_only_what_lies_elsewhere_moves(changes: dict[str, object], expected: set[str]) -> None:
    at_home: dict[str, object] = {"weights": ON_GPU, "cache": ON_GPU, "activations": ON_GPU}
    policy = make_policy(**(at_home | changes))
    tasks = _tasks(policy, has_gpu=True, num_tokens=3)
    assert {task.kind for task in tasks} & {*LOADS, *STORES} == expected
    if expected == {"return_cache"}:
        assert all(task.is_prefill for task in tasks if task.kind == "return_cache")


def test_the_last_token_stores_no_cache() -> None:
    policy = make_policy(cache=ON_DISK)
    for num_tokens in (1, 2, 4):
        tasks = _tasks(policy, has_gpu=False, num_tokens=num_tokens)
        written = {task.token for task in tasks if task.kind == "write_cache"}
        read = {task.token for task in tasks if task.kind == "read_cache"}
        assert written == set(range(num_tokens - 1))
        assert read == set(range(1, num_tokens))


def test_loading_hides_behind_computing() -> None:
    """Eight layers and a head from disk, two batches, three tokens, a second for each task.

    The first layer is read while the embedding runs, then each layer while the one before it is
    computed. So the CPU is never idle, and the disk only while the later embeddings and the last
    chunk of the head run, two batches each.
    """
    policy = make_policy(weights=ON_DISK)
    tasks = _tasks(policy, has_gpu=False, num_tokens=3)
    spans = simulate(tasks, lambda task: 1.0)
    end_s = max(span.end_s for span in spans)
    assert end_s == 3 * (1 + 8 + 1) * 2
    reads_s = sum(s.end_s - s.start_s for s in spans if s.task.channel == "disk_read")
    assert end_s - reads_s == (2 + 1) * 2


def test_a_head_placed_apart_is_loaded_beside_all_layers() -> None:
    """Only the head is on disk. The first pass also reads half of the second's head; even so both
    take less time than the pass computes, so that the CPU never waits: the embedding, eight layers
    and the head, two batches each."""
    placed = placed_alike(make_model(), ON_CPU) | {"head": ON_DISK}
    policy = make_policy(weights=placed)
    tasks = _tasks(policy, has_gpu=False, num_tokens=4)
    spans = simulate(tasks, lambda task: 6.0 if task.channel == "disk_read" else 1.0)
    assert sum(span.task.kind == "read_weights" for span in spans) == 4 * 2
    assert max(span.end_s for span in spans) == 4 * (1 + 8 + 1) * 2


def test_experts_are_loaded_while_others_are_computed() -> None:
    """Attention takes turns in buffers of its own: else experts of all layers would take turns in
    one, and none be loaded before the last ones are computed."""
    model = make_mixture(num_hidden_layers=8)
    policy = make_policy(model=model, weights=ON_CPU, cache=ON_GPU, activations=ON_GPU)
    tasks = _tasks(policy, has_gpu=True, num_tokens=1)
    kinds = [layer.kind for layer in model_layers(model)]
    seconds = {"attention": 0.1, "experts": 5.0}
    spans = simulate(tasks, lambda task: seconds.get(kinds[task.layer], 0.1))
    # Two batches and two pieces: both take as long. Both buffers are filled at once in the
    # beginning, so that three pieces are not hidden.
    assert max(span.end_s for span in spans) == pytest.approx(8 * 2 * 5.0 + 3 * 5.0, rel=0.03)


def test_pieces_are_read_before_they_are_sent() -> None:
    for num_batches, has_experts in itertools.product((1, 3), (False, True)):
        model = make_mixture(num_hidden_layers=3) if has_experts else make_model(num_layers=3)
        for placed in itertools.product((ON_GPU, MIXED, ON_CPU), repeat=len(model.component_names)):
            weights = dict(zip(model.component_names, placed, strict=True))
            policy = make_policy(model=model, weights=weights, num_gpu_batches=num_batches)
            tasks = _tasks(policy, has_gpu=True, num_tokens=3)
            spans = simulate(tasks, lambda task: 1.0)
            assert find_hazards(spans, _memory(policy, has_gpu=True)) == []


def test_nothing_collides_in_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is loaded beside many positions comes in more pieces than there are batches."""
    monkeypatch.setattr(lookahead, "LEAST_PIECE_BYTES", 1)
    model, rng = make_model(num_layers=4), random.Random(1)
    for has_gpu, head, num_batches in itertools.product((False, True), (MIXED, ON_DISK), (1, 2, 3)):
        weights = placed_alike(model, ON_GPU if has_gpu else ON_CPU) | {"head": _at(head, has_gpu)}
        policy = make_policy(model=model, weights=weights, num_gpu_batches=num_batches)
        memory = _memory(policy, has_gpu=has_gpu)
        memory.num_pieces = 5 * num_batches
        tasks = _tasks(policy, has_gpu=has_gpu, num_tokens=4)
        read = [task.batch for task in tasks if task.kind == "read_weights" and task.token == 2]
        assert read == list(range(memory.num_pieces))
        for _ in range(3):
            assert find_hazards(simulate(tasks, random_durations(rng)), memory) == []


def _at(placed: Placement, has_gpu: bool) -> Placement:
    """Leave out the GPU where there is none."""
    return placed if has_gpu else Placement(cpu=1 - placed.disk, disk=placed.disk)


def test_a_slow_disk_is_never_idle() -> None:
    """Where reading takes ten times as long as computing, only the ends are not hidden."""
    policy = make_policy(weights=ON_DISK, num_gpu_batches=3)
    tasks = _tasks(policy, has_gpu=False, num_tokens=4)
    spans = simulate(tasks, lambda task: 10.0 if task.channel == "disk_read" else 1.0)
    reads_s = 10.0 * 4 * 9 * 3
    assert max(span.end_s for span in spans) == pytest.approx(reads_s, rel=0.02)
