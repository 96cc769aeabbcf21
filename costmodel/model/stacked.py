"""Tensors that a checkpoint stores in another order than ours. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from costmodel.model.layer_spec import LayerSpec
from profiles.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Strides:
    """Where the elements of one of our matrices are in a stored tensor, in elements.

    Element (``row``, ``column``) is at ``first + row * row_step + column * column_step``. A vector
    is a matrix of one column.

    Parameters
    ----------
    columns
        Elements of one of our rows.
    ends_matrix
        Whether no later matrix of the same expert has elements between these.
    """

    first: int
    row_step: int
    column_step: int
    columns: int
    ends_matrix: bool = True

    @property
    def is_contiguous(self) -> bool:
        """Whether our elements follow each other in the stored tensor."""
        return self.row_step == self.columns and (self.column_step == 1 or self.columns == 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedTensor:
    """How one tensor stores a matrix of each expert, or a vector of each.

    The default is [experts, rows, columns] for matrices and [experts, rows] for vectors. Outside of
    experts, there is one of each.

    Parameters
    ----------
    is_transposed
        Whether each matrix is stored [columns, rows].
    is_interleaved
        Whether the rows of gate and up are interleaved, instead of all of gate before all of up.
        Only those of transposed matrices are.
    is_flat
        Whether the first two dimensions are one.
    """

    is_transposed: bool = False
    is_interleaved: bool = False
    is_flat: bool = False

    def shape(self, count: int, rows: int, columns: int | None) -> tuple[int, ...]:
        """Return the stored shape of ``count`` matrices, or of vectors without ``columns``."""
        if columns is None:
            return (count * rows,) if self.is_flat else (count, rows)
        first, last = (columns, rows) if self.is_transposed else (rows, columns)
        return (count * first, last) if self.is_flat else (count, first, last)

    def parts(self, number: int, rows: int, columns: int) -> Iterator[tuple[Strides, int]]:
        """Yield the parts of one of the matrices, each with its number of rows."""
        if self.is_interleaved and not self.is_transposed and columns > 1:
            raise InputError(
                "stacked tensor", got="interleaved rows", allowed="interleaved columns, transposed"
            )
        row_step, column_step = (1, rows) if self.is_transposed else (columns, 1)
        count = 2 if self.is_interleaved else 1
        for part in range(count):
            strides = Strides(
                first=number * rows * columns + part * row_step,
                row_step=count * row_step,
                column_step=column_step,
                columns=columns,
                ends_matrix=part == count - 1,
            )
            yield strides, rows // count


def stacked_rows(layer: LayerSpec, name: str, num_rows: int, num_parts: int) -> tuple[int, ...]:
    """Return the rows of each module that is stacked to make one of our tensors."""
    if name.startswith("qkv.") and num_parts > 1:
        return layer.attention.qkv_parts
    return (num_rows // num_parts,) * num_parts
