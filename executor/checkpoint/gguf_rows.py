"""Rows of the tensors of GGUF files."""

from __future__ import annotations

import torch

from costmodel.model.tensor_entry import TensorEntry
from executor.checkpoint.safetensors_file import read_into
from profiles.encodings import BLOCK_ENCODINGS, Encoding, Kind
from profiles.errors import InputError

# All ones in the exponent of a float16.
_NO_NUMBER = 0x7C00


def read_rows(entry: TensorEntry, first: int, rows: torch.Tensor) -> None:
    """Fill uint8 [count, row_bytes] with the rows of a tensor from ``first`` on.

    Raises
    ------
    InputError
        Where a scale is infinite or no number.
    """
    encoding = BLOCK_ENCODINGS[entry.dtype]
    assert rows.is_contiguous() and rows.shape[1] == encoding.row_bytes(entry.shape[-1])
    offset = entry.offset_bytes + first * rows.shape[1]
    read_into(entry.path, offset, rows.flatten().numpy().data)
    if not _has_numbers(rows, encoding):
        raise InputError(
            f"tensor {entry.name} of {entry.path.name}",
            got="a scale that is infinite or no number",
            allowed="numbers",
            hint="download the file again",
        )


def _has_numbers(rows: torch.Tensor, encoding: Encoding) -> bool:
    blocks = rows.view(-1, encoding.block_bytes)
    if encoding.kind is Kind.MXFP4:
        return not bool((blocks[:, 0] == 255).any())
    for at in encoding.halves_at:
        halves = blocks[:, at : at + 2].contiguous().view(torch.int16)
        if bool(((halves & _NO_NUMBER) == _NO_NUMBER).any()):
            return False
    return True
