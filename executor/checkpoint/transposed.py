"""Matrices that a checkpoint stores transposed, as GPT-2 does: [inputs, outputs]."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from executor.checkpoint.safetensors_file import READ_BYTES, TensorEntry
from executor.checkpoint.stored_tensors import SOURCE_DTYPES, convert
from profiles.errors import RunError


def read_transposed(entry: TensorEntry, first: int, target: torch.Tensor) -> None:
    """Fill ``target``, one-dimensional, with elements from ``first`` on of a matrix [outputs,
    inputs], converted to its dtype; the entry is [inputs, outputs].

    Scratch is at most 16 MiB.
    """
    inputs, source = entry.shape[0], SOURCE_DTYPES[entry.dtype]
    # The columns as they are stored, and transposed.
    most = READ_BYTES // (2 * inputs * source.itemsize)
    for rows, ours, part in row_pieces(inputs, first, len(target), most):
        columns = torch.empty(inputs, len(rows), dtype=source)
        _read_columns(entry, rows, columns)
        convert(entry, columns.t().flatten()[part], target[ours])


def row_pieces(
    width: int, first: int, count: int, most_rows: int
) -> Iterator[tuple[range, slice, slice]]:
    """Cut ``count`` elements from ``first`` on, of rows of ``width``, into pieces of some rows.

    Yields the rows of each piece, its elements among the ``count``, and among those of its rows.
    """
    step, end = max(1, most_rows), first + count
    end_row = -(-end // width)
    for row in range(first // width, end_row, step):
        rows = range(row, min(row + step, end_row))
        low, high = max(first, rows.start * width), min(end, rows.stop * width)
        base = rows.start * width
        yield rows, slice(low - first, high - first), slice(low - base, high - base)


def _read_columns(entry: TensorEntry, columns: range, out: torch.Tensor) -> None:
    """Fill ``out`` [inputs, columns] with some columns of a stored matrix.

    The pages stay in the page cache until the last column is read, because other columns are
    adjacent to these.
    """
    item_bytes = out.element_size()
    row_bytes = entry.shape[1] * item_bytes
    start = entry.offset_bytes + columns.start * item_bytes
    try:
        with entry.path.open("rb", buffering=0) as handle:
            for i, row in enumerate(out.view(torch.uint8).numpy()):
                if os.preadv(handle.fileno(), [row.data], start + i * row_bytes) < len(row):
                    raise RunError(f"shard {entry.path}: it became shorter while it was read")
            if columns.stop == entry.shape[1]:
                advice = os.POSIX_FADV_DONTNEED
                os.posix_fadvise(handle.fileno(), entry.offset_bytes, entry.num_bytes, advice)
    except OSError as error:
        raise RunError(f"shard {entry.path}: cannot be read ({error.strerror})") from error
