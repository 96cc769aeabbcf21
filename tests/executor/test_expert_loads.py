"""Loads of the experts that a router has chosen."""

from __future__ import annotations

from pathlib import Path

import torch

from costmodel.plan.policy import Placement, Policy
from costmodel.plan.workload import Workload
from costmodel.schedule.tasks import Task
from executor.checkpoint.folder import Checkpoint
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


def test_each_piece_is_read_into_its_own_part_of_staging(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "olmoe", num_layers=1, intermediate_size=48)
    source = Checkpoint.open(tmp_path / "model")
    split = Placement(cpu=0.3, disk=0.7)
    policy = Policy(
        model=source.spec,
        workload=Workload(prompt_len=4, gen_len=2),
        gpu_batch_size=1,
        num_gpu_batches=3,
        prefill_batch_size=1,
        weights=dict.fromkeys(source.spec.component_names, ON_CPU) | {"experts": split},
        cache=ON_GPU,
        activations=ON_GPU,
        cpu_attention=0.0,
        weight_bits=32,
        cache_bits=32,
        loads_on_demand=True,
    )
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
