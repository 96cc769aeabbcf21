"""The rows of a batch in chunks, which bound what a layer needs at once.

Neither the rows nor the size of a chunk change a bit of any row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPart:
    """Adjacent tokens of one prompt among some rows.

    Parameters
    ----------
    lane
        The prompt's lane.
    first_row, num_tokens
        The rows that are its tokens.
    first_position
        The position of the first of them.
    begins, ends
        The position of the prompt's first token among all rows of the batch, and one past its last.
    """

    lane: int
    first_row: int
    num_tokens: int
    first_position: int
    begins: int
    ends: int

    @property
    def rows(self) -> slice:
        """Its rows."""
        return slice(self.first_row, self.first_row + self.num_tokens)

    @property
    def is_first(self) -> bool:
        """Whether the prompt begins here."""
        return self.first_position == self.begins

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends here."""
        return self.first_position + self.num_tokens == self.ends

    def among(self, rows: slice) -> PromptPart | None:
        """Return what of it is among ``rows``, counted from the first of these, if anything is."""
        begin, end = max(rows.start, self.first_row), min(rows.stop, self.rows.stop)
        if begin >= end:
            return None
        return replace(
            self,
            first_row=begin - rows.start,
            num_tokens=end - begin,
            first_position=self.first_position + begin - self.first_row,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Rows of a batch that are computed at once.

    Parameters
    ----------
    rows
        Of the batch.
    num_decode
        The first of these rows that decode: all that the batch has, or none.
    prompts
        What it has of prompts, with rows counted from the chunk's first.
    emit_rows
        int64: the rows that a token is chosen for, counted in the same way.
    """

    rows: slice
    num_decode: int
    prompts: tuple[PromptPart, ...]
    emit_rows: torch.Tensor


def chunks_of(
    num_decode: int, prompts: Sequence[PromptPart], num_rows: int, chunk_rows: int
) -> Iterator[Chunk]:
    """Yield the rows of a batch in parts of ``chunk_rows``, the last one of fewer.

    The first part has all lanes that decode, be they more.
    """
    first, end = 0, min(max(num_decode, chunk_rows), num_rows)
    while first < num_rows:
        yield _chunk(slice(first, end), num_decode if first == 0 else 0, prompts)
        first, end = end, min(end + chunk_rows, num_rows)


def _chunk(rows: slice, num_decode: int, prompts: Sequence[PromptPart]) -> Chunk:
    found = (part.among(rows) for part in prompts)
    parts = tuple(part for part in found if part is not None)
    emits = [*range(num_decode), *(part.rows.stop - 1 for part in parts if part.is_last)]
    return Chunk(
        rows=rows,
        num_decode=num_decode,
        prompts=parts,
        emit_rows=torch.from_numpy(np.array(emits, np.int64)),
    )
