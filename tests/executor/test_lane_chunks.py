"""The size of chunks changes no bit of what a prompt's tokens are chosen from."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from costmodel.plan.policy import LanePolicy, Policy
from costmodel.pricing import workspace
from costmodel.pricing.problem import problem_of
from costmodel.schedule.tasks import Task
from executor.checkpoint.folder import Checkpoint, WeightSource
from executor.run.lane_block import LaneBlock
from executor.run.lanes import LaneRequest
from executor.run.runner import Runner
from tests.executor.reference import ReferenceModel
from tests.executor.tiny_machines import change_policy, make_hardware, make_policy
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny_model

# Of prompts that are cut by every chunk, at its ends, and not at all.
LENGTHS = (90, 64, 3, 77, 33)
LIMITS = (4, 1, 5, 3, 2)
CHUNKS = (16, 64, 1000)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "num_kv_heads": 2},
    "bfloat16": {"family": "llama", "dtype": "bfloat16", "hidden_size": 96},
    "alibi": {"family": "bloom"},
    "window": {"family": "mistral", "sliding_window": 40},
    "two windows": {"family": "gemma3_text", "num_layers": 3},
    "chunks": {"family": "llama4_text"},
    "sinks": {"family": "gpt_oss"},
    "latent": {"family": "deepseek_v3", "dtype": "bfloat16"},
    "experts": {"family": "mixtral", "dtype": "bfloat16"},
    "parallel": {"family": "gptj"},
    "xielu": {"family": "apertus", "intermediate_size": 100},
}
# The log-probabilities of the tokens of a prompt and of its answer, each with the answer's ids.
Scores = dict[int, tuple[tuple[int, ...], list[float], list[float]]]


def _prompts(name: str) -> list[list[int]]:
    rng = random.Random(name)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


def _policy(source: WeightSource, chunk_rows: int, **changes: Any) -> Policy:
    base = make_policy(source.spec, prompt_len=max(LENGTHS), gen_len=max(LIMITS))
    policy = change_policy(base, gpu_batch_size=2, num_gpu_batches=2, **changes)
    lanes = LanePolicy(pool_tokens=1024, pass_rows=400, chunk_rows=chunk_rows)
    return replace(policy, lanes=lanes)


def _requests(name: str) -> list[LaneRequest]:
    return [
        LaneRequest(prompt_ids=ids, max_tokens=limit)
        for ids, limit in zip(_prompts(name), LIMITS, strict=True)
    ]


def _scores(model: Path, name: str, chunk_rows: int, **changes: Any) -> Scores:
    """Run a job whose prompts are scored."""
    source = Checkpoint.open(model)
    policy = _policy(source, chunk_rows, **changes)
    work = replace(policy.workload, logprobs=0, prompt_logprobs=0)
    policy = replace(policy, workload=work)
    found: Scores = {}
    with Runner(policy, make_hardware(), source, model.parent) as runner:
        for result in runner.run_requests(_requests(name)):
            for i, ids in result.output_ids.items():
                scores = result.prompt_scores[i], result.output_scores[i]
                of_prompt, of_output = (score.log_probs.tolist() for score in scores)
                found[i] = tuple(ids), of_prompt, of_output
    return found


@pytest.mark.parametrize("name", MODELS)
def test_chunks_change_no_bit(tmp_path: Path, name: str) -> None:
    save_tiny_model(tmp_path / "model", seed=3, **MODELS[name])
    whole = _scores(tmp_path / "model", name, max(CHUNKS))
    assert sorted(whole) == list(range(len(LENGTHS)))
    for chunk_rows in CHUNKS[:-1]:
        assert _scores(tmp_path / "model", name, chunk_rows) == whole


@pytest.mark.parametrize("cache_bits", [4, 8])
def test_chunks_change_no_bit_of_packed_caches(tmp_path: Path, cache_bits: int) -> None:
    save_tiny_model(tmp_path / "model", seed=3, **MODELS["bfloat16"])
    bits = {"cache_bits": cache_bits, "group_size": 32}
    whole = _scores(tmp_path / "model", "packed", max(CHUNKS), **bits)
    for chunk_rows in CHUNKS[:-1]:
        assert _scores(tmp_path / "model", "packed", chunk_rows, **bits) == whole


def test_scores_of_a_prompt_in_chunks_are_those_of_the_model(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", seed=3, **MODELS["window"])
    found = _scores(tmp_path / "model", "window", 16)
    model = ReferenceModel(Checkpoint.open(tmp_path / "model"))
    for i, prompt in enumerate(_prompts("window")):
        logits = model.logits([*prompt, *found[i][0]][:-1]).log_softmax(-1)
        ids = [*prompt, *found[i][0]][1:]
        expected = [logits[place, token].item() for place, token in enumerate(ids)]
        np.testing.assert_allclose([*found[i][1], *found[i][2]], expected, atol=2e-4)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operators allocate, as long as it lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        found = func(*args, **(kwargs or {}))
        given = {_storage(x)._cdata for x in tree_leaves((args, kwargs)) if _is_tensor(x)}
        for tensor in filter(_is_tensor, tree_leaves(found)):
            storage = _storage(tensor)
            if storage._cdata not in given:
                self._living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._living = {
            key: (ref, size) for key, (ref, size) in self._living.items() if not ref.expired()
        }
        self.peak = max(self.peak, sum(size for _, size in self._living.values()))
        return found


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


@pytest.mark.parametrize("name", ["llama", "two windows", "latent", "experts", "parallel"])
def test_temporaries_are_those_of_a_chunk_and_one_prompt(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = [0]
    compute = LaneBlock.compute

    def counted(block: LaneBlock, task: Task) -> int:
        with LiveBytes() as live:
            done = compute(block, task)
        peaks[-1] = max(peaks[-1], live.peak)
        return done

    monkeypatch.setattr(LaneBlock, "compute", counted)
    save_tiny_model(tmp_path / "model", seed=3, **MODELS[name])
    source = Checkpoint.open(tmp_path / "model")
    for chunk_rows in CHUNKS:
        policy = _policy(source, chunk_rows)
        with Runner(policy, make_hardware(), source, tmp_path) as runner:
            list(runner.run_requests(_requests(name)))
        problem = problem_of(policy, make_hardware())
        wide = workspace._wide_bytes(problem, workspace.rows_at_once(problem))
        rest = workspace.workspace_bytes(problem, "prefill") - workspace.LIBRARY_BYTES - wide
        assert 0 < peaks[-1] <= rest / (1 + workspace.ALLOCATOR_SHARE) + wide
        peaks.append(0)
    assert peaks[0] < 0.75 * peaks[2]
