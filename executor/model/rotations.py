"""Rotary positions of a block's passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from costmodel.model.layer_spec import AttentionSpec, RotarySpec
from costmodel.model.spec import ModelSpec
from costmodel.schedule.tasks import Task
from executor.model.layers import Rotation, rotation_of
from profiles.compute_plan import DTYPES

# Prompts all begin at the first position, so that their batches share one rotation.
PROMPTS = -1


class Rotations:
    """Cosines and sines of the positions of a pass, made once and not once a layer."""

    def __init__(self, spec: ModelSpec) -> None:
        self._dtype = DTYPES[spec.dtype]
        self._lengths: Sequence[torch.Tensor] = ()
        self._prompt_len = 0
        # Of the pass over ``_token``, by batch and kind of rotation.
        self._made: dict[tuple[int, RotarySpec, int], Rotation] = {}
        self._token = 0

    def start_block(self, lengths: Sequence[torch.Tensor], prompt_len: int) -> None:
        """Prepare for a block; ``lengths`` are the tokens of each prompt, int64 [batch] for each
        batch."""
        self._lengths, self._prompt_len = lengths, prompt_len
        self._made = {}

    def of(self, task: Task, attention: AttentionSpec) -> Rotation | None:
        """Return those of a task's pass (see ``layers.project_qkv``)."""
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
