"""Loads of the experts that a router has chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Placement, Policy
from costmodel.plan.workload import Workload
from costmodel.schedule.tasks import Task
from executor.checkpoint.folder import Checkpoint
from executor.run.expert_walk import deal_chunks, ranges_of
from executor.run.runner import Runner
from profiles.aligned_io import PAGE_BYTES
from tests.executor.tiny_machines import ON_CPU, ON_GPU, make_hardware
from tests.executor.tiny_models import save_tiny_model


def _task(kind: str, layer: int, piece: int) -> Task:
    return Task(
        index=0,
        kind=kind,
        channel="disk_read",
        token=1,
        layer=layer,
        batch=piece,
        slot=0,
        hidden_slot=0,
        read_slot=0,
        sent_slot=0,
        waits=(),
    )


def _policy(model: ModelSpec, experts: Placement, *, num_gpu_batches: int) -> Policy:
    return Policy(
        model=model,
        workload=Workload(prompt_len=4, gen_len=2),
        gpu_batch_size=1,
        num_gpu_batches=num_gpu_batches,
        prefill_batch_size=1,
        weights=dict.fromkeys(model.component_names, ON_CPU) | {"experts": experts},
        cache=ON_GPU,
        activations=ON_GPU,
        cpu_attention=0.0,
        weight_bits=32,
        cache_bits=32,
        loads_on_demand=True,
    )


def test_each_piece_is_read_into_its_own_part_of_staging(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "olmoe", num_layers=1, intermediate_size=48)
    source = Checkpoint.open(tmp_path / "model")
    split = Placement(cpu=0.3, disk=0.7)
    policy = _policy(source.spec, split, num_gpu_batches=3)
    with Runner(policy, make_hardware(gpu=True), source, tmp_path) as runner:
        store = runner.weights
        layer = next(i for i, kind in enumerate(runner.plan.layers) if kind.kind == "experts")
        staging = store.buffers.staging_of("cpu", _task("read_experts", layer, 0))
        pages, count = len(staging) // PAGE_BYTES, store.num_pieces
        assert count > 1
        everything, needed = list(range(8)), [1, 4, 6, 7]
        moved = 0
        for experts in (everything, needed):
            for piece in range(count):
                staging.fill_(0xAB)
                moved += store.read_experts(_task("read_experts", layer, piece), experts)
                low, high = (pages * (piece + i) // count * PAGE_BYTES for i in (0, 1))
                kept = torch.cat([staging[:low], staging[high:]])
                assert (kept == 0xAB).all()
        assert moved > 0


@given(
    missing=st.sets(st.integers(0, 19)).map(sorted),
    num_chunks=st.integers(1, 12),
)
def test_chunks_have_each_expert_once_and_in_order(missing: list[int], num_chunks: int) -> None:
    loaded = deal_chunks(missing, num_chunks)
    ranges = ranges_of(loaded, 20)
    assert len(loaded) == len(ranges) == num_chunks
    assert [expert for chunk in loaded for expert in chunk] == missing
    assert [expert for part in ranges for expert in part] == list(range(20))
    assert all(set(chunk) <= set(part) for chunk, part in zip(loaded, ranges, strict=True))
    assert max(map(len, loaded)) <= -(-len(missing) // num_chunks)


def test_neighbours_are_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each arrives in its own place, and what is not needed stays as it was."""
    save_tiny_model(tmp_path / "model", "olmoe", num_layers=1, intermediate_size=48)
    source = Checkpoint.open(tmp_path / "model")
    policy = _policy(source.spec, ON_CPU, num_gpu_batches=1)
    copies: list[int] = []
    with Runner(policy, make_hardware(gpu=True), source, tmp_path) as runner:
        store = runner.weights
        layer = next(i for i, kind in enumerate(runner.plan.layers) if kind.kind == "experts")
        queue_copy = store._queue_copy

        def counted(target: torch.Tensor, source: torch.Tensor) -> None:
            copies.append(len(source))
            queue_copy(target, source)

        monkeypatch.setattr(store, "_queue_copy", counted)
        store.num_pieces = 1
        task = _task("send_experts", layer, 0)
        staging = store.buffers.staging_of("gpu", task).fill_(0xAB)
        moved = store.send_experts(task, [1, 2, 3, 6])
        (component,) = (
            c for c in store.buffers.staged[layer].components if c.placed.layout.is_experts
        )
        size, home = component.placed.layout.unit_bytes, store.buffers.home("cpu", component.placed)
        assert copies == [3 * size, size] and moved == 4 * size
        for expert in range(8):
            sent, stored = (
                part[expert * size :][:size] for part in (staging[component.gpu_offset :], home)
            )
            is_sent = expert in (1, 2, 3, 6)
            assert torch.equal(sent, stored if is_sent else torch.full_like(sent, 0xAB))
