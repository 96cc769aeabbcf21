"""Lanes whose cache is on disk for some layers, or for all, generate the same tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from costmodel.plan.lane_cache import layers_on_disk
from costmodel.plan.pages import PAGE, pages_of, ring_tokens, rings_of
from costmodel.plan.policy import LanePolicy, Placement, Policy
from costmodel.schedule.job_simulation import simulate_job
from costmodel.schedule.tasks import Task
from executor.checkpoint.folder import Checkpoint, WeightSource
from executor.engine.channels import Handler
from executor.run.lane_block import LaneBlock
from executor.run.lanes import LaneRequest
from executor.run.runner import Runner
from executor.stores.page_runs import PassPages
from executor.stores.paged_cache import PagedCache
from tests.executor.tiny_machines import ON_CPU, ON_DISK, change_policy, make_hardware, make_policy
from tests.executor.tiny_models import MIXTURES, VOCAB_SIZE, save_tiny_model

MACHINE = make_hardware()
ALONE = {"gpu_batch_size": 1, "num_gpu_batches": 1, "prefill_batch_size": 1}
HALVES = Placement(cpu=0.5, disk=0.5)
GEN_LEN = 12
# Tokens of prompts besides a prefix that some have; some go over the end of a page.
LENGTHS = (40, 6, 1, 30, 33, 3, 64, 34, 7, 1)
LIMITS = (12, 3, 3, 6, 9, 1, 9, 2, 12, 5)
PACKED = {"cache_bits": 4, "group_size": 32}
MODELS: dict[str, dict[str, Any]] = {
    "grouped heads": {"family": "llama", "num_layers": 4},
    "one layer": {"family": "llama", "num_layers": 1},
    "bfloat16": {"family": "llama", "num_layers": 3, "dtype": "bfloat16"},
    "window": {"family": "mistral", "num_layers": 3, "sliding_window": 40},
    "two windows": {"family": "gemma3_text", "num_layers": 3},
    "chunks": {"family": "llama4_text"},
    "latent": {"family": "deepseek_v3"},
    "experts": MIXTURES["qwen2_moe"],
}


class Job:
    """A model, and a job of prompts, some of which begin alike."""

    def __init__(self, source: WeightSource, folder: Path, rng: random.Random) -> None:
        self.source, self.folder = source, folder
        first = [rng.randrange(VOCAB_SIZE) for _ in range(64)]
        own = [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in LENGTHS]
        # Every second prompt begins with two pages in common.
        self.prompts = [first + ids if i % 2 else ids for i, ids in enumerate(own)]

    def policy(self, **changes: Any) -> Policy:
        """Return two batches of two lanes with room for all of them."""
        longest = max(map(len, self.prompts))
        base = make_policy(self.source.spec, prompt_len=longest, gen_len=GEN_LEN)
        policy = change_policy(base, **changes)
        pages = policy.block_size * pages_of(longest + GEN_LEN)
        lanes = LanePolicy(pool_tokens=PAGE * pages, pass_rows=longest + policy.block_size)
        return policy if policy.lanes else change_policy(policy, lanes=lanes)

    def run(self, policy: Policy) -> list[tuple[int, ...]]:
        """Return the tokens of every prompt."""
        with Runner(policy, MACHINE, self.source, self.folder) as runner:
            results = list(runner.run_requests(self.requests))
        found = {i: ids for result in results for i, ids in result.output_ids.items()}
        return [found[i] for i in range(len(LIMITS))]

    @property
    def requests(self) -> list[LaneRequest]:
        """The prompts with their limits."""
        return [
            LaneRequest(prompt_ids=ids, max_tokens=limit)
            for ids, limit in zip(self.prompts, LIMITS, strict=True)
        ]


@pytest.mark.parametrize(
    ("name", "bits"),
    [*((name, {}) for name in MODELS), *((name, PACKED) for name in ("window", "latent"))],
)
def test_caches_on_disk_change_no_token(
    tmp_path: Path, name: str, bits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tasks that come late or end late, and staging buffers that hold NaN behind their last
    reader."""
    rng = random.Random(name)
    save_tiny_model(tmp_path / "model", seed=3, **MODELS[name], max_position_embeddings=128)
    job = Job(Checkpoint.open(tmp_path / "model"), tmp_path, rng)
    expected = job.run(job.policy(**ALONE, **bits))
    _disturb(monkeypatch)
    for share in (1.0, rng.uniform(0.2, 0.9)):
        sizes = {"gpu_batch_size": rng.randint(1, 4), "num_gpu_batches": rng.randint(1, 3)}
        policy = job.policy(
            **sizes,
            **bits,
            prefill_batch_size=1,
            weights=rng.choice([ON_CPU, HALVES]),
            cache=Placement(cpu=1 - share, disk=share),
        )
        most = pages_of(max(map(len, job.prompts)) + GEN_LEN)
        lanes = LanePolicy(
            pool_tokens=PAGE * rng.randint(most, most * policy.block_size),
            pass_rows=max(map(len, job.prompts)) + policy.block_size + rng.randint(0, 100),
            chunk_rows=rng.choice([11, 48, 512]),
        )
        policy = change_policy(policy, lanes=lanes)
        assert layers_on_disk(policy)
        assert job.run(policy) == expected, policy


def _disturb(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LaneBlock.handlers

    def handlers(block: LaneBlock) -> Mapping[str, Handler]:
        return {kind: _late(block, handler) for kind, handler in original(block).items()}

    monkeypatch.setattr(LaneBlock, "handlers", handlers)


def _late(block: LaneBlock, handler: Handler) -> Handler:
    def run(task: Task) -> int:
        rng = random.Random(task.index)
        waits = [0.004 * rng.random() if rng.random() < 0.1 else 0.0 for _ in range(2)]
        time.sleep(waits[0])
        moved = handler(task)
        time.sleep(waits[1])
        if task.kind == "write_cache":
            pool = block.stores.cache.of(task).pool
            pool.fill_(255 if pool.dtype == torch.uint8 else torch.nan)
        return moved

    return run


def test_as_many_pages_are_read_as_the_cost_model_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a job with prefixes, in layers with a window and without."""
    save_tiny_model(
        tmp_path / "model",
        family="gemma3_text",
        num_layers=3,
        max_position_embeddings=128,
    )
    job = Job(Checkpoint.open(tmp_path / "model"), tmp_path, random.Random(0))
    policy = job.policy(cache=ON_DISK)
    present: list[list[int]] = []
    start_pass = PagedCache.start_pass

    def counted(cache: PagedCache, number: int, pages: Sequence[PassPages]) -> None:
        present.append([len(ring.present) for ring in pages])
        start_pass(cache, number, pages)

    monkeypatch.setattr(PagedCache, "start_pass", counted)
    with Runner(policy, MACHINE, job.source, job.folder) as runner:
        list(runner.run_requests(job.requests))
        lengths = runner.passes.lengths
    assert lengths is not None and len(lengths.prefixes.tokens) == 1
    counts = simulate_job(policy, MACHINE, lengths).counts
    rings = rings_of(policy.model)
    for window, held in counts.held.items():
        found = PAGE * np.array(present)[:, rings.index(ring_tokens(window))]
        assert len(found) == len(held)
        assert found.sum() == pytest.approx(held.sum(), rel=0.1)
