"""Reading the elements of a stored tensor, converted to the dtype that is wanted."""

from __future__ import annotations

import torch

from costmodel.model.stacked import Strides
from costmodel.model.tensor_entry import TensorEntry
from executor.checkpoint.safetensors_file import READ_BYTES, read_into, read_rows
from profiles.errors import InputError

SOURCE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Stored rows that are transposed at once: with more, the copy is several times slower.
COLUMNS_AT_ONCE = 64


def read_elements(entry: TensorEntry, first: int, target: torch.Tensor) -> None:
    """Fill ``target``, one-dimensional, with elements from ``first`` on, converted to its dtype.

    Scratch is at most 16 MiB.
    """
    source = SOURCE_DTYPES[entry.dtype]
    offset = entry.offset_bytes + first * source.itemsize
    if source is target.dtype:
        read_into(entry.path, offset, target.view(torch.uint8).numpy().data)
        return
    step = min(READ_BYTES // source.itemsize, target.numel())
    scratch = torch.empty(step, dtype=source)
    for start in range(0, target.numel(), step):
        piece = scratch[: min(step, target.numel() - start)]
        read_into(
            entry.path, offset + start * source.itemsize, piece.view(torch.uint8).numpy().data
        )
        _convert(entry, piece, target[start : start + piece.numel()])


def read_strided(entry: TensorEntry, strides: Strides, first: int, target: torch.Tensor) -> None:
    """Fill ``target``, one-dimensional, with elements from ``first`` on of a matrix whose columns
    are stored as rows, converted to its dtype.

    Scratch has ``COLUMNS_AT_ONCE`` stored rows, as far as ours are read. Pages of the file stay in
    the page cache until the matrix is complete, because every part of it needs most of them.
    """
    done = 0
    while done < len(target):
        row, column = divmod(first + done, strides.columns)
        whole = 0 if column else (len(target) - done) // strides.columns
        count = min(strides.columns - column, len(target) - done)
        part = target[done : done + max(1, whole) * count].view(-1, count)
        _read_rectangle(entry, strides, row, column, part)
        done += part.numel()


def are_equal(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors of one shape have equal values; reads up to the first difference."""
    count = one.num_bytes // SOURCE_DTYPES[one.dtype].itemsize
    # float32 has all values of the other dtypes.
    step = READ_BYTES // torch.float32.itemsize
    for first in range(0, count, step):
        pieces = [torch.empty(min(step, count - first)) for _ in range(2)]
        for entry, piece in zip((one, other), pieces, strict=True):
            read_elements(entry, first, piece)
        if not torch.equal(*pieces):
            return False
    return True


def _read_rectangle(
    entry: TensorEntry, strides: Strides, row: int, column: int, target: torch.Tensor
) -> None:
    """Fill ``target`` [rows, columns] with our elements from ``row`` and ``column`` on."""
    source = SOURCE_DTYPES[entry.dtype]
    length = (len(target) - 1) * strides.row_step + 1
    step = min(COLUMNS_AT_ONCE, target.shape[1])
    scratch = torch.empty(step, length, dtype=source)
    begin = strides.first + row * strides.row_step + column * strides.column_step
    for left in range(0, target.shape[1], step):
        piece = scratch[: min(step, target.shape[1] - left)]
        read_rows(
            entry.path,
            entry.offset_bytes + (begin + left * strides.column_step) * source.itemsize,
            strides.column_step * source.itemsize,
            piece.view(torch.uint8).numpy(),
        )
        wanted = piece[:, :: strides.row_step].t()
        _convert(entry, wanted, target[:, left : left + len(piece)])


def _convert(entry: TensorEntry, piece: torch.Tensor, target: torch.Tensor) -> None:
    """Convert part of a tensor to the dtype of ``target``, in the same shape."""
    converted = target.copy_(piece)
    if target.dtype is torch.float16 and _overflows(piece, converted):
        raise InputError(
            f"tensor {entry.name} of {entry.path.parent.name}",
            got="a value that float16 cannot hold",
            allowed="values within 65504",
            hint="computing in bfloat16 or float32",
        )


def _overflows(piece: torch.Tensor, converted: torch.Tensor) -> bool:
    if converted.abs().max().isfinite():
        return False
    # Infinities and NaN in the source are accepted.
    return bool((converted.isinf() & piece.isfinite()).any())
