"""Rotary positions: frequencies, and the rotations of a block's passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from costmodel.model.layer_spec import AttentionSpec, RotarySpec
from costmodel.model.spec import ModelSpec
from costmodel.schedule.tasks import Task
from profiles.compute_plan import DTYPES

# All prompts start at the first position, so that all batches share one rotation.
PROMPTS = -1

# Cosines and sines of a pass's positions (see ``kernels.rotate``).
Rotation = tuple[torch.Tensor, torch.Tensor]


class Rotations:
    """Cosines and sines of the positions of a pass, made once for all layers."""

    def __init__(self, spec: ModelSpec) -> None:
        self._dtype = DTYPES[spec.dtype]
        self._lengths: Sequence[torch.Tensor] = ()
        self._prompt_len = 0
        # The rotations of pass ``_token``, by batch and kind.
        self._made: dict[tuple[int, RotarySpec, int], Rotation] = {}
        self._token = 0

    def start_block(self, lengths: Sequence[torch.Tensor], prompt_len: int) -> None:
        """Prepare for a block; ``lengths`` has the number of tokens of each prompt, int64 [batch]
        for each batch."""
        self._lengths, self._prompt_len = lengths, prompt_len
        self._made = {}

    def of(self, task: Task, attention: AttentionSpec) -> Rotation | None:
        """Return the rotation for a task (see ``layers.project_qkv``)."""
        if attention.rotary is None:
            return None
        if task.token != self._token:
            self._token, self._made = task.token, {}
        batch = PROMPTS if task.is_prefill else task.batch
        key = batch, attention.rotary, attention.head_dim
        if key not in self._made:
            self._made[key] = self._make(task, attention.rotary, attention.head_dim)
        return self._made[key]

    def _make(self, task: Task, rotary: RotarySpec, head_dim: int) -> Rotation:
        if task.is_prefill:
            positions = torch.arange(self._prompt_len, device=self._lengths[0].device)
        else:
            positions = self._lengths[task.batch] + (task.token - 1)
        return rotation_of(positions, rotary, head_dim, self._dtype)


def rotation_of(
    positions: torch.Tensor, rotary: RotarySpec, head_dim: int, dtype: torch.dtype
) -> Rotation:
    """Return cosines and sines [positions, head_dim / 2] of int64 [positions]."""
    frequencies = rotary_frequencies(rotary, head_dim, positions.device)
    angles = positions[:, None].float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache(maxsize=8)
def rotary_frequencies(rotary: RotarySpec, head_dim: int, device: torch.device) -> torch.Tensor:
    """Return the angle per position of every pair of dimensions, float32 [head_dim / 2].

    The ``llama3`` kind follows transformers' ``_compute_llama3_parameters``: long waves are
    slowed by ``factor``, short ones kept, those between blended.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / rotary.theta**exponents
    if rotary.kind == "linear":
        return frequencies / rotary.factor
    if rotary.kind == "default":
        return frequencies
    wave_lengths = 2 * math.pi / frequencies
    blend = (rotary.original_max_positions / wave_lengths - rotary.low_freq_factor) / (
        rotary.high_freq_factor - rotary.low_freq_factor
    )
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / rotary.factor + blend * frequencies
