"""Rows of matrices that a checkpoint stores encoded, as the layout of a model wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from costmodel.model.layout import ComponentLayout
from costmodel.model.tensor_layout import ORDER, TABLE, TensorLayout
from profiles.encodings import Encoding
from profiles.errors import InputError
from profiles.kernels import EncodedMatrix, unpack_encoded
from profiles.units import MIB

# Some scratch where rows are decoded, or where a range begins or ends within a row.
ROWS_AT_ONCE_BYTES = 4 * MIB


class RowReader(Protocol):
    """The rows of one stored matrix. A vector is a matrix of one row."""

    @property
    def name(self) -> str:
        """The matrix in messages."""

    @property
    def encoding(self) -> Encoding:
        """How ``read`` returns rows; a plain one for floats."""

    @property
    def num_rows(self) -> int:
        """Rows of the matrix."""

    @property
    def num_elements(self) -> int:
        """Elements of a row."""

    def read(self, first: int, rows: torch.Tensor) -> None:
        """Fill uint8 [count, row_bytes], contiguous, with the rows from ``first`` on.

        Raises
        ------
        InputError
            Where stored values are not valid, such as scales that are NaN.
        """

    def table(self) -> torch.Tensor | None:
        """Return the table of the whole matrix, float32 [elements], where the encoding has one."""
        return None

    def order(self) -> torch.Tensor | None:
        """Return the input of each element of a row, int64 [num_elements], where inputs are
        sorted (see ``EncodedMatrix.columns``)."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRange:
    """``num_rows`` adjacent rows of a stored matrix, from ``first_row`` on."""

    reader: RowReader
    first_row: int
    num_rows: int


# For one of our tensors and the number of an expert, all rows of it, in order.
RowsOf = Callable[[str, int], Sequence[RowRange]]


def fill_component(
    layout: ComponentLayout, start: int, out: torch.Tensor, rows_of: RowsOf, dtype: torch.dtype
) -> None:
    """Fill ``out`` (uint8) with the bytes of a component from ``start`` on; padding is zero.

    Parameters
    ----------
    dtype
        The model's, of elements that are not encoded.
    """
    past, filled = start + len(out), start
    for unit in layout.units_between(start, past):
        for tensor in layout.tensors:
            offset = unit * layout.unit_bytes + tensor.offset_bytes
            low, high = max(offset, start), min(offset + tensor.num_bytes, past)
            if low < high:
                out[filled - start : low - start].zero_()
                filled = high
                target = out[low - start : high - start]
                skipped = layout.first_row if tensor.name.startswith("head.") else 0
                stored = rows_of(tensor.matrix_name, unit)
                fill_tensor(tensor, stored, low - offset, target, dtype, skipped)
    out[filled - start :].zero_()


def fill_tensor(
    tensor: TensorLayout,
    stored: Sequence[RowRange],
    first_byte: int,
    target: torch.Tensor,
    dtype: torch.dtype,
    skipped: int = 0,
) -> None:
    """Fill ``target`` (uint8) with the bytes of a tensor of a layout from ``first_byte`` on.

    Parameters
    ----------
    stored
        All rows of our matrix, in order. The tensor may have some of them, or be a vector beside
        them.
    dtype
        The model's, of elements that are not encoded.
    skipped
        Rows of the matrix, or elements of the vector, before those of the tensor.
    """
    dtype = getattr(torch, tensor.dtype) if tensor.dtype else dtype
    if len(tensor.shape) == 1:
        elements = _vector(tensor, stored, dtype)[skipped : skipped + tensor.num_elements]
        target.copy_(elements.view(torch.uint8)[first_byte : first_byte + len(target)])
        return
    size, past_byte = tensor.row_bytes, first_byte + len(target)
    past_row, step = -(-past_byte // size), max(1, ROWS_AT_ONCE_BYTES // size)
    behind = -tensor.first_row - skipped
    for part in stored:
        # Where the part's rows begin in the tensor, and those of them that are wanted.
        begin = behind
        behind += part.num_rows
        low, high = max(begin, first_byte // size), min(behind, past_row)
        for row in range(low, high, step):
            count = min(step, high - row)
            first, past = row * size - first_byte, (row + count) * size - first_byte
            is_inside = first >= 0 and past <= len(target)
            rows = target[first:past] if is_inside else torch.empty(past - first, dtype=torch.uint8)
            _read(tensor, part.reader, part.first_row + row - begin, rows.view(count, size), dtype)
            if not is_inside:
                cut = max(first, 0), min(past, len(target))
                target[slice(*cut)] = rows[cut[0] - first : cut[1] - first]


def _read(
    tensor: TensorLayout, reader: RowReader, first: int, rows: torch.Tensor, dtype: torch.dtype
) -> None:
    """Fill rows, uint8 [count, row_bytes of the tensor], from a stored matrix."""
    if tensor.encoding is not None:
        assert tensor.encoding == reader.encoding
        reader.read(first, rows)
        return
    _decode(reader, first, rows.view(dtype))


def _decode(reader: RowReader, first: int, out: torch.Tensor) -> None:
    """Fill ``out`` [rows, num_elements] with elements of a stored matrix."""
    width = reader.num_elements
    raw = torch.empty(len(out), reader.encoding.row_bytes(width), dtype=torch.uint8)
    reader.read(first, raw)
    matrix = EncodedMatrix(
        rows=raw,
        encoding=reader.encoding,
        num_elements=width,
        table=reader.table(),
        first_row=first,
        columns=reader.order(),
    )
    unpack_encoded(matrix, out)
    if out.dtype is torch.float16 and not out.isfinite().all():
        raise InputError(
            reader.name,
            got="a value that float16 cannot hold",
            allowed="values within 65504",
            hint="computing in bfloat16 or float32",
        )


def _vector(tensor: TensorLayout, stored: Sequence[RowRange], dtype: torch.dtype) -> torch.Tensor:
    """Return a vector of a layout: a stored one, or one that is beside the rows of a matrix."""
    beside = {TABLE: _table, ORDER: _order}
    kind = next((kind for kind in beside if kind in tensor.name), None)
    found: list[torch.Tensor] = []
    behind = 0
    first = int(tensor.name.rpartition(kind)[2]) if kind else 0
    for part in stored:
        if kind is None:
            vector = torch.empty(part.num_rows, part.reader.num_elements, dtype=dtype)
            _decode(part.reader, part.first_row, vector)
            found.append(vector.flatten())
        elif behind >= first and sum(map(len, found)) < tensor.num_elements:
            found.append(beside[kind](part))
        behind += part.num_rows
    return torch.cat(found)


def _order(part: RowRange) -> torch.Tensor:
    order = part.reader.order()
    assert order is not None
    return order.to(torch.int32)


def _table(part: RowRange) -> torch.Tensor:
    """Return what rows need of the table of their stored matrix."""
    table, how = part.reader.table(), part.reader.encoding
    assert table is not None
    assert len(table) == how.table_elements(part.reader.num_rows, part.reader.num_elements)
    if part.num_rows == part.reader.num_rows:
        return table
    assert how.tile_rows and part.first_row % how.tile_rows == 0
    scales = how.tile_scales(part.reader.num_elements)
    first, past = part.first_row // how.tile_rows, part.first_row + part.num_rows
    return table[first * scales : -(-past // how.tile_rows) * scales]
