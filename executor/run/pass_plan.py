"""What one pass computes: the rows of each batch, and where they are in the cache.

A row is one token. A batch has one row for each lane that decodes, then all of the prompts that
begin. Tensors are made of numpy arrays: the thread that plans starts no team of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from costmodel.model.attention_spec import AttentionSpec
from costmodel.plan.pages import PAGE
from costmodel.schedule.pass_lanes import LaneBatch
from executor.run.chunks import Chunk, PromptPart, chunks_of
from executor.run.lanes import Integers, Lane, LaneTable, Table
from executor.stores.page_runs import PassPages


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSlots:
    """Where the decoding lanes of a batch are in layers of one ring.

    Parameters
    ----------
    tables
        Page tables, int32 [lanes, pages].
    lengths
        Slots in use, the new token's included, int32 [lanes].
    pages, offsets
        The new token's page, and its place there, int64 [lanes].
    """

    tables: torch.Tensor
    lengths: torch.Tensor
    pages: torch.Tensor
    offsets: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PassBatch:
    """One batch of a pass.

    Parameters
    ----------
    ids, positions
        Of each row, int64 [rows].
    most_positions
        The positions of each row's whole sequence, int64 [rows]; ``longrope`` depends on them.
    lanes
        The numbers of the decoding lanes, in the order of the first rows, int32 [lanes].
    begins
        Which of them decode for the first time, uint8 [lanes].
    slots
        By ring of the model, where the decoding lanes are.
    order
        The decoding lanes, longest first, int32 [lanes].
    prompts
        The prompts that begin.
    chunks
        The rows in parts.
    emit_rows, emit_lanes
        The rows that a token is chosen for, int64, and the lanes that get them.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    most_positions: torch.Tensor
    lanes: torch.Tensor
    begins: torch.Tensor
    slots: tuple[DecodeSlots, ...]
    order: torch.Tensor
    prompts: tuple[PromptPart, ...]
    chunks: tuple[Chunk, ...]
    emit_rows: torch.Tensor
    emit_lanes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPlan:
    """One pass: its number, and its batches. Their rows are adjacent: the first of each, and one
    past the last of all, are ``first_rows``. ``pages`` are those in use, by ring of the model."""

    number: int
    batches: tuple[PassBatch, ...]
    first_rows: tuple[int, ...]
    pages: tuple[PassPages, ...]

    @classmethod
    def of(
        cls, number: int, batches: Sequence[LaneBatch], table: LaneTable, *, chunk_rows: int
    ) -> PassPlan:
        """Lay out the rows of a pass. Every lane must be in the table, and get its pages here."""
        made = tuple(_batch(batch, table, chunk_rows) for batch in batches)
        ends = np.cumsum([0, *map(len, made)]).tolist()
        pages = tuple(_pages(made, table, ring) for ring in range(len(table.tables)))
        return cls(number=number, batches=made, first_rows=tuple(ends), pages=pages)


def void_slots(batch: PassBatch, attention: AttentionSpec, ring: int | None) -> torch.Tensor | None:
    """Return the slots of a ring that the decoding lanes do not attend to.

    A ring has whole pages, and so more slots than the window: those of older tokens are void. They
    may wrap around. ``None`` without a window.

    Returns
    -------
    torch.Tensor
        int32 [lanes, 2]: the first void slot, and one past the last.
    """
    if attention.window is None or ring is None:
        return None
    last = batch.positions.numpy()[: len(batch.lanes)]
    first_seen = np.maximum(0, last + 1 - attention.window)
    if attention.is_chunked:
        first_seen = last - last % attention.window
    oldest = np.maximum(0, last + 1 - ring)
    return torch.from_numpy(np.stack([oldest % ring, first_seen % ring], axis=1).astype(np.int32))


def _batch(batch: LaneBatch, table: LaneTable, chunk_rows: int) -> PassBatch:
    decoding = [table.lanes[number] for number in batch.decoding]
    prompts = [table.lanes[number] for number, _ in batch.newcomers]
    positions = np.array([lane.length for lane in decoding], np.int64)
    for number, lane in zip(batch.decoding, decoding, strict=True):
        table.make_room(number, lane.length + 1)
    for (number, _), lane in zip(batch.newcomers, prompts, strict=True):
        table.make_room(number, len(lane.prompt) if lane.is_cached else 0)
    lasts = np.array([lane.generated[-1] for lane in decoding], np.int64)
    counts = [1] * len(decoding) + [lane.rows for lane in prompts]
    ends = np.cumsum(counts, dtype=np.int64)
    parts = [
        PromptPart(
            lane=number,
            first_row=int(end) - lane.rows,
            num_tokens=lane.rows,
            first_position=lane.skipped,
            begins=lane.skipped,
            ends=len(lane.prompt),
        )
        for (number, _), lane, end in zip(
            batch.newcomers, prompts, ends[len(decoding) :], strict=True
        )
    ]
    lanes = (*decoding, *prompts)
    return PassBatch(
        ids=_tensor(np.concatenate([lasts, *(lane.prompt[lane.skipped :] for lane in prompts)])),
        positions=_tensor(
            np.concatenate(
                [positions, *(np.arange(lane.skipped, len(lane.prompt)) for lane in prompts)]
            )
        ),
        most_positions=_tensor(np.repeat([lane.most_tokens for lane in lanes], counts)),
        lanes=torch.from_numpy(np.array(batch.decoding, np.int32)),
        begins=torch.from_numpy(_first_steps(decoding)),
        slots=tuple(_slots(rows, batch.decoding, positions) for rows in table.tables),
        order=torch.from_numpy(np.argsort(-positions, kind="stable").astype(np.int32)),
        prompts=tuple(parts),
        chunks=tuple(chunks_of(len(decoding), parts, sum(counts), chunk_rows)),
        emit_rows=_tensor(ends - 1),
        emit_lanes=(*batch.decoding, *(number for number, _ in batch.newcomers)),
    )


def _pages(batches: Sequence[PassBatch], table: LaneTable, ring: int) -> PassPages:
    used, new = table.take_pages_in_use(ring)
    decoded = [batch.slots[ring].pages.numpy() for batch in batches]
    return PassPages(
        present=np.setdiff1d(used, new, assume_unique=True),
        used=used,
        # Prompts are on new pages.
        written=np.unique(np.concatenate([new, *decoded])),
    )


def _tensor(values: Integers | Table) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=False))


def _first_steps(decoding: Sequence[Lane]) -> npt.NDArray[np.uint8]:
    return np.array([len(lane.generated) == 1 for lane in decoding], np.uint8)


def _slots(table: Table, lanes: Sequence[int], positions: Integers) -> DecodeSlots:
    """Find the lanes in layers of one ring; a table as wide as the longest sequence has no end
    that a position could pass."""
    numbers = np.array(lanes, np.int64)
    num_slots = table.shape[1] * PAGE
    slots = positions % num_slots
    rows = table[numbers]
    return DecodeSlots(
        tables=torch.from_numpy(rows),
        lengths=torch.from_numpy(np.minimum(positions + 1, num_slots).astype(np.int32)),
        pages=_tensor(rows[np.arange(len(rows)), slots // PAGE]),
        offsets=_tensor(slots % PAGE),
    )
