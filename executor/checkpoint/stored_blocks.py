"""Reading parts of a stored tensor in its own dtype."""

from __future__ import annotations

import math

import torch

from costmodel.model.tensor_entry import TensorEntry
from executor.checkpoint import safetensors_file
from executor.checkpoint.safetensors_file import drop_pages, read_into

# 8-bit floats are bytes here: they are not computed with.
STORED_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.uint8,
    "F8_E8M0": torch.uint8,
}


def read_whole(entry: TensorEntry, first: int = 0, past: int | None = None) -> torch.Tensor:
    """Read elements from ``first`` to before ``past``, one-dimensional."""
    dtype = STORED_DTYPES[entry.dtype]
    past = entry.num_bytes // dtype.itemsize if past is None else past
    out = torch.empty(past - first, dtype=dtype)
    _read(entry, first * dtype.itemsize, out)
    return out


def read_rows(entry: TensorEntry, first: int, past: int, *, flat: bool = False) -> torch.Tensor:
    """Read rows from ``first`` to before ``past``, two-dimensional.

    With ``flat``, the first two dimensions of the tensor are one, and the others are another.
    Otherwise the first dimension has the rows.
    """
    rows = math.prod(entry.shape[: 2 if flat else 1])
    columns = math.prod(entry.shape) // rows
    out = torch.empty(past - first, columns, dtype=STORED_DTYPES[entry.dtype])
    _read(entry, first * columns * out.itemsize, out)
    return out


def read_columns(entry: TensorEntry, first: int, past: int) -> torch.Tensor:
    """Read columns from ``first`` to before ``past`` of a matrix, [rows, past - first].

    Pages of the file stay in the page cache until the last columns are read, because every part of
    it needs most of them.
    """
    rows, columns = entry.shape
    out = torch.empty(rows, past - first, dtype=STORED_DTYPES[entry.dtype])
    if past - first == columns:
        _read(entry, 0, out)
        return out
    begin = entry.offset_bytes + first * out.itemsize
    target = out.view(torch.uint8).numpy()
    safetensors_file.read_rows(entry.path, begin, columns * out.itemsize, target)
    if past == columns:
        drop_pages(entry)
    return out


def _read(entry: TensorEntry, offset_bytes: int, out: torch.Tensor) -> None:
    read_into(
        entry.path,
        entry.offset_bytes + offset_bytes,
        out.flatten().view(torch.uint8).numpy().data,
    )
