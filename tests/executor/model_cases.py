"""Tiny models with prompts, and the tokens that transformers makes of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from executor.checkpoint.folder import Checkpoint
from tests.executor.tiny_machines import ExpectedCase
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny_model


def make_case(
    folder: Path, lengths: Sequence[int], gen_len: int, *, seed: int = 3, **options: Any
) -> tuple[ExpectedCase, Any]:
    """Make a model of three layers and prompts of these lengths; returns transformers' model, too.

    ``options`` are those of ``save_tiny_model``.
    """
    theirs = save_tiny_model(folder / "model", num_layers=3, seed=seed, **options)
    prompts = draw_prompts(lengths)
    (folder / "offload").mkdir()
    case = ExpectedCase(
        source=Checkpoint.open(folder / "model"),
        prompts=prompts,
        folder=folder / "offload",
        tokens=[greedy(theirs, prompt, gen_len) for prompt in prompts],
    )
    return case, theirs


def draw_prompts(lengths: Sequence[int]) -> list[list[int]]:
    """Draw a prompt of each length."""
    rng = random.Random(5)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], gen_len: int) -> list[int]:
    """Continue a prompt by itself, without a cache."""
    ids = list(prompt)
    for _ in range(gen_len):
        # By name: models for images have other arguments before it.
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]
