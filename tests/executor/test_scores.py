"""Log-probabilities of prompt and output tokens, held to transformers."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import executor.run.prompt_scorer as prompt_scorer
from costmodel.plan.workload import Workload
from costmodel.pricing.workspace import scored_tile_bytes
from executor.checkpoint.folder import Checkpoint
from executor.model.logits_processors import LogitsProcessors
from executor.model.sampling import Sampler
from executor.model.token_scores import TokenScores
from executor.run.results import BlockResult
from tests.executor.tiny_machines import Case, draw_policy, make_hardware, make_policy
from tests.executor.tiny_models import MIXTURES, VOCAB_SIZE, save_tiny_model

# A vocabulary of 900 makes the head larger than a decoder layer, so that it is cut in chunks.
MODELS: dict[str, dict[str, Any]] = {
    "opt": {"family": "opt", "tied": True},
    "llama in chunks": {"family": "llama", "vocab_size": 900},
    "granite": {"family": "granite", "tied": True, "vocab_size": 900},
    "olmo2": {"family": "olmo2"},
    "qwen2_moe": MIXTURES["qwen2_moe"],
}
ASKED: list[dict[str, Any]] = [
    {"gen_len": 1, "prompt_logprobs": 0},
    {"gen_len": 1, "prompt_logprobs": 4},
    {"gen_len": 3, "prompt_logprobs": 1, "logprobs": 4},
    {"gen_len": 3, "logprobs": 0},
]
LENGTHS = (1, 13, 7, 2, 13, 9, 1, 5, 11)
TOLERANCE = 1e-4
# Of the tiles in which logits are made here.
ROWS, COLUMNS = 5, 37


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_scorer, "SCORED_ROWS", ROWS)
    monkeypatch.setattr(prompt_scorer, "SCORED_COLUMNS", COLUMNS)


def _check(found: TokenScores, logits: torch.Tensor, ids: list[int], num_top: int) -> None:
    """Compare with the logits [tokens, vocabulary] that predict ``ids``."""
    expected = logits.log_softmax(-1)
    assert len(found.log_probs) == len(ids)
    wanted = expected.gather(1, torch.tensor(ids, dtype=torch.int64)[:, None])[:, 0]
    np.testing.assert_allclose(found.log_probs, wanted, atol=TOLERANCE)
    assert found.is_greedy.tolist() == (expected.argmax(-1) == torch.tensor(ids)).tolist()
    top = expected.topk(num_top)
    np.testing.assert_allclose(found.top_log_probs, top.values, atol=TOLERANCE)
    assert found.top_ids.tolist() == top.indices.tolist()


def check_blocks(blocks: list[BlockResult], case: Case, model: Any, workload: Workload) -> None:
    outputs = {i: ids for block in blocks for i, ids in block.output_ids.items()}
    prompts = {i: s for block in blocks for i, s in block.prompt_scores.items()}
    generated = {i: s for block in blocks for i, s in block.output_scores.items()}
    assert len(outputs) == len(case.prompts)
    for i, prompt in enumerate(case.prompts):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *outputs[i]]])).logits[0]
        if workload.prompt_logprobs is not None:
            known = logits[: len(prompt) - 1]
            _check(prompts[i], known, list(prompt[1:]), workload.prompt_logprobs)
        if workload.logprobs is not None:
            _check(generated[i], logits[len(prompt) - 1 : -1], list(outputs[i]), workload.logprobs)
    assert bool(prompts) == (workload.prompt_logprobs is not None)
    assert bool(generated) == (workload.logprobs is not None)


def _make_case(folder: Path, options: dict[str, Any]) -> tuple[Case, Any]:
    model = save_tiny_model(folder, **options)
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    return Case(source=Checkpoint.open(folder), prompts=prompts, folder=folder), model


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    case, model = _make_case(tmp_path, MODELS[name])
    rng = random.Random(name)
    base = make_policy(case.source.spec, prompt_len=max(LENGTHS), gen_len=1)
    for gpu, asked in itertools.product((False, True), ASKED):
        workload = replace(base.workload, **asked)
        policy = draw_policy(replace(base, workload=workload), rng, gpu=gpu)
        check_blocks(case.run(policy, make_hardware(gpu=gpu)), case, model, workload)


def test_scores_are_of_the_model_and_end_with_the_sequence(tmp_path: Path) -> None:
    """What changes the logits before a choice changes no score."""
    case, model = _make_case(tmp_path, MODELS["llama in chunks"])
    workload = Workload(prompt_len=max(LENGTHS), gen_len=6, logprobs=2)
    policy = make_policy(case.source.spec, prompt_len=max(LENGTHS), gen_len=6)
    policy = replace(policy, workload=workload)
    sampler = Sampler(temperature=2.0, processors=LogitsProcessors(repetition_penalty=3.0))
    unended = case.generate(policy, make_hardware(), sampler=sampler)
    eos_ids = frozenset({unended[0][2], unended[1][4]})
    blocks = case.run(policy, make_hardware(), sampler=sampler, eos_ids=eos_ids)
    assert any(block.stopped for block in blocks)
    check_blocks(blocks, case, model, workload)


@pytest.mark.usefixtures("small_tiles")
def test_no_tensor_is_larger_than_what_the_cost_model_counts(tmp_path: Path) -> None:
    case, _ = _make_case(tmp_path, MODELS["llama in chunks"])
    model, width, num_top = case.source.spec, 40, 3
    ids = [[i % VOCAB_SIZE for i in range(width)]] * 3
    rows = torch.arange(3 * width).view(3, width)
    tokens = prompt_scorer.ScoredTokens(
        rows=rows[:, :-1].flatten(),
        ids=torch.tensor(ids)[:, 1:].flatten(),
        counts=[width - 1] * 3,
    )
    weights = {
        "head.weight": [torch.randn(model.vocab_size, model.hidden_size)],
        "final_norm.weight": [torch.ones(model.hidden_size)],
    }
    hidden = torch.randn(3, width, model.hidden_size)
    tile = torch.empty(scored_tile_bytes(model), dtype=torch.uint8)
    scorer = prompt_scorer.PromptScorer(model, num_top, tile)
    with _LargestTensor() as largest:  # type: ignore[no-untyped-call]
        found = scorer.add(
            0, hidden.flatten(0, 1), weights, tokens=lambda: tokens, first_row=0, is_last=True
        )
    expected = (
        torch.nn.functional.rms_norm(hidden, (model.hidden_size,)) @ weights["head.weight"][0].T
    )
    for scores, logits, row in zip(found, expected, ids, strict=True):
        _check(scores, logits[:-1], row[1:], num_top)
    # Their hidden states, or what is kept of each token.
    assert largest.count <= max(ROWS * model.hidden_size, 3 * width * num_top)


class _LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that is made, views aside."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.count = max(self.count, tensor.numel())
        return made
