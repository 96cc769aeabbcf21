"""Rotary positions: frequencies, and the rotations of a block's passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.rotary_spec import RotarySpec
from costmodel.model.spec import ModelSpec
from costmodel.schedule.tasks import Task
from profiles.compute_plan import DTYPES

# All prompts start at the first position, so that all batches share one rotation.
PROMPTS = -1

# Cosines and sines of a pass's positions (see ``kernels.rotate``), or factors of queries.
Rotation = tuple[torch.Tensor, ...]


class Rotations:
    """Cosines and sines of the positions of a pass, made once for all layers."""

    def __init__(self, spec: ModelSpec, num_positions: int) -> None:
        self._dtype = DTYPES[spec.dtype]
        self._num_positions = num_positions
        self._lengths: Sequence[torch.Tensor] = ()
        self._prompt_len = 0
        # The rotations of pass ``_token``, by batch and kind.
        self._made: dict[tuple[object, ...], Rotation] = {}
        self._token = 0

    def start_block(self, lengths: Sequence[torch.Tensor], prompt_len: int) -> None:
        """Prepare for a block; ``lengths`` has the number of tokens of each prompt, int64 [batch]
        for each batch."""
        self._lengths, self._prompt_len = lengths, prompt_len
        self._made = {}

    def of(self, task: Task, attention: AttentionSpec) -> Rotation | None:
        """Return the rotation for a task (see ``projections.project_qkv``)."""
        if attention.rotary is None and attention.temperature_floor is None:
            return None
        if task.token != self._token:
            self._token, self._made = task.token, {}
        batch = PROMPTS if task.is_prefill else task.batch
        key = batch, attention.rotary, attention.head_dim, *_temperature(attention)
        if key not in self._made:
            self._made[key] = self._make(task, attention)
        return self._made[key]

    def _make(self, task: Task, attention: AttentionSpec) -> Rotation:
        if task.is_prefill:
            positions = torch.arange(self._prompt_len, device=self._lengths[0].device)
        else:
            positions = self._lengths[task.batch] + (task.token - 1)
        return position_factors(positions, attention, self._dtype, self._num_positions)


class PassRotations:
    """The same for passes in which every row has a position of its own."""

    def __init__(self, spec: ModelSpec) -> None:
        self._dtype = DTYPES[spec.dtype]
        self._rows: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
        self._made: dict[tuple[object, ...], Rotation] = {}

    def start_pass(self, rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Prepare for a pass.

        ``rows`` has for each batch the positions of its rows, and the positions of the whole
        sequence that each row belongs to: int64 [rows] each, on the compute device.
        """
        self._rows, self._made = rows, {}

    def of(self, batch: int, attention: AttentionSpec, rows: slice) -> Rotation | None:
        """Return the rotation for some rows of a batch (see ``projections.project_qkv``)."""
        if attention.rotary is None and attention.temperature_floor is None:
            return None
        key = batch, attention.rotary, attention.head_dim, *_temperature(attention)
        if key not in self._made:
            self._made[key] = self._make(*self._rows[batch], attention)
        return tuple(part[rows] for part in self._made[key])

    def _make(
        self, positions: torch.Tensor, most: torch.Tensor, attention: AttentionSpec
    ) -> Rotation:
        rotary = attention.rotary
        least, largest = int(most.min()), int(most.max())
        found = position_factors(positions, attention, self._dtype, largest)
        if rotary is None or rotary.is_long(least) == rotary.is_long(largest):
            return found
        # The length of each sequence alone decides, so that none depends on its neighbours.
        short = position_factors(positions, attention, self._dtype, least)
        is_long = (most > rotary.original_max_positions)[:, None]
        pairs = zip(found[:2], short[:2], strict=True)
        return *(torch.where(is_long, a, b) for a, b in pairs), *found[2:]


def _temperature(attention: AttentionSpec) -> tuple[int | None, float, int]:
    return (
        attention.temperature_floor,
        attention.temperature_strength,
        attention.temperature_offset,
    )


def position_factors(
    positions: torch.Tensor, attention: AttentionSpec, dtype: torch.dtype, num_positions: int
) -> Rotation:
    """Return what int64 [positions] do to queries and keys: a rotation (see ``rotation_of``), the
    factors of queries, float32 [positions], or the one before the other.

    ``num_positions`` is the length of the whole context.
    """
    found: Rotation = ()
    rotary = attention.rotary
    if rotary is not None:
        is_long = rotary.is_long(num_positions)
        found = rotation_of(positions, rotary, attention.head_dim, dtype, is_long=is_long)
    if attention.temperature_floor is None:
        return found
    shifted = positions.float() + attention.temperature_offset
    steps = (shifted / attention.temperature_floor).floor()
    return *found, steps.log1p() * attention.temperature_strength + 1


def rotation_of(
    positions: torch.Tensor,
    rotary: RotarySpec,
    head_dim: int,
    dtype: torch.dtype,
    *,
    is_long: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines [positions, pairs] of int64 [positions].

    ``is_long`` says whether contexts go beyond the original length, for ``longrope``.
    """
    dim = rotary.dim or head_dim
    frequencies = rotary_frequencies(rotary, dim, positions.device, is_long=is_long)
    angles = positions[:, None].float() * frequencies
    cosines, sines = angles.cos(), angles.sin()
    if rotary.attention_factor != 1:
        cosines, sines = cosines * rotary.attention_factor, sines * rotary.attention_factor
    return cosines.to(dtype), (-sines if rotary.is_inverse else sines).to(dtype)


@lru_cache(maxsize=8)
def rotary_frequencies(
    rotary: RotarySpec, dim: int, device: torch.device, *, is_long: bool = False
) -> torch.Tensor:
    """Return the angle per position of every pair of ``dim`` elements, float32 [dim / 2].

    The kinds follow transformers' ``modeling_rope_utils``.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    frequencies = 1.0 / rotary.theta**exponents
    if rotary.kind == "linear":
        return frequencies / rotary.factor
    if rotary.kind == "longrope":
        factors = rotary.long_factors if is_long else rotary.short_factors
        return frequencies / torch.tensor(factors, device=device)
    if rotary.kind == "yarn":
        kept = _kept_by_yarn(rotary, dim, device)
        return kept * frequencies + (1 - kept) * frequencies / rotary.factor
    if rotary.kind == "llama3":
        return _llama3(rotary, frequencies)
    return frequencies


def _kept_by_yarn(rotary: RotarySpec, dim: int, device: torch.device) -> torch.Tensor:
    """Return the share of each frequency that YaRN keeps, float32 [dim / 2]: all of those that turn
    ``beta_fast`` times within the original context, none of those that turn ``beta_slow`` times."""

    def pair_that_turns(times: float) -> float:
        wave = rotary.original_max_positions / (times * 2 * math.pi)
        return dim * math.log(wave) / (2 * math.log(rotary.theta))

    low, high = pair_that_turns(rotary.beta_fast), pair_that_turns(rotary.beta_slow)
    if rotary.truncates:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # Equal bounds would divide by zero.
    high = high + 0.001 if low == high else high
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low)
    return 1 - ramp.clamp(0, 1)


def _llama3(rotary: RotarySpec, frequencies: torch.Tensor) -> torch.Tensor:
    """Slow long waves down by ``factor``, keep short ones, and blend those between."""
    wave_lengths = 2 * math.pi / frequencies
    blend = (rotary.original_max_positions / wave_lengths - rotary.low_freq_factor) / (
        rotary.high_freq_factor - rotary.low_freq_factor
    )
    # Equal factors blend nothing: a wave of just that length is kept.
    blend = blend.nan_to_num(1.0, posinf=1.0, neginf=0.0).clamp(0, 1)
    return (1 - blend) * frequencies / rotary.factor + blend * frequencies
