"""Tokens of a sequence depend on no neighbour, on no page, and not on when it begins."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from costmodel.plan.pages import PAGE, pages_of
from costmodel.plan.policy import LanePolicy, Policy
from costmodel.schedule.admission import Admission
from costmodel.schedule.pass_lanes import PassLanes
from costmodel.schedule.tasks import Task
from executor.checkpoint.folder import Checkpoint, WeightSource
from executor.engine.channels import Handler
from executor.model.logits_processors import LogitsProcessors
from executor.model.sampling import Sampler
from executor.run.lane_block import LaneBlock
from executor.run.lanes import LaneRequest
from executor.run.results import BlockResult
from executor.run.runner import Runner
from tests.covering import at_most
from tests.executor.lane_models import HALVES, MACHINE, MODELS, lane_models, poison_freed_pages
from tests.executor.reference import ReferenceModel
from tests.executor.tiny_machines import ON_CPU, ON_DISK, change_policy, make_policy
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny_model

ALONE = {"gpu_batch_size": 1, "num_gpu_batches": 1, "prefill_batch_size": 1}
GEN_LEN = 12
# Some go over the end of a page.
LENGTHS = (9, 1, 40, 5, 30, 7, 7, 2, 33, 64, 12)
LIMITS = (12, 3, 6, 1, 9, 2, 12, 5, 1, 4, 11)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model, and a job of prompts with limits."""

    source: WeightSource
    folder: Path
    prompts: list[list[int]]
    limits: list[int]

    @property
    def requests(self) -> list[LaneRequest]:
        """The prompts with their limits."""
        return [
            LaneRequest(prompt_ids=ids, max_tokens=limit)
            for ids, limit in zip(self.prompts, self.limits, strict=True)
        ]

    def policy(self, **changes: Any) -> Policy:
        """Return two batches of two lanes with room for all of them, all in CPU memory."""
        longest = max(map(len, self.prompts))
        base = make_policy(self.source.spec, prompt_len=longest, gen_len=max(self.limits))
        policy = change_policy(base, **changes)
        if policy.lanes is None:
            tokens = 32 * sum(pages_of(longest + GEN_LEN) for _ in range(policy.block_size))
            rows = longest + policy.block_size
            policy = replace(policy, lanes=LanePolicy(pool_tokens=tokens, pass_rows=rows))
        return policy

    def results(
        self, policy: Policy, order: Sequence[int] | None = None, **options: Any
    ) -> list[BlockResult]:
        """Run the job with its prompts in another order."""
        order = range(len(self.prompts)) if order is None else order
        requests = [self.requests[i] for i in order]
        with Runner(policy, MACHINE, self.source, self.folder, **options) as runner:
            return list(runner.run_requests(requests))

    def run(
        self, policy: Policy, order: Sequence[int] | None = None, **options: Any
    ) -> list[list[int]]:
        """Return the tokens of every prompt."""
        order = range(len(self.prompts)) if order is None else order
        results = self.results(policy, order, **options)
        found = {i: ids for result in results for i, ids in result.output_ids.items()}
        assert len(found) == sum(len(result.output_ids) for result in results)
        return [list(found[order.index(i)]) for i in range(len(self.prompts))]

    def scores(self, **changes: Any) -> dict[int, list[tuple[int, float]]]:
        """Return the tokens of every prompt, each with its log-probability in all bits."""
        policy = self.policy(**changes)
        policy = replace(policy, workload=replace(policy.workload, logprobs=0))
        found = {}
        for result in self.results(policy):
            for index, ids in result.output_ids.items():
                scores = result.output_scores[index].log_probs.tolist()
                found[index] = list(zip(ids, scores, strict=True))
        return found

    def alone(self, **changes: Any) -> list[list[int]]:
        """Return the tokens of every prompt when no other is at work."""
        return self.run(
            self.policy(gpu_batch_size=1, num_gpu_batches=1, prefill_batch_size=1, **changes)
        )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Job]:
    """Make each model once."""
    models = lane_models(tmp_path_factory)

    def make(name: str) -> Job:
        model, rng = models(name), random.Random(name)
        return Job(
            source=model.source,
            folder=model.folder,
            prompts=[[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in LENGTHS],
            limits=list(LIMITS),
        )

    return make


@pytest.mark.parametrize("name", ["plain", "tied", "learned positions"])
def test_tokens_are_those_of_the_reference(jobs: Callable[[str], Job], name: str) -> None:
    job = jobs(name)
    whole = ReferenceModel(job.source).generate(job.prompts, GEN_LEN)
    expected = [row[:limit] for row, limit in zip(whole, job.limits, strict=True)]
    assert job.run(job.policy()) == expected


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"wide window"}))
def test_neighbours_change_no_token(
    jobs: Callable[[str], Job], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs(name)
    expected = job.alone()
    assert len({tuple(row) for row in expected}) > len(LENGTHS) - 3
    poison_freed_pages(monkeypatch)
    rng = random.Random(name)
    for _ in range(at_most(4, 10)):
        size, count = rng.randint(1, 4), rng.randint(1, 3)
        policy = job.policy(
            gpu_batch_size=size,
            num_gpu_batches=count,
            prefill_batch_size=1,
            weights=rng.choice([ON_CPU, HALVES]),
        )
        assert policy.lanes is not None
        most = pages_of(max(LENGTHS) + GEN_LEN)
        lanes = LanePolicy(
            pool_tokens=32 * rng.randint(most, most * policy.block_size),
            pass_rows=max(LENGTHS) + policy.block_size + rng.randint(0, 100),
            chunk_rows=rng.choice([11, 48, 512]),
        )
        order = rng.sample(range(len(LENGTHS)), len(LENGTHS))
        assert job.run(replace(policy, lanes=lanes), order) == expected, (policy, lanes)


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 32), ("bfloat16", 16), ("bfloat16", 4)])
def test_many_rows_change_no_token(tmp_path: Path, dtype: str, bits: int) -> None:
    """Products of many rows, and those of long rows, are made in other ways than those of few."""
    model = tmp_path / "model"
    save_tiny_model(
        model, "llama", dtype=dtype, hidden_size=1088, intermediate_size=1184, num_layers=1
    )
    rng = random.Random(3)
    lengths = [1, *(rng.randint(40, 90) for _ in range(11))]
    job = Job(
        source=Checkpoint.open(model),
        folder=tmp_path,
        prompts=[[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths],
        limits=[rng.randint(2, 6) for _ in lengths],
    )
    expected = job.scores(weight_bits=bits, **ALONE)
    lanes = LanePolicy(pool_tokens=12 * 96, pass_rows=1000, chunk_rows=1000)
    sizes = {"gpu_batch_size": 12, "num_gpu_batches": 1}
    assert job.scores(weight_bits=bits, lanes=lanes, **sizes) == expected


@pytest.mark.parametrize(("cache_bits", "weight_bits"), [(4, 32), (8, 32), (32, 4)])
def test_packed_caches_and_weights(
    jobs: Callable[[str], Job], cache_bits: int, weight_bits: int
) -> None:
    job = jobs("plain")
    bits = {"cache_bits": cache_bits, "weight_bits": weight_bits, "group_size": 32}
    assert job.run(job.policy(**bits, weights=HALVES)) == job.alone(**bits)


def test_sparse_attention(jobs: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs("plain")
    expected = job.alone(attention_sparsity=0.3)
    poison_freed_pages(monkeypatch)
    assert job.run(job.policy(attention_sparsity=0.3)) == expected


def test_passes_are_as_few_as_lanes_allow(jobs: Callable[[str], Job]) -> None:
    """Four lanes that are always filled: the longest answers begin first."""
    job = jobs("plain")
    results = job.results(job.policy())
    passes = sum(result.num_tokens for result in results)
    # In step, three blocks of four would take 12 + 12 + 11 passes.
    assert passes == -(-sum(LIMITS) // 4)


def test_sequences_end_with_their_end_token(jobs: Callable[[str], Job]) -> None:
    job = jobs("plain")
    whole = job.alone()
    eos_ids = frozenset({whole[0][2], whole[4][0], whole[6][-1], whole[3][0]})
    results = job.results(job.policy(), eos_ids=eos_ids)
    found = {i: ids for result in results for i, ids in result.output_ids.items()}
    stopped = {i for result in results for i in result.stopped}
    for index, row in enumerate(whole):
        ends = [i for i, token in enumerate(row) if token in eos_ids]
        assert list(found[index]) == row[: ends[0] if ends else None]
        assert (index in stopped) == bool(ends)
    assert 0 < len(stopped) < len(whole)


def test_sampling_depends_on_the_sequence_alone(jobs: Callable[[str], Job]) -> None:
    job = jobs("plain")
    processors = LogitsProcessors(
        repetition_penalty=1.3, min_new_tokens=4, eos_token_id=(7, 9), begin_suppress_tokens=(3,)
    )
    sampler = Sampler(temperature=0.9, top_k=30, top_p=0.95, seed=11, processors=processors)
    expected = job.run(job.policy(**ALONE), sampler=sampler)
    assert expected != job.alone()
    for count in (1, 3):
        policy = job.policy(gpu_batch_size=4, num_gpu_batches=count)
        assert job.run(policy, sampler=sampler) == expected


def test_requests_have_choices_of_their_own(jobs: Callable[[str], Job]) -> None:
    job = jobs("plain")
    greedy = job.alone()
    samplers = [None, Sampler(temperature=0.9, seed=3), Sampler(temperature=1.5, top_k=9, seed=4)]
    requests = [replace(r, chooser=samplers[i % 3]) for i, r in enumerate(job.requests)]
    requests[0] = replace(requests[0], eos_ids=frozenset({greedy[0][4]}))
    found = {}
    for policy in (job.policy(**ALONE), job.policy(gpu_batch_size=4)):
        with Runner(policy, MACHINE, job.source, job.folder) as runner:
            results = list(runner.run_requests(requests))
        found[policy.block_size] = {i: ids for r in results for i, ids in r.output_ids.items()}
    assert found[1] == found[8]
    first = greedy[0].index(greedy[0][4])
    for index, ids in found[1].items():
        expected = tuple(greedy[index])
        if index == 0:
            assert ids == expected[:first]
        elif index % 3 == 0:
            assert ids == expected
    drawn = [found[1][i] != tuple(greedy[i]) for i in range(len(requests)) if i % 3]
    assert sum(drawn) > len(drawn) / 2


def test_wrong_expectations_change_no_token(
    jobs: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pool that is too small for answers beyond the expected, lanes wait for pages."""
    job = replace(
        jobs("plain"), limits=[40] * len(LENGTHS), prompts=[p[:25] for p in jobs("plain").prompts]
    )
    expected = job.alone()
    poison_freed_pages(monkeypatch)
    num_waits = 0
    plan = Admission.plan

    def counted(admission: Admission) -> PassLanes | None:
        nonlocal num_waits
        found = plan(admission)
        num_waits += 0 if found is None else len(found.waiting)
        return found

    monkeypatch.setattr(Admission, "plan", counted)
    rng = random.Random(2)
    lanes = LanePolicy(pool_tokens=5 * PAGE, pass_rows=40)
    for _ in range(3):
        requests = [replace(r, expected_tokens=rng.randint(1, 40)) for r in job.requests]
        with Runner(job.policy(lanes=lanes), MACHINE, job.source, job.folder) as runner:
            results = list(runner.run_requests(requests))
        found = {i: list(ids) for result in results for i, ids in result.output_ids.items()}
        assert [found[i] for i in range(len(expected))] == expected
    assert num_waits > 20


def test_scores_are_those_of_the_model(jobs: Callable[[str], Job]) -> None:
    job = jobs("tied")
    work = replace(job.policy().workload, logprobs=2, prompt_logprobs=0)
    results = job.results(job.policy(workload=work))
    model = ReferenceModel(job.source)
    for result in results:
        for index, ids in result.output_ids.items():
            whole = [*job.prompts[index], *ids]
            expected = model.logits(whole[:-1]).log_softmax(-1)
            wanted = expected.gather(1, torch.tensor(whole[1:])[:, None])[:, 0].numpy()
            count = len(job.prompts[index]) - 1
            prompt, output = result.prompt_scores[index], result.output_scores[index]
            np.testing.assert_allclose(prompt.log_probs, wanted[:count], atol=2e-4)
            np.testing.assert_allclose(output.log_probs, wanted[count:], atol=2e-4)
            assert output.top_ids.shape == (len(ids), 2)
            assert output.top_ids[:, 0].tolist() == list(ids)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("plain", {"weights": ON_DISK}),
        ("tied", {"weights": HALVES, "num_gpu_batches": 3}),
        ("mixed experts", {"weights": HALVES}),
        ("mixed experts", {"weights": ON_DISK, "loads_on_demand": True}),
        ("experts", {"weights": HALVES, "loads_on_demand": True}),
    ],
)
def test_delays_change_no_token(
    jobs: Callable[[str], Job],
    name: str,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tasks that come late or end late, and staging buffers that hold NaN behind their last
    reader."""
    job = jobs(name)
    expected = job.alone()
    poison_freed_pages(monkeypatch)
    original = LaneBlock.handlers

    def handlers(block: LaneBlock) -> Mapping[str, Handler]:
        return {
            kind: _late(block, handler) if kind == "compute" else _late(None, handler)
            for kind, handler in original(block).items()
        }

    monkeypatch.setattr(LaneBlock, "handlers", handlers)
    assert job.run(job.policy(**changes)) == expected


def _late(block: LaneBlock | None, handler: Handler) -> Handler:
    def run(task: Task) -> int:
        rng = random.Random(task.index)
        waits = [0.004 * rng.random() if rng.random() < 0.1 else 0.0 for _ in range(2)]
        time.sleep(waits[0])
        moved = handler(task)
        time.sleep(waits[1])
        if block is not None:
            _spoil_used_layer(block, task)
        return moved

    return run


def _spoil_used_layer(block: LaneBlock, task: Task) -> None:
    """Fill the staging of a layer's weights that no batch of this pass needs any more."""
    store = block.stores.weights
    at_once = store.plan.batches_at_once if block.kinds[task.layer] == "experts" else 1
    is_last = task.batch + at_once >= block.policy.num_gpu_batches
    parts = store.placed[task.layer]
    if task.layer > 0 and is_last and any(part.cut.disk_bytes for part in parts):
        store.buffers.staging_of("cpu", task).fill_(255)
