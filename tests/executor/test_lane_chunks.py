"""The size of chunks changes no bit of what a prompt's tokens are chosen from."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from costmodel.plan.policy import LanePolicy
from executor.checkpoint.folder import Checkpoint
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
    "xielu": {"family": "apertus"},
}
# The log-probabilities of the tokens of a prompt and of its answer, each with the answer's ids.
Scores = dict[int, tuple[tuple[int, ...], list[float], list[float]]]


def _prompts(name: str) -> list[list[int]]:
    rng = random.Random(name)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


def _scores(model: Path, name: str, chunk_rows: int, **changes: Any) -> Scores:
    """Run a job whose prompts are scored."""
    source = Checkpoint.open(model)
    base = make_policy(source.spec, prompt_len=max(LENGTHS), gen_len=max(LIMITS))
    policy = change_policy(base, gpu_batch_size=2, num_gpu_batches=2, **changes)
    lanes = LanePolicy(pool_tokens=1024, pass_rows=400, chunk_rows=chunk_rows)
    work = replace(policy.workload, logprobs=0, prompt_logprobs=0)
    policy = replace(policy, lanes=lanes, workload=work)
    requests = [
        LaneRequest(prompt_ids=ids, max_tokens=limit)
        for ids, limit in zip(_prompts(name), LIMITS, strict=True)
    ]
    found: Scores = {}
    with Runner(policy, make_hardware(), source, model.parent) as runner:
        for result in runner.run_requests(requests):
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
