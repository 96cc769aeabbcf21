"""Encoded matrices, whole or some of their rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from profiles.encodings import Encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedMatrix:
    """Rows of an encoded matrix: all of them, or some that are adjacent.

    Parameters
    ----------
    rows
        uint8 [outputs, row_bytes], dense in its last dimension.
    num_elements
        Elements of a row: the inputs of the product.
    table
        float32 [table_elements] of the whole matrix, for encodings that have one.
    first_row
        The number of the first row in the whole matrix.
    columns
        int64 or int32 [num_elements], where rows are in another order: element ``i`` of a row is of
        input ``columns[i]``.
    """

    rows: torch.Tensor
    encoding: Encoding
    num_elements: int
    table: torch.Tensor | None = None
    first_row: int = 0
    columns: torch.Tensor | None = None

    def __post_init__(self) -> None:
        assert self.rows.dtype == torch.uint8 and self.rows.stride(-1) == 1
        assert self.rows.shape[1] == self.encoding.row_bytes(self.num_elements)
        assert self.encoding.has_table == (self.table is not None)
        assert self.table is None or self.table.dtype == torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and elements of a row."""
        return len(self.rows), self.num_elements

    def __getitem__(self, part: slice) -> EncodedMatrix:
        """Return adjacent rows as a view, which shares the table."""
        first, past, step = part.indices(len(self.rows))
        assert step == 1
        return self.part(first, max(first, past))

    def clone(self) -> EncodedMatrix:
        """Return a copy in memory of its own."""
        table = None if self.table is None else self.table.clone()
        columns = None if self.columns is None else self.columns.clone()
        return replace(self, rows=self.rows.clone(), table=table, columns=columns)

    def part(self, first: int, past: int) -> EncodedMatrix:
        """Return the rows from ``first`` to before ``past``, which share the table."""
        return replace(self, rows=self.rows[first:past], first_row=self.first_row + first)
