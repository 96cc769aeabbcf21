"""The layout of a layer's KV cache: segments, and their offsets on their tiers and in staging."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from costmodel.model.layer_spec import LayerSpec
from costmodel.model.tensor_layout import row_packing
from costmodel.plan.cuts import Segment, cache_spec
from costmodel.plan.policy import Policy
from profiles.compute_plan import DTYPES
from profiles.packing import Packing


def is_by_row(segment: Segment) -> bool:
    """Whether a segment is stored row by row, so that the context of each row is contiguous."""
    return segment.home == "cpu" and segment.attended == "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """The cache of one batch in the layers of one kind.

    Parameters
    ----------
    rows_per_sequence
        Key heads.
    head_dim
        Elements of a key, and of a value.
    num_slots, prompt_slots
        Most tokens that are kept of a sequence, and of its prompt.
    is_ring
        Whether the slots are fewer than the tokens of a sequence, so that a new token takes the
        place of the oldest.
    segments
        The segments of a full batch.
    packing
        The packing of a key or a value of one row; ``None`` for a cache in the model's dtype.
    dtype
        The stored dtype: bytes for a packed cache.
    vectors
        Two for a key and a value of each row; one where a vector is both.
    is_chunked
        Whether a ring's tokens are void as soon as a new chunk begins.
    """

    rows_per_sequence: int
    head_dim: int
    num_slots: int
    prompt_slots: int
    is_ring: bool
    segments: tuple[Segment, ...]
    packing: Packing | None
    dtype: torch.dtype
    vectors: int = 2
    is_chunked: bool = False

    @classmethod
    def of(cls, policy: Policy, layer: LayerSpec, segments: tuple[Segment, ...]) -> CacheLayout:
        """Lay out the cache of a kind of layer with these segments."""
        cache = cache_spec(policy, layer)
        context_len = policy.workload.context_len
        packing = row_packing(cache.width, policy.cache_bits, policy.group_size)
        is_ring = cache.num_slots(context_len) < context_len
        return cls(
            rows_per_sequence=cache.rows_per_sequence,
            head_dim=cache.width,
            vectors=cache.vectors,
            num_slots=cache.num_slots(context_len),
            prompt_slots=cache.num_slots(policy.workload.kept_prompt_len),
            is_ring=is_ring,
            segments=segments,
            packing=packing,
            dtype=torch.uint8 if packing else DTYPES[policy.model.dtype],
            is_chunked=is_ring and layer.attention.is_chunked,
        )

    @property
    def width(self) -> int:
        """Elements of ``dtype`` of a key or a value of one row."""
        return self.packing.row_bytes if self.packing else self.head_dim

    def kept(self, prompt_len: int) -> int:
        """Return the tokens that are kept of prompts padded to ``prompt_len``."""
        return min(prompt_len, self.num_slots)

    def new_slot(self, prompt_len: int, token: int) -> int:
        """Return the slot of the new token in decode pass ``token``, from 1 on.

        It is the same for all sequences of a batch.
        """
        return (self.kept(prompt_len) + token - 1) % self.num_slots

    def used_slots(self, prompt_len: int, token: int) -> int:
        """Return the slots that are used after decode pass ``token``, from the first on."""
        return min(self.num_slots, self.kept(prompt_len) + token)

    def void_slots(self, lengths: torch.Tensor, prompt_len: int, token: int) -> torch.Tensor:
        """Return the slots without a token in decode pass ``token``: the first of each sequence,
        and one past the last.

        Prompts start at the first slot, so that the void is behind them. In a ring they end at the
        same slot, so that the void is before them, and new tokens fill it. In a ring of chunks all
        slots are void but the last ones, of the new token's chunk; the void may wrap around.

        Parameters
        ----------
        lengths
            Tokens of each prompt, int32 [batch].

        Returns
        -------
        torch.Tensor
            int32 [batch, 2].
        """
        if not self.is_ring:
            return torch.stack([lengths, torch.full_like(lengths, prompt_len)], dim=1)
        kept = self.kept(prompt_len)
        if self.is_chunked:
            new = self.new_slot(prompt_len, token)
            first = (new - (lengths + token - 1) % self.num_slots) % self.num_slots
            return torch.stack([torch.full_like(lengths, new + 1), first], dim=1)
        end = kept - lengths.clamp(max=kept)
        filled = end.clamp(max=self._filled_again(prompt_len, token))
        return torch.stack([filled, end], dim=1)

    def has_void_slots(self, shortest: int, prompt_len: int, token: int) -> bool:
        """Whether any sequence has void slots; the shortest prompt has ``shortest`` tokens."""
        if not self.is_ring:
            return shortest < prompt_len
        if self.is_chunked:
            return True
        return self.kept(prompt_len) - shortest > self._filled_again(prompt_len, token)

    def _filled_again(self, prompt_len: int, token: int) -> int:
        """Return the slots that decode has filled for a second time, from the first on."""
        return max(0, self.kept(prompt_len) + token - self.num_slots)

    def of_batch(self, size: int) -> tuple[Segment, ...]:
        """Return the segments of a batch; a smaller batch drops the last rows."""
        rows = size * self.rows_per_sequence
        return tuple(
            replace(segment, end_row=min(segment.end_row, rows))
            for segment in self.segments
            if segment.first_row < rows
        )

    def home_bytes(self, tier: str) -> int:
        """Bytes of one layer and batch on a tier."""
        return self.num_slots * sum(s.token_bytes for s in self.segments if s.home == tier)

    def staging_bytes(self, tier: str) -> int:
        """Most bytes of one layer and batch in the staging of a tier."""
        if tier == "cpu":
            return self.home_bytes("disk")
        off_gpu = [s for s in self.segments if s.home != "gpu"]
        fetched = sum(s.token_bytes for s in off_gpu if s.attended == "gpu")
        stored = sum(s.token_bytes for s in off_gpu)
        return max(self.prompt_slots * stored, self.num_slots * fetched)

    @property
    def num_rows_on_cpu(self) -> int:
        """Rows of a batch that the CPU attends to."""
        return sum(s.num_rows for s in self.segments if s.attended == "cpu")

    def rows_on_cpu_before(self, segment: Segment) -> int:
        """Rows before a segment that the CPU attends to."""
        return sum(s.num_rows for s in self._before(segment) if s.attended == "cpu")

    def home_range(self, segment: Segment) -> slice:
        """Return the range of a segment in the layer's bytes on its tier."""
        before = sum(s.token_bytes for s in self._before(segment) if s.home == segment.home)
        start = before * self.num_slots
        return slice(start, start + segment.token_bytes * self.num_slots)

    def disk_segments(self, segments: Sequence[Segment]) -> Iterator[tuple[Segment, int]]:
        """Yield the segments on disk, each with its offset in the layer's bytes on disk."""
        for segment in segments:
            if segment.home == "disk":
                yield segment, self.home_range(segment).start

    def gpu_staged_range(self, segment: Segment, *, in_prefill: bool) -> slice:
        """Return the range of a segment in GPU staging.

        Staging has the prompts of all rows off the GPU in prefill, and the contexts of fetched rows
        in decode.
        """
        before = [s for s in self._before(segment) if s.home != "gpu"]
        num_tokens = self.prompt_slots
        if not in_prefill:
            before = [s for s in before if s.attended == "gpu"]
            num_tokens = self.num_slots
        start = num_tokens * sum(s.token_bytes for s in before)
        return slice(start, start + num_tokens * segment.token_bytes)

    def as_context(self, segment: Segment, buffer: torch.Tensor) -> torch.Tensor:
        """Return a view of a segment's bytes as its context, [tokens, vectors, rows, width]."""
        row_bytes = self.vectors * self.width * self.dtype.itemsize
        if is_by_row(segment):
            rows = segment.token_bytes // row_bytes
            by_row = buffer.view(self.dtype).view(rows, self.vectors, -1, self.width)
            return by_row[: segment.num_rows].permute(2, 1, 0, 3)
        used = segment.num_rows * row_bytes
        tokens = buffer.view(-1, segment.token_bytes)[:, :used].view(self.dtype)
        shape = self.vectors, segment.num_rows, self.width
        context: torch.Tensor = tokens.unflatten(1, shape)
        return context

    def as_runs(self, segment: Segment, buffer: torch.Tensor, tokens: slice) -> torch.Tensor:
        """Return some tokens of a segment as contiguous runs of memory: [runs, elements]."""
        if is_by_row(segment):
            by_row = self.as_context(segment, buffer)[tokens].permute(2, 1, 0, 3)
            return by_row.flatten(0, 1).flatten(1)
        size = segment.token_bytes
        return buffer[tokens.start * size : tokens.stop * size][None]

    def _before(self, segment: Segment) -> list[Segment]:
        return [s for s in self.segments if s.first_row < segment.first_row]
